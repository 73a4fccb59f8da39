// Products and sums over all rows: the input projection, and the gradients of x and of the weights.
#include "host.h"

namespace seqkernels {

namespace {

// The matrices of both directions as a batch, `distance` elements apart; of one direction its own.
Tensor directions_of(const CallContext& context, const Layer& p, const void* first, int64_t distance,
                     const Shape& shape, const Shape& strides) {
  if (p.directions == 1) return context.view(first, shape, strides);
  return context.view(first, {p.directions, shape[0], shape[1]}, {distance, strides[0], strides[1]});
}

// The same of matrices that have memory of their own each, in this order: a product of a batch asks only for a stride,
// and between them it reads and writes nothing.
Tensor directions_at(const CallContext& context, const Layer& p, const void* first, const void* second,
                     const Shape& shape, const Shape& strides) {
  return directions_of(context, p, first, context.elements_between(first, second), shape, strides);
}

// One product for each direction, in one launch or in one for each.
void multiply_directions(const Layer& p, const Tensor& result, const Tensor& a, const Tensor& b,
                         bool one_launch = true) {
  if (p.directions == 1) return multiply(result, a, b);
  if (one_launch) return multiply_each(result, a, b);
  const auto of = [](const Tensor& both, int d) { return torch::stable::select(both, 0, d); };
  for (int d = 0; d < p.directions; d++) multiply(of(result, d), of(a, d), of(b, d));
}

// The gradient of a weight is small, and a sum over rows: of many, cuBLAS divides those of one product among
// multiprocessors, but not those of a batch, and launches are not what they cost.
constexpr int64_t kRowsOfOneLaunch = 4096;

// The gradients that a sweep gives, [D, N, F*H].
class Gates {
 public:
  Gates(const CallContext& context, const Layer& p, const SweepGradients& grads)
      : context_(context), p_(p), grads_(grads.gates), N_(grads_.size(1)), FH_(grads_.size(2)) {}

  // Those of the gates of h, or of x, of one direction.
  Tensor of_x(int d) const { return context_.view(at(d, x()), {N_, GH()}, {FH_, 1}); }
  // Columns as rows, of the rows that steps use, of all directions.
  Tensor of_x_transposed() const { return transposed(x()); }
  Tensor of_h_transposed() const { return transposed(0); }

 private:
  int64_t GH() const { return gates_of(p_.cell) * p_.hidden; }
  int64_t x() const { return FH_ - GH(); }
  const void* at(int d, int64_t column) const { return context_.at(grads_.const_data_ptr(), d * N_ * FH_ + column); }
  Tensor transposed(int64_t column) const {
    return directions_of(context_, p_, at(0, column), N_ * FH_, {GH(), p_.rows}, {1, FH_});
  }

