// Products and sums over all rows: the input projection, and the gradients of x and of the weights.
#include "host.h"

namespace seqkernels {

namespace {

// Columns of grad_gates [N, F*H], and the rows of w_ih whose gates they are of.
struct ColumnBlock {
  int64_t column = 0, row = 0, width = 0;
};

std::vector<ColumnBlock> blocks_of_x(const Layer& p) {
  // The gradients of gates whose products stay apart follow those of all gates of h.
  const int64_t all = gates_of(p.cell) * p.hidden, apart = apart_of(p.cell) * p.hidden;
  ColumnBlock added, kept_apart;
  added.width = all - apart;
  if (!apart) return {added};
  kept_apart.column = all;
  kept_apart.row = all - apart;
  kept_apart.width = apart;
  return {added, kept_apart};
}

// The gradients that a sweep gives of one direction.
class Direction {
 public:
  Direction(const CallContext& context, const Layer& p, const SweepGradients& grads, int d)
      : context_(context), N_(grads.gates.size(1)), FH_(grads.gates.size(2)), R_(p.rows) {
    gates_ = context.at(grads.gates.const_data_ptr(), d * N_ * FH_);
    if (p.has_projection) projected_ = context.at(grads.projected->const_data_ptr(), d * N_ * p.projected);
  }

  Tensor gates() const { return context_.view(gates_, {N_, FH_}); }
  Tensor columns(const ColumnBlock& block) const {
    return context_.view(context_.at(gates_, block.column), {N_, block.width}, {FH_, 1});
  }
  // Columns as rows, of the rows that steps use.
  Tensor transposed(int64_t column, int64_t width) const {
    return context_.view(context_.at(gates_, column), {width, R_}, {1, FH_});
  }
  Tensor projected_transposed(int64_t width) const { return context_.view(projected_, {width, R_}, {1, width}); }

