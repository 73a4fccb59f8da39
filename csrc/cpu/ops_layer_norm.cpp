// The operators of layers with layer norm: seqkernels/layer_norm_ops.py says what they take and give.
#include <tuple>

#include "../mask_arguments.h"
#include "../names.h"
#include "isa.h"
#include "passes.h"

namespace {

using namespace seqkernels;

struct Given {
  Cell cell;
  const Tensor &gates_x, &w_hh, &scale;
  const Optional &shift, &scale_c, &shift_c;
  const Tensor& h_0;
  const Optional &c_0, &batch_sizes;
  const MaskArguments& masks;
  bool of_sum;
};

// The gradients of results, and what the forward pass left.
struct GivenBackward {
  const Optional &grad_y, &grad_h_n, &grad_c_n;
  const Tensor &y, &saved, &statistics;
};

class LayerNormArguments : public CheckedArguments {
 public:
  template <class P>  // LayerNormForward or LayerNormBackward
  LayerNormArguments(P& p, const Given& given) : CheckedArguments(given.gates_x) {
    set_sizes(p, given);
    const int64_t N = all_rows, D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
    p.norms.of_sum = given.of_sum;
    p.norms.statistics_of_row = given.scale_c ? 3 : 1;
    p.norms.gates_x = required(given.gates_x, "gates_x", {N, D, GH});
    const void* w_hh = required(given.w_hh, "w_hh", {D, GH, H});
    for (int d = 0; d < D; d++)
      p.weights[d].w_hh = w_hh ? static_cast<const char*>(w_hh) + d * GH * H * given.w_hh.element_size() : nullptr;
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
    set_steps(p, N, given.batch_sizes, true);
  }

