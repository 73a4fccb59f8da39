// What the operators of ops.cpp give, of all layers and of one.
#pragma once
#include "host.h"

namespace seqkernels {

// The part of one layer in a tensor of all layers, [L*D, B, *].
inline Tensor of_layer(const CallContext& context, Tensor& all, int64_t layers, int64_t layer) {
  if (layers == 1 || !all.numel()) return all;
  const Shape shape{all.size(0) / layers, all.size(1), all.size(2)};
  return context.view(context.at(all.mutable_data_ptr(), layer * (all.numel() / layers)), shape);
}

// What layers pass to each other, [N, D*P], where it is not saved: buffers that alternate, two, or as many as layers
// run at the same time.
class Between {
 public:
  Between(const CallContext& context, int64_t layers, const Wavefront& wavefront, const Layer& p, int64_t rows)
      : count_(std::min(layers - 1, std::max<int64_t>(wavefront.streams(), 2))),
        size_(SavedLayout::aligned(rows * p.directions * p.projected)) {
    if (count_) rows_ = context.allocate({count_ * size_});
  }

  void* of(const CallContext& context, int64_t layer) {
    return size_ ? context.at(rows_->mutable_data_ptr(), layer % count_ * size_) : nullptr;
  }

 private:
  int64_t count_, size_;
  Optional rows_;
};

struct ForwardResults {
  bool save;
  Tensor y, h_n, c_n, saved;

  ForwardResults(const CallContext& context, const Layer& p, int64_t layers, int64_t rows, bool save)
      : save(save),
        y(context.allocate({rows, p.directions * p.projected})),
        h_n(context.allocate({layers * p.directions, p.states, p.projected})),
        c_n(context.allocate({layers * p.directions, p.states, states_of(p.cell) > 1 ? p.hidden : 0})),
        saved(context.allocate(save ? SavedLayout(p, rows).shape(layers) : Shape{rows, p.directions, 0})) {}
};

// No step: the final states are the initial ones.
inline void copy_states(ForwardResults& results, const Tensor& h_0, const Optional& c_0) {
  copy(results.h_n, h_0);
  if (c_0) copy(results.c_n, *c_0);
}

// Memory for the gradient of a tensor; empty where the gradient is not wanted.
inline Tensor allocate_like(const CallContext& context, const Tensor& tensor, bool wanted) {
  const auto sizes = tensor.sizes();
  return context.allocate(wanted ? Shape(sizes.begin(), sizes.end()) : Shape{0});
}

struct BackwardResults {
  bool wants_x, wants_weights;
  Tensor grad_x;
  Tensors grad_weights;
  Tensor grad_h_0, grad_c_0;

  // The results of all layers.
  BackwardResults(const CallContext& context, const LayerBackward& p, int64_t layers, const Tensor& x,
                  const Tensors& weights, bool wants_x, bool wants_weights)
      : wants_x(wants_x),
        wants_weights(wants_weights),
        grad_x(allocate_like(context, x, wants_x)),
        grad_h_0(context.allocate({layers * p.directions, p.states, p.projected})),
        grad_c_0(context.allocate({layers * p.directions, p.states, states_of(p.cell) > 1 ? p.hidden : 0})) {
    for (const Tensor& weight : weights) grad_weights.push_back(allocate_like(context, weight, wants_weights));
    if (p.directions == 2) order_directions(layers);
  }

  // The part of one layer; `grad_x` is the gradient of its input.
  BackwardResults(const CallContext& context, BackwardResults& all, int64_t layers, int64_t layer, const Tensor& grad_x,
                  bool wants_x)
      : wants_x(wants_x),
        wants_weights(all.wants_weights),
        grad_x(grad_x),
        grad_h_0(of_layer(context, all.grad_h_0, layers, layer)),
        grad_c_0(of_layer(context, all.grad_c_0, layers, layer)) {
    const size_t each = all.grad_weights.size() / layers;
    const auto first = all.grad_weights.begin() + layer * each;
    grad_weights.assign(first, first + each);
  }

 private:
  // Lets the memory of the first direction lie before that of the second, as batches of both need it.
  void order_directions(int64_t layers) {
    const size_t each = grad_weights.size() / layers / 2;
    for (size_t i = 0; i < grad_weights.size(); i++)
      if (i / each % 2 == 0 && grad_weights[i + each].const_data_ptr() < grad_weights[i].const_data_ptr())
        std::swap(grad_weights[i], grad_weights[i + each]);
  }
};

// No step: the gradients of the initial states are those of the final ones, all others zeros.
inline void pass_gradients(const CallContext& context, const LayerBackward& first, BackwardResults& results) {
  begin_as(context, results.grad_h_0, first.grad_h_n);
  begin_as(context, results.grad_c_0, first.grad_c_n);
  zero(results.grad_x);
  for (Tensor& grad : results.grad_weights) zero(grad);
}

}  // namespace seqkernels
