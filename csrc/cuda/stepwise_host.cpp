// The stepwise path: for each step a product by torch's cuBLAS and a kernel; with a projection, twice.
#include "host.h"

namespace seqkernels {

namespace {

// A weight [rows, columns] of all directions, one behind the other.
Tensor all_directions(const CallContext& context, const Layer& p, const void* const WeightsOf<const void*>::* which,
                      int64_t rows, int64_t columns) {
  if (p.directions == 1) return context.view(p.weights[0].*which, {1, rows, columns});
  Tensor both = context.allocate({2, rows, columns});
  for (int d = 0; d < 2; d++) {
    Tensor one = context.view(context.at(both.mutable_data_ptr(), d * rows * columns), {rows, columns});
    copy(one, context.view(p.weights[d].*which, {rows, columns}));
  }
  return both;
}

Tensor transposed(const CallContext& context, const Layer& p, const Tensor& array, int64_t rows, int64_t columns) {
  return context.view(array.const_data_ptr(), {p.directions, columns, rows}, {rows * columns, 1, columns});
}

// The first rows of each of the D matrices of an array [D, B, width]. Most steps have as many rows as the step before,
// and take its view.
class FirstRows {
 public:
  FirstRows(const CallContext& context, const Layer& p, const Tensor& array, int64_t width)
      : context_(context), p_(p), data_(array.const_data_ptr()), width_(width) {}

  const Tensor& operator()(int64_t rows) {
    if (!view_ || rows != rows_)
      view_ = context_.view(data_, {p_.directions, rows, width_}, {p_.sequences * width_, width_, 1});
    rows_ = rows;
    return *view_;
  }