  const CallContext& context_;
  const Layer& p_;
  const Tensor& grads_;
  int64_t N_, FH_;
};

// Gathers states, and adds up the gradients of all biases.
void finish(const CallContext& context, const LayerBackward& p, const BackwardArgs& sweep,
            const BackwardWorkspace& memory, const StepMasks& masks, Tensors& grad_weights) {
  MaskedFinishSweep finish{};
  finish.masks = masks;
  finish.layer = sweep;
  finish.h_0 = p.h_0, finish.y = p.y;
  finish.previous = memory.previous;
  if (p.weights[0].b_ih) {
    finish.grad_gates = sweep.grad_gates;
    finish.gates = gates_of(p.cell) * p.hidden;
    finish.columns = stored_gradients_of(p.cell) * p.hidden;
    for (int d = 0; d < p.directions; d++) {
      const auto of = weights_of_direction(grad_weights.data(), grad_weights.size(), p.directions, d);
      finish.grad_b_ih[d] = of.b_ih->mutable_data_ptr();
      finish.grad_b_hh[d] = of.b_hh->mutable_data_ptr();
    }
  }
  check_launch(masks.recurrent || masks.pieces
                   ? finish_sweep(finish, context.stream())
                   : finish_sweep(static_cast<const FinishSweep&>(finish), context.stream()));
}

// The gradient of w_hr: of the projection of what is made again.
void multiply_grad_w_hr(const CallContext& context, const LayerBackward& p, const BackwardArgs& sweep,
                        const SweepGradients& grads, int d, Tensor& grad_w_hr) {
  const int64_t N = sweep.rows, R = p.rows, H = p.hidden, P = p.projected;
  Tensor h = context.allocate({N, H});  // before the projection
  Unprojected recompute{};
  recompute.layer = sweep;
  recompute.direction = d;
  recompute.saved = p.saved;
  recompute.result = h.mutable_data_ptr();
  check_launch(unprojected(recompute, context.stream()));
  const void* projected = context.at(grads.projected->const_data_ptr(), d * N * P);
  multiply(grad_w_hr, context.view(projected, {P, R}, {1, P}), context.view(h.const_data_ptr(), {R, H}));
}

}  // namespace

States::States(Carver& carver, const CallContext& context, const Layer& p, const Wavefront& wavefront) {
  const int64_t bytes = wavefront.chunks() > 1 ? context.bytes(p.sequences * p.hidden) : 0;
  for (int i = 0; i < 2; i++) {
    h[i] = carver.take(bytes);
    c[i] = carver.take(states_of(p.cell) > 1 ? bytes : 0);
  }
}

ForwardWorkspace::ForwardWorkspace(Carver& carver, const CallContext& context, const Layer& p,
                                   const Wavefront& wavefront, const SweepLaunch& launch)
    : gates_x(carver.take(context.bytes(p.directions * wavefront.rows_of_chunk() * gates_of(p.cell) * p.hidden))),
      between(carver, context, p, wavefront),
      sweep(carver, launch) {}

BackwardWorkspace::BackwardWorkspace(Carver& carver, const CallContext& context, const Layer& p,
                                     const Wavefront& wavefront, int64_t rows, bool wants_weights,
                                     const SweepLaunch& launch)
    : gates(carver.take(context.bytes(p.directions * rows * stored_gradients_of(p.cell) * p.hidden))),
      projected(carver.take(p.has_projection ? context.bytes(p.directions * rows * p.projected) : 0)),
      previous(carver.take(wants_weights ? context.bytes(p.directions * rows * p.projected) : 0)),
      c(carver.take(states_of(p.cell) > 1 ? context.bytes((wavefront.chunks() - 1) * p.sequences * p.hidden) : 0)),
      between(carver, context, p, wavefront),
      sweep(carver, launch) {}

void project_input(const CallContext& context, const Layer& p, int64_t rows, const ForwardWorkspace& memory,
                   ForwardArgs& sweep) {
  const int64_t GH = gates_of(p.cell) * p.hidden;
  const void *forth = p.weights[0].w_ih, *back = p.weights[1].w_ih;
  const bool swapped = p.directions == 2 && context.elements_between(forth, back) < 0;
  if (swapped) std::swap(forth, back);
  sweep.gates_x = memory.gates_x;
  sweep.first_direction = swapped;
  multiply_directions(p, directions_of(context, p, memory.gates_x, rows * GH, {rows, GH}, {GH, 1}),
                      directions_of(context, p, p.x, 0, {rows, p.input}, {p.input, 1}),
                      directions_at(context, p, forth, back, {p.input, GH}, {1, p.input}));
}

void multiply_grad_x(const CallContext& context, const Layer& p, const SweepGradients& grads, Tensor& grad_x) {
  const Shape shape{gates_of(p.cell) * p.hidden, p.input};
  for (int d = 0; d < p.directions; d++)
    multiply(grad_x, Gates(context, p, grads).of_x(d), context.view(p.weights[d].w_ih, shape), d > 0);
}

void multiply_grad_weights(const CallContext& context, const LayerBackward& p, const BackwardArgs& sweep,
                           const SweepGradients& grads, const BackwardWorkspace& memory, const StepMasks& masks,
                           Tensors& grad_weights) {
  const int64_t GH = gates_of(p.cell) * p.hidden, I = p.input, P = p.projected;
  finish(context, p, sweep, memory, masks, grad_weights);
  const auto of = [&](int d) {
    return weights_of_direction(grad_weights.data(), grad_weights.size(), p.directions, d);
  };
  const Gates gates(context, p, grads);
  const int last = p.directions - 1;
  const bool one_launch = p.rows <= kRowsOfOneLaunch;
  const auto results = [&](const Tensor& first, const Tensor& second, int64_t columns) {
    return directions_at(context, p, first.const_data_ptr(), second.const_data_ptr(), {GH, columns}, {columns, 1});
  };
  multiply_directions(p, results(*of(0).w_ih, *of(last).w_ih, I), gates.of_x_transposed(),
                      directions_of(context, p, p.x, 0, {p.rows, I}, {I, 1}), one_launch);
  multiply_directions(p, results(*of(0).w_hh, *of(last).w_hh, P), gates.of_h_transposed(),
                      directions_of(context, p, memory.previous, sweep.rows * P, {p.rows, P}, {P, 1}), one_launch);
  for (int d = 0; p.has_projection && d < p.directions; d++)
    multiply_grad_w_hr(context, p, sweep, grads, d, *of(d).w_hr);
}

}  // namespace seqkernels