  void set_backward(LayerNormBackward& p, const GivenBackward& given) {
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
  void set_sizes(Layer& p, const Given& given) {
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

template <class P>
void run_layer(const P& p, const Pass<P>& pass) {
  WorkingMemory memory;
  if (has_states(p)) pass(p, static_cast<int>(torch::stable::get_num_threads()), memory);
}

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

// A result with a number of elements for each row, which are zeros where no step uses the row.
Tensor allocate_rows(const Layer& p, ScalarType type, const Shape& shape) {
  Tensor result = allocate(type, shape);
  zero_rows(pointer(result), bytes_of(result), shape[0], has_states(p) ? p.rows : 0);
  return result;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward layer_norm_forward(StringHandle cell, Tensor gates_x, Tensor w_hh, Tensor scale, Optional shift,
                           Optional scale_c, Optional shift_c, Tensor h_0, Optional c_0, Optional batch_sizes,
                           Optional recurrent, Optional candidate, Optional zoneout_h, Optional zoneout_c, bool of_sum,
                           bool save, std::vector<int64_t>) {
  LayerNormForward p{};
  const MaskArguments masks{recurrent, candidate, zoneout_h, zoneout_c};
  LayerNormArguments arguments(
      p, {take_cell(cell), gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes, masks, of_sum});
  const ScalarType type = gates_x.scalar_type();
  const int64_t N = arguments.all_rows, D = p.directions, B = p.sequences, H = p.hidden, bytes = gates_x.element_size();
  Tensor y = allocate_rows(p, type, {N, D * H});
  Tensor h_n = allocate(type, {D, B, H});
  Tensor c_n = allocate(type, {D, B, c_0 ? H : 0});
  Tensor saved = allocate_rows(p, type, {N, D, save ? LayerNormArguments::saved_row(p) : 0});
  Tensor statistics = allocate_rows(p, type, {N, D, save ? p.norms.statistics_of_row : 0});
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.saved = pointer(saved);
  p.statistics = pointer(statistics);
  copy_states(arguments, p, p.h_n, p.h_0, H, bytes);
  copy_states(arguments, p, p.c_n, p.c_0, H, bytes);
  run_layer<LayerNormForward>(p, {layer_norm_kernels().forward_bytes, layer_norm_kernels().forward});
  return {y, h_n, c_n, saved, statistics};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward layer_norm_sweep_back(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor gates_x,
                               Tensor w_hh, Tensor scale, Optional shift, Optional scale_c, Optional shift_c,
                               Tensor h_0, Optional c_0, Optional batch_sizes, Optional recurrent, Optional candidate,
                               Optional zoneout_h, Optional zoneout_c, bool of_sum, Tensor y, Tensor saved,
                               Tensor statistics) {
  LayerNormBackward p{};
  const MaskArguments masks{recurrent, candidate, zoneout_h, zoneout_c};
  LayerNormArguments arguments(
      p, {take_cell(cell), gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes, masks, of_sum});
  arguments.set_backward(p, {grad_y, grad_h_n, grad_c_n, y, saved, statistics});
  const ScalarType type = gates_x.scalar_type();
  const int64_t N = arguments.all_rows, D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
  const int64_t bytes = gates_x.element_size();
  const auto parameter = [&](bool given, int64_t n) {
    Tensor grad = given ? allocate(type, {D, n}) : allocate(type, {0});
    if (!has_states(p)) zero(grad);
    return grad;
  };
  Tensor grad_sums = allocate_rows(p, type, {N, D, GH});
  Tensor grad_gates_x = of_sum ? allocate(type, {0}) : allocate_rows(p, type, {N, D, GH});
  Tensor factors = allocate_rows(p, type, {N, D, H});
  Tensor grad_scale = parameter(true, GH), grad_shift = parameter(shift.has_value(), GH);
  Tensor grad_scale_c = parameter(scale_c.has_value(), H), grad_shift_c = parameter(shift_c.has_value(), H);
  Tensor grad_h_0 = allocate(type, {D, B, H}), grad_c_0 = c_0 ? allocate(type, {D, B, H}) : allocate(type, {0});
  p.grad_sums = pointer(grad_sums);
  p.grad_gates_x = of_sum ? nullptr : pointer(grad_gates_x);
  p.factors = pointer(factors);
  p.grad_scale = pointer(grad_scale);
  p.grad_shift = pointer(grad_shift);
  p.grad_scale_c = pointer(grad_scale_c);
  p.grad_shift_c = pointer(grad_shift_c);
  p.grad_h_0 = pointer(grad_h_0);
  p.grad_c_0 = pointer(grad_c_0);
  copy_states(arguments, p, p.grad_h_0, p.grad_h_n, H, bytes);
  copy_states(arguments, p, p.grad_c_0, p.grad_c_n, H, bytes);
  run_layer<LayerNormBackward>(p, {layer_norm_kernels().backward_bytes, layer_norm_kernels().backward});
  return {grad_gates_x, grad_sums, factors, grad_scale, grad_shift, grad_scale_c, grad_shift_c, grad_h_0, grad_c_0};
}

}  // namespace

// The forward pass is the pair's of layer_norm_ops.py. The sweep is what its backward pass begins with: it gives the
// gradients of what is normalized, and h before each step as W_hh meets it, of which both are that of W_hh.
#define SEQKERNELS_LAYER_NORM                                                                                \
  "Tensor gates_x, Tensor w_hh, Tensor scale, Tensor? shift, Tensor? scale_c, Tensor? shift_c, Tensor h_0, " \
  "Tensor? c_0, Tensor? batch_sizes, Tensor? recurrent, Tensor? candidate, Tensor? zoneout_h, "              \
  "Tensor? zoneout_c, bool of_sum"

SEQKERNELS_FRAGMENT(m) {
  m.def("layer_norm_forward.cpu(str cell, " SEQKERNELS_LAYER_NORM
        ", bool save, int[] launch) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor statistics)");
  m.def("layer_norm_sweep_back(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, " SEQKERNELS_LAYER_NORM
        ", Tensor y, Tensor saved, Tensor statistics) -> (Tensor grad_gates_x, Tensor grad_sums, Tensor factors, "
        "Tensor grad_scale, Tensor grad_shift, Tensor grad_scale_c, Tensor grad_shift_c, Tensor grad_h_0, "
        "Tensor grad_c_0)");
}

SEQKERNELS_IMPL(CPU, m) {
  m.impl("layer_norm_forward.cpu", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_sweep_back", TORCH_BOX(&layer_norm_sweep_back));
}
