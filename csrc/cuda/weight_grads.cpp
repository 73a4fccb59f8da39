// Products and sums over all rows: the input projection, and the gradients of x and of the weights.
#include "host.h"

namespace seqkernels {

namespace {

// Columns of grad_gates [N, F*H], and the rows of w_ih whose gates they are of.
struct ColumnBlock {
  int64_t column, row, width;
};

std::vector<ColumnBlock> blocks_of_x(const Layer& p) {
  // The gradients of gates whose products stay apart follow those of all gates of h.
  const int64_t all = gates_of(p.cell) * p.hidden, apart = apart_of(p.cell) * p.hidden;
  if (!apart) return {{0, 0, all}};
  return {{0, 0, all - apart}, {all, all - apart, apart}};
}

// The gradients of one direction, of what a sweep has.
class Direction {
 public:
  Direction(const CallContext& context, const Layer& p, const SweepGradients& grads, int d)
      : context_(context), N_(grads.gates.size(1)), FH_(grads.gates.size(2)), R_(p.rows) {
    gates_ = context.at(grads.gates.const_data_ptr(), d * N_ * FH_);
    if (p.has_projection) projected_ = context.at(grads.projected.const_data_ptr(), d * N_ * p.projected);
  }

  Tensor gates() const { return context_.view(gates_, {N_, FH_}); }
  Tensor columns(const ColumnBlock& block) const {
    return context_.view(context_.at(gates_, block.column), {N_, block.width}, {FH_, 1});
  }
  // Of the rows that steps use.
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

void add_up_biases(const CallContext& context, const Layer& p, const Direction& grads, Tensor& grad_b_ih,
                   Tensor& grad_b_hh) {
  const Shape over_rows{0};
  const Tensor sums = torch::stable::sum(grads.gates(), over_rows);
  copy(grad_b_hh, context.view(sums.const_data_ptr(), {gates_of(p.cell) * p.hidden}));
  for (const ColumnBlock& block : blocks_of_x(p)) {
    Tensor part = context.view(context.at(grad_b_ih.mutable_data_ptr(), block.row), {block.width});
    copy(part, context.view(context.at(sums.const_data_ptr(), block.column), {block.width}));
  }
}

}  // namespace

Tensor project_input(const CallContext& context, const Layer& p, int64_t rows) {
  const int64_t GH = gates_of(p.cell) * p.hidden;
  const Tensor inputs = context.view(p.x, {rows, p.input});
  Tensor gates = context.allocate({p.directions, rows, GH});
  for (int d = 0; d < p.directions; d++) {
    const auto& w = p.weights[d];
    const Tensor result = context.view(context.at(gates.mutable_data_ptr(), d * rows * GH), {rows, GH});
    const Tensor w_ih = context.view(w.w_ih, {p.input, GH}, {1, p.input});
    if (!w.b_ih) {
      multiply(result, inputs, w_ih);
      continue;
    }
    Tensor bias = context.allocate({GH});
    const int64_t folded = GH - apart_of(p.cell) * p.hidden;
    FoldBiases fold{};
    fold.b_ih = w.b_ih, fold.b_hh = w.b_hh;
    fold.result = bias.mutable_data_ptr();
    fold.size = GH, fold.folded = folded;
    check_launch(fold_biases(fold, p.scalar, context.stream()));
    multiply_with_bias(result, bias, inputs, w_ih);
  }
  return gates;
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
                           const SweepGradients& grads, Tensors& grad_weights) {
  const int64_t N = sweep.rows, R = p.rows, H = p.hidden, P = p.projected;
  for (int d = 0; d < p.directions; d++) {
    const auto of = weights_of_direction(grad_weights.data(), grad_weights.size(), p.directions, d);
    const Direction grad(context, p, grads, d);
    multiply_grad_w_ih(context, p, grad, *of.w_ih);
    Tensor states = context.allocate({N, P});  // that steps started from
    Previous gather{};
    gather.layer = sweep;
    gather.direction = d;
    gather.h_0 = p.h_0, gather.y = p.y;
    gather.result = states.mutable_data_ptr();
    check_launch(previous(gather, context.stream()));
    multiply(*of.w_hh, grad.transposed(0, gates_of(p.cell) * H), context.view(states.const_data_ptr(), {R, P}));
    if (of.b_ih) add_up_biases(context, p, grad, *of.b_ih, *of.b_hh);
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