 private:
  const CallContext& context_;
  const Layer& p_;
  const void* data_;
  int64_t width_, rows_ = 0;
  Optional view_;
};

Tensor in_accumulator_type(const CallContext& context, const Tensor& like) {
  const auto sizes = like.sizes();
  return context.allocate(Shape(sizes.begin(), sizes.end()), context.accumulator_type());
}

// The states of the pieces that sequences begin with, in the order of a pass, and, behind it, those that they end with.
void copy_pieces(const CallContext& context, const SweepArgs& sweep, const StepMasks& masks, bool last,
                 const void* of_pieces, Tensor& of_sequences, bool back = false) {
  if (!of_sequences.numel()) return;
  CopyPieces p{};
  p.layer = sweep;
  p.masks = masks;
  p.last = last, p.back = back;
  p.accumulated = of_sequences.scalar_type() == context.accumulator_type();
  p.of_pieces = const_cast<void*>(of_pieces);
  p.of_sequences = of_sequences.mutable_data_ptr();
  check_launch(copy_pieces(p, context.stream()));
}

void multiply_by_mask(const CallContext& context, const SweepArgs& sweep, const void* mask, const Tensor& states,
                      const Tensor* added, Tensor& result) {
  MaskStates p{};
  p.layer = sweep;
  p.mask = mask;
  p.states = states.const_data_ptr();
  p.added = added ? added->const_data_ptr() : nullptr;
  p.result = result.mutable_data_ptr();
  check_launch(mask_states(p, context.stream()));
}

// States come in as the initial ones (gradients as those of the final ones), and change in place; c and its gradient in
// the accumulator type. Of pieces only those that sequences begin with come in, and those of the others are read from
// the sweep's arguments; there all leave their last.

void forward_steps(const CallContext& context, const Layer& p, const StepOffsets& steps, const ForwardArgs& sweep,
                   const StepMasks& masks, Tensor& h, Tensor& c) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = all_directions(context, p, &WeightsOf<const void*>::w_hh, GH, P);
  const Tensor w_hh_t = transposed(context, p, w_hh, GH, P);
  Tensor gates_h = context.allocate({D, B, GH}), factors = h, unprojected = h, projected = h, w_hr = h, w_hr_t = h;
  if (p.has_projection) {
    unprojected = context.allocate({D, B, H}), projected = context.allocate({D, B, P});
    w_hr = all_directions(context, p, &WeightsOf<const void*>::w_hr, P, H);
    w_hr_t = transposed(context, p, w_hr, P, H);
  }
  if (masks.recurrent) {
    factors = context.allocate({D, B, P});
    multiply_by_mask(context, sweep, masks.recurrent, h, nullptr, factors);
  }
  FirstRows rows_of_gates(context, p, gates_h, GH), rows_of_factors(context, p, factors, P);
  FirstRows rows_of_unprojected(context, p, unprojected, H), rows_of_projected(context, p, projected, P);
  MaskedStepForward step{};
  step.masks = masks;
  step.factors = masks.recurrent ? factors.mutable_data_ptr() : nullptr;
  step.layer = sweep;
  step.gates_h = gates_h.const_data_ptr();
  step.h = unprojected.mutable_data_ptr();
  step.c = pointer(c);
  step.has_projection = p.has_projection;
  StepProject projection{};
  projection.layer = sweep;
  projection.result = projected.const_data_ptr();
  projection.h = h.mutable_data_ptr();
  projection.y = sweep.y;
  for (int64_t k = 0; k < p.steps; k++) {
    step.k = projection.k = k;
    step.running = projection.running = steps.running(k);
    multiply_each(rows_of_gates(step.running), rows_of_factors(step.running), w_hh_t);
    check_launch(masks.any() ? step_forward(step, context.stream())
                             : step_forward(static_cast<const StepForward&>(step), context.stream()));
    if (!p.has_projection) continue;
    multiply_each(rows_of_projected(step.running), rows_of_unprojected(step.running), w_hr_t);
    check_launch(step_project(projection, context.stream()));
  }
}

void backward_steps(const CallContext& context, const Layer& p, const StepOffsets& steps, const BackwardArgs& sweep,
                    const StepMasks& masks, const SweepGradients& grads, Tensor& grad_h, Tensor& grad_c) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = all_directions(context, p, &WeightsOf<const void*>::w_hh, GH, P);
  Tensor grad_step = context.allocate({D, B, GH}), unprojected = grad_h, projected = grad_h, w_hr = grad_h;
  if (p.has_projection) {
    unprojected = context.allocate({D, B, H}), projected = context.allocate({D, B, P});
    w_hr = all_directions(context, p, &WeightsOf<const void*>::w_hr, P, H);
  }
  Tensor grad_factors = grad_h;  // what the products with w_hh give: added to grad_h, but for a mask by themselves
  if (masks.recurrent) {
    grad_factors = context.allocate({D, B, P});
    zero(grad_factors);
  }
  FirstRows rows_of_gates(context, p, grad_step, GH), rows_of_grad_factors(context, p, grad_factors, P);
  FirstRows rows_of_projected(context, p, projected, P), rows_of_unprojected(context, p, unprojected, H);
  MaskedStepBackward step{};
  step.masks = masks;
  step.grad_factors = masks.recurrent ? grad_factors.const_data_ptr() : nullptr;
  step.layer = sweep;
  if (p.has_projection) step.layer.grad_y = nullptr;
  step.grad_h = unprojected.mutable_data_ptr();
  step.grad_c = pointer(grad_c);
  step.grad_step = grad_step.mutable_data_ptr();
  step.has_projection = p.has_projection;
  StepProjectBackward projection{};
  projection.layer = sweep;
  projection.grad_y = sweep.grad_y;
  projection.grad_h = grad_h.mutable_data_ptr();
  projection.grad_step = projected.mutable_data_ptr();
  projection.grad_projected = grads.projected ? grads.projected->mutable_data_ptr() : nullptr;
  for (int64_t k = p.steps; k-- > 0;) {
    step.k = projection.k = k;
    step.running = projection.running = steps.running(k);
    if (p.has_projection) {
      check_launch(step_project_backward(projection, context.stream()));
      multiply_each(rows_of_unprojected(step.running), rows_of_projected(step.running), w_hr);
    }
    check_launch(masks.any() ? step_backward(step, context.stream())
                             : step_backward(static_cast<const StepBackward&>(step), context.stream()));
    multiply_each(rows_of_grad_factors(step.running), rows_of_gates(step.running), w_hh, !masks.recurrent);
  }
  if (masks.recurrent) multiply_by_mask(context, sweep, masks.recurrent, grad_factors, &grad_h, grad_h);
}

// The states of sequences that change in place, [D, B, H], or their gradients. Where sequences consist of pieces, they
// begin as the states of those that a pass begins with.
struct OfSequences {
  Tensor h, c;

