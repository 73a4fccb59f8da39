// The arguments of the operators of layers with layer norm (seqkernels/layer_norm_ops.py says what they are), checked.
#pragma once
#include "mask_arguments.h"

#define SEQKERNELS_LAYER_NORM                                                                                \
  "Tensor gates_x, Tensor w_hh, Tensor scale, Tensor? shift, Tensor? scale_c, Tensor? shift_c, Tensor h_0, " \
  "Tensor? c_0, Tensor? batch_sizes, " SEQKERNELS_MASKS "bool of_sum"

// The forward pass is the pair's of layer_norm_ops.py. The sweep is what its backward pass begins with: it gives the
// gradients of what is normalized, and h before each step as W_hh meets it, of which both are that of W_hh.
#define SEQKERNELS_LAYER_NORM_FORWARD \
  "(str cell, " SEQKERNELS_LAYER_NORM \
  ", bool save, int[] launch) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor statistics)"
#define SEQKERNELS_LAYER_NORM_SWEEP_BACK                                                                   \
  "(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, " SEQKERNELS_LAYER_NORM                  \
  ", Tensor y, Tensor saved, Tensor statistics, int[] launch) -> (Tensor grad_gates_x, Tensor grad_sums, " \
  "Tensor factors, Tensor grad_scale, Tensor grad_shift, Tensor grad_scale_c, Tensor grad_shift_c, "       \
  "Tensor grad_h_0, Tensor grad_c_0)"

namespace seqkernels {

struct LayerNormGiven {
  Cell cell;
  const Tensor &gates_x, &w_hh, &scale;
  const Optional &shift, &scale_c, &shift_c;
  const Tensor& h_0;
  const Optional &c_0, &batch_sizes;
  MaskArguments masks;
  bool of_sum;
};

// As take_stack().
inline LayerNormGiven take_layer_norm(StringHandle cell, const Tensor& gates_x, const Tensor& w_hh, const Tensor& scale,
                                      const Optional& shift, const Optional& scale_c, const Optional& shift_c,
                                      const Tensor& h_0, const Optional& c_0, const Optional& batch_sizes,
                                      const MaskArguments& masks, bool of_sum) {
  return {.cell = take_cell(cell),
          .gates_x = gates_x,
          .w_hh = w_hh,
          .scale = scale,
          .shift = shift,
          .scale_c = scale_c,
          .shift_c = shift_c,
          .h_0 = h_0,
          .c_0 = c_0,
          .batch_sizes = batch_sizes,
          .masks = masks,
          .of_sum = of_sum};
}

// The gradients of results, and what the forward pass left.
struct LayerNormGivenBackward {
  const Optional &grad_y, &grad_h_n, &grad_c_n;
  const Tensor &y, &saved, &statistics;
};

class LayerNormArguments : public CheckedArguments {
 public:
  template <class P>  // LayerNormForward or LayerNormBackward
  LayerNormArguments(P& p, const LayerNormGiven& given, bool read_sizes = true) : CheckedArguments(given.gates_x) {
    set_sizes(p, given);
    const int64_t N = all_rows, D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
    p.norms.of_sum = given.of_sum;
    p.norms.statistics_of_row = given.scale_c ? 3 : 1;
    p.norms.gates_x = required(given.gates_x, "gates_x", {N, D, GH});
    const int64_t units = given.w_hh.dim() == 3 ? given.w_hh.size(2) : H;  // of a block
    p.norms.blocks = H && units && H % units == 0 ? H / units : 1;
    const void* w_hh = required(given.w_hh, "w_hh", {D, GH, H / p.norms.blocks});
    for (int d = 0; d < D; d++)
      p.weights[d].w_hh = w_hh ? static_cast<const char*>(w_hh) + d * GH * units * given.w_hh.element_size() : nullptr;
    p.norms.scale = required(given.scale, "scale", {D, GH});
    p.norms.shift = optional(given.shift, "shift", {D, GH});
    p.norms.scale_c = optional(given.scale_c, "scale_c", {D, H});
    p.norms.shift_c = optional(given.shift_c, "shift_c", {D, H});
    p.h_0 = required(given.h_0, "h_0", {D, B, H});
    p.c_0 = optional(given.c_0, "c_0", {D, B, H});
    given.masks.check_for(p, given.gates_x);
    given.masks.set(p);
    check(states_of(p.cell) == 2 || !given.scale_c, "scale_c goes with an LSTM only");
    check(given.scale_c || !given.shift_c, "shift_c goes with scale_c");
    set_steps(p, N, given.batch_sizes, read_sizes);
  }

  void set_backward(LayerNormBackward& p, const LayerNormGivenBackward& given) {
    const int64_t N = all_rows, D = p.directions, B = p.sequences, H = p.hidden;
    p.grad_y = optional(given.grad_y, "grad_y", {N, D * H});
    p.grad_h_n = optional(given.grad_h_n, "grad_h_n", {D, B, H});
    p.grad_c_n = p.c_0 ? optional(given.grad_c_n, "grad_c_n", {D, B, H}) : nullptr;
    p.y = required(given.y, "y", {N, D * H});
    p.saved = required(given.saved, "saved", {N, D, saved_row(p)});
    p.statistics = required(given.statistics, "statistics", {N, D, p.norms.statistics_of_row});
  }

  static int64_t saved_row(const Layer& p) { return (gates_of(p.cell) + states_of(p.cell) - 1) * p.hidden; }

  int64_t all_rows;  // of gates_x; steps may use fewer

 private:
  void set_sizes(Layer& p, const LayerNormGiven& given) {
    const auto &x = given.gates_x, &h_0 = given.h_0;
    const ScalarType type = x.scalar_type();
    check(type == ScalarType::Float || type == ScalarType::Double, "layer norm is computed in float32 or float64");
    check(x.dim() == 3 && h_0.dim() == 3,
          "gates_x is [rows, directions, gates * hidden size] and h_0 [directions, sequences, hidden size]");
    check((states_of(given.cell) == 2) == given.c_0.has_value(), "c_0 goes with an LSTM and only with it");
    p.cell = given.cell;
    p.scalar = scalar_of(type);
    all_rows = x.size(0);
    p.directions = static_cast<int>(h_0.size(0));
    check(p.directions == 1 || p.directions == 2, "an RNN has one or two directions, got ", p.directions);
    p.sequences = p.states = h_0.size(1);
    p.hidden = p.projected = h_0.size(2);
  }
  const void* required(const Tensor& tensor, const char* name, const Shape& shape) {
    const void* data = check_contiguous(tensor, name, shape).data;
    return tensor.numel() ? data : nullptr;
  }
  const void* optional(const Optional& tensor, const char* name, const Shape& shape) {
    return tensor ? required(*tensor, name, shape) : nullptr;
  }
};

}  // namespace seqkernels
