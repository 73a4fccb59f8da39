// The operators of layers with layer norm: seqkernels/layer_norm_ops.py says what they take and give.
#include <tuple>

#include "../layer_norm_arguments.h"
#include "../names.h"
#include "isa.h"
#include "passes.h"

namespace {

using namespace seqkernels;

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
  LayerNormArguments arguments(
      p, take_layer_norm(
             cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes,
             {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c}, of_sum));
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
                               Tensor statistics, std::vector<int64_t>) {
  LayerNormBackward p{};
  LayerNormArguments arguments(
      p, take_layer_norm(
             cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes,
             {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c}, of_sum));
  arguments.set_backward(
      p,
      {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved, .statistics = statistics});
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

SEQKERNELS_FRAGMENT(m) {
  m.def("layer_norm_forward.cpu" SEQKERNELS_LAYER_NORM_FORWARD);
  m.def("layer_norm_sweep_back" SEQKERNELS_LAYER_NORM_SWEEP_BACK);
}

SEQKERNELS_IMPL(CPU, m) {
  m.impl("layer_norm_forward.cpu", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_sweep_back", TORCH_BOX(&layer_norm_sweep_back));
}