 private:
  const CallContext& context_;
  int64_t N_, FH_, R_;
  const void *gates_, *projected_ = nullptr;
};

void multiply_grad_w_ih(const CallContext& context, const Layer& p, const Direction& grads, Tensor& grad_w_ih) {
  const Tensor inputs = context.view(p.x, {p.rows, p.input});
  for (const ColumnBlock& block : blocks_of_x(p)) {
    const void* rows = context.at(grad_w_ih.mutable_data_ptr(), block.row * p.input);
    multiply(context.view(rows, {block.width, p.input}), grads.transposed(block.column, block.width), inputs);
  }
}

// Gathers states, and writes the gradients of all biases.
void finish(const CallContext& context, const LayerBackward& p, const BackwardArgs& sweep, const SweepGradients& grads,
            const BackwardWorkspace& memory, const StepMasks& masks, Tensors& grad_weights) {
  MaskedFinishSweep finish{};
  finish.masks = masks;
  finish.layer = sweep;
  finish.h_0 = p.h_0, finish.y = p.y;
  finish.previous = memory.previous;
  if (memory.sums) {
    Tensor sums = context.view(memory.sums, {p.directions, grads.gates.size(2)});
    const Shape over_rows{1};
    count_operation();
    torch::stable::sum_out(sums, grads.gates, over_rows);
    finish.sums = memory.sums;
    finish.biases = gates_of(p.cell) * p.hidden;
    finish.folded = finish.biases - apart_of(p.cell) * p.hidden;
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

}  // namespace

ForwardWorkspace::ForwardWorkspace(Carver& carver, const CallContext& context, const Layer& p, int64_t rows,
                                   const Optional& batch_sizes, const SweepLaunch& launch)
    : steps(carver.take(StepOffsets::bytes(p, batch_sizes))),
      gates_x(carver.take(context.bytes(p.directions * rows * gates_of(p.cell) * p.hidden))),
      biases(carver.take(p.weights[0].b_ih ? context.bytes(p.directions * gates_of(p.cell) * p.hidden) : 0)),
      sweep(carver, launch) {}

BackwardWorkspace::BackwardWorkspace(Carver& carver, const CallContext& context, const Layer& p, int64_t rows,
                                     bool wants_weights, const Optional& batch_sizes, const SweepLaunch& launch)
    : steps(carver.take(StepOffsets::bytes(p, batch_sizes))),
      gates(carver.take(context.bytes(p.directions * rows * gradient_blocks_of(p.cell) * p.hidden))),
      projected(carver.take(p.has_projection ? context.bytes(p.directions * rows * p.projected) : 0)),
      previous(carver.take(wants_weights ? context.bytes(p.directions * rows * p.projected) : 0)),
      sums(carver.take(wants_weights && p.weights[0].b_ih
                           ? context.bytes(p.directions * gradient_blocks_of(p.cell) * p.hidden)
                           : 0)),
      sweep(carver, launch) {}

FoldBiases folded_biases(const Layer& p, void* folded) {
  FoldBiases fold{};
  if (!p.weights[0].b_ih) return fold;
  for (int d = 0; d < p.directions; d++) fold.b_ih[d] = p.weights[d].b_ih, fold.b_hh[d] = p.weights[d].b_hh;
  fold.result = folded;
  fold.size = gates_of(p.cell) * p.hidden;
  fold.folded = fold.size - apart_of(p.cell) * p.hidden;
  return fold;
}

void project_input(const CallContext& context, const Layer& p, int64_t rows, const ForwardWorkspace& memory) {
  const int64_t GH = gates_of(p.cell) * p.hidden;
  const Tensor inputs = context.view(p.x, {rows, p.input});
  for (int d = 0; d < p.directions; d++) {
    const Tensor result = context.view(context.at(memory.gates_x, d * rows * GH), {rows, GH});
    const Tensor w_ih = context.view(p.weights[d].w_ih, {p.input, GH}, {1, p.input});
    if (memory.biases)
      multiply_with_bias(result, context.view(context.at(memory.biases, d * GH), {GH}), inputs, w_ih);
    else
      multiply(result, inputs, w_ih);
  }
}

void multiply_grad_x(const CallContext& context, const Layer& p, const SweepGradients& grads, Tensor& grad_x) {
  bool add = false;
  for (int d = 0; d < p.directions; d++)
    for (const ColumnBlock& block : blocks_of_x(p)) {
      const void* rows = context.at(p.weights[d].w_ih, block.row * p.input);
      multiply(grad_x, Direction(context, p, grads, d).columns(block), context.view(rows, {block.width, p.input}), add);
      add = true;
    }
}

void multiply_grad_weights(const CallContext& context, const LayerBackward& p, const BackwardArgs& sweep,
                           const SweepGradients& grads, const BackwardWorkspace& memory, const StepMasks& masks,
                           Tensors& grad_weights) {
  const int64_t N = sweep.rows, R = p.rows, H = p.hidden, P = p.projected;
  finish(context, p, sweep, grads, memory, masks, grad_weights);
  for (int d = 0; d < p.directions; d++) {
    const auto of = weights_of_direction(grad_weights.data(), grad_weights.size(), p.directions, d);
    const Direction grad(context, p, grads, d);
    multiply_grad_w_ih(context, p, grad, *of.w_ih);
    const Tensor states = context.view(context.at(memory.previous, d * N * P), {R, P});
    multiply(*of.w_hh, grad.transposed(0, gates_of(p.cell) * H), states);
    if (!p.has_projection) continue;
    Tensor h = context.allocate({N, H});  // before the projection
    Unprojected recompute{};
    recompute.layer = sweep;
    recompute.direction = d;
    recompute.saved = p.saved;
    recompute.result = h.mutable_data_ptr();
    check_launch(unprojected(recompute, context.stream()));
    multiply(*of.w_hr, grad.projected_transposed(P), context.view(h.const_data_ptr(), {R, H}));
  }
}

}  // namespace seqkernels
