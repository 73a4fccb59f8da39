// The arguments of the operator of quantized layers, checked.
#pragma once
#include "../check.h"
#include "packed_int8.h"

namespace seqkernels {

class QuantizedArguments : public CheckedArguments {
 public:
  // `p` has what all layers have in common. weights: for each layer and direction w_ih, w_hh and, with projection,
  // w_hr.
  QuantizedArguments(Layer& p, const StackArguments& arguments) : CheckedArguments(arguments.x) {
    const auto& [cell, x, weights, h_0, c_0, batch_sizes, layers, ensemble] = arguments;
    check(!ensemble, "quantized layers know no ensembles");
    check(x.scalar_type() == ScalarType::Float, "x is float32");
    check(x.dim() == 2 && h_0.dim() == 3, "x is [rows, input size] and h_0 [directions, sequences, hidden size]");
    check((states_of(cell) == 2) == c_0.has_value(), "c_0 goes with an LSTM and only with it");
    check(!c_0 || c_0->dim() == 3, "c_0 is [directions, sequences, hidden size]");
    all_ = h_0.size(0);
    p.directions = static_cast<int>(layers > 0 ? all_ / layers : 0);
    check(p.directions * layers == all_ && (p.directions == 1 || p.directions == 2), "h_0 has ", all_, " states for ",
          layers, " layers of one or two directions");
    each_ = static_cast<int64_t>(weights.size()) / all_;
    check(each_ * all_ == static_cast<int64_t>(weights.size()) && (each_ == 2 || (each_ == 3 && can_project(cell))),
          "a direction has w_ih, w_hh, and of an LSTM w_hr, got ", weights.size(), " weights for ", all_,
          " directions");
    p.cell = cell;
    p.scalar = Scalar::float32;
    p.has_projection = each_ == 3;
    input_ = x.size(1);
    p.sequences = p.states = h_0.size(1);
    p.projected = h_0.size(2);
    p.hidden = c_0 ? c_0->size(2) : p.projected;
    check(p.has_projection || p.projected == p.hidden, "h_0 has ", p.projected, " features, but the hidden size is ",
          p.hidden);
    x_ = check_contiguous(x, "x", {x.size(0), input_}).data;
    h_0_ = static_cast<const float*>(check_contiguous(h_0, "h_0", {all_, p.sequences, p.projected}).data);
    if (c_0) c_0_ = static_cast<const float*>(check_contiguous(*c_0, "c_0", {all_, p.sequences, p.hidden}).data);
    set_weights(p, weights);
    set_steps(p, x.size(0), batch_sizes, true);
  }

  // Points `p` to one layer, whose input is `y` of the layer before.
  void set_layer(Layer& p, int64_t layer, const void* y) const {
    p.x = layer ? y : x_;
    p.input = layer ? p.directions * p.projected : input_;
    std::copy_n(weights_.begin() + layer * p.directions, p.directions, p.weights);
    p.h_0 = h_0_ + layer * p.directions * p.sequences * p.projected;
    p.c_0 = c_0_ ? c_0_ + layer * p.directions * p.sequences * p.hidden : nullptr;
  }

 private:
  void set_weights(const Layer& p, const Tensors& weights) {
    const auto packed = [&](int64_t i, const char* name, int64_t groups, int64_t units, int64_t n) {
      check(n < kMaxDepth, name, " has ", n, " columns, more than int32 has room for");
      const Shape shape{panels_of(units), panel_rows(n), groups * kPanelUnits * 4};
      return check_contiguous(weights[i], name, shape, ScalarType::Char).data;
    };
    const int64_t gates = gates_of(p.cell);
    for (int64_t d = 0; d < all_; d++) {
      WeightsOf<const void*> w{};
      w.w_ih = packed(d * each_, "w_ih", gates, p.hidden, d < p.directions ? input_ : p.directions * p.projected);
      w.w_hh = packed(d * each_ + 1, "w_hh", gates, p.hidden, p.projected);
      w.w_hr = p.has_projection ? packed(d * each_ + 2, "w_hr", 1, p.projected, p.hidden) : nullptr;
      weights_.push_back(w);
    }
  }

  int64_t all_, each_, input_;  // all_: directions of all layers; each_: weights of one
  const void* x_;
  const float *h_0_, *c_0_ = nullptr;
  std::vector<WeightsOf<const void*>> weights_;  // [L*D]
};

}  // namespace seqkernels