  OfSequences(const CallContext& context, const SweepArgs& sweep, const StepMasks& masks, bool last, const void* h_of,
              const void* c_of, bool has_c)
      : h(context.allocate({sweep.directions, sweep.sequences, sweep.hidden})),
        c(context.allocate(has_c ? Shape{sweep.directions, sweep.sequences, sweep.hidden} : Shape{0},
                           context.accumulator_type())) {
    copy_pieces(context, sweep, masks, last, h_of, h);
    copy_pieces(context, sweep, masks, last, c_of, c);
  }
};

}  // namespace

void stepwise_forward(const CallContext& context, const Layer& p, const StepOffsets& steps, const ForwardArgs& sweep,
                      const StepMasks& masks, Tensor& h_n, Tensor& c_n) {
  if (masks.pieces) {
    OfSequences now(context, sweep, masks, false, sweep.h_0, sweep.c_0, sweep.c_0);
    forward_steps(context, p, steps, sweep, masks, now.h, now.c);
  } else {
    Tensor c = in_accumulator_type(context, c_n);
    begin_as(context, h_n, sweep.h_0);
    begin_as(context, c, sweep.c_0);
    forward_steps(context, p, steps, sweep, masks, h_n, c);
    if (c.numel()) copy(c_n, c);
  }
}

void stepwise_backward(const CallContext& context, const Layer& p, const StepOffsets& steps, const BackwardArgs& sweep,
                       const StepMasks& masks, const SweepGradients& grads, Tensor& grad_h_0, Tensor& grad_c_0) {
  if (masks.pieces) {
    OfSequences grad(context, sweep, masks, true, sweep.grad_h_n, sweep.grad_c_n, sweep.c_0);
    backward_steps(context, p, steps, sweep, masks, grads, grad.h, grad.c);
    copy_pieces(context, sweep, masks, false, sweep.grad_h_0, grad.h, true);
    copy_pieces(context, sweep, masks, false, sweep.grad_c_0, grad.c, true);
  } else {
    Tensor grad_c = in_accumulator_type(context, grad_c_0);
    begin_as(context, grad_h_0, sweep.grad_h_n);
    begin_as(context, grad_c, sweep.grad_c_n);
    backward_steps(context, p, steps, sweep, masks, grads, grad_h_0, grad_c);
    if (grad_c.numel()) copy(grad_c_0, grad_c);
  }
}

void stepwise_forward(const CallContext& context, const Layer& p, const StepOffsets& steps, NormStepForward& step,
                      Tensor& h) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
  const Tensor w_hh_t = context.view(p.weights[0].w_hh, {D, H, GH}, {GH * H, 1, H});
  Tensor gates_h = context.allocate({D, B, GH}), factors = h;
  if (p.recurrent) {
    factors = context.allocate({D, B, H});
    multiply_by_mask(context, step, p.recurrent, h, nullptr, factors);
  }
  FirstRows rows_of_gates(context, p, gates_h, GH), rows_of_factors(context, p, factors, H);
  step.gates_h = gates_h.mutable_data_ptr();
  step.factors = p.recurrent ? factors.mutable_data_ptr() : nullptr;
  for (step.k = 0; step.k < p.steps; step.k++) {
    step.running = steps.running(step.k);
    multiply_each(rows_of_gates(step.running), rows_of_factors(step.running), w_hh_t);
    check_launch(step_forward(step, context.stream()));
  }
}

void stepwise_backward(const CallContext& context, const Layer& p, const StepOffsets& steps, NormStepBackward& step,
                       Tensor& grad_h) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
  const Tensor w_hh = context.view(p.weights[0].w_hh, {D, GH, H});
  Tensor grad_step = context.allocate({D, B, GH}), grad_factors = grad_h;
  if (p.recurrent) {
    grad_factors = context.allocate({D, B, H});
    zero(grad_factors);
  }
  FirstRows rows_of_gates(context, p, grad_step, GH), rows_of_factors(context, p, grad_factors, H);
  step.grad_step = grad_step.mutable_data_ptr();
  step.grad_factors = p.recurrent ? grad_factors.const_data_ptr() : nullptr;
  for (step.k = p.steps; step.k-- > 0;) {
    step.running = steps.running(step.k);
    check_launch(step_backward(step, context.stream()));
    multiply_each(rows_of_factors(step.running), rows_of_gates(step.running), w_hh, !p.recurrent);
  }
  if (p.recurrent) multiply_by_mask(context, step, p.recurrent, grad_factors, &grad_h, grad_h);
}

}  // namespace seqkernels
