// The operators of the CPU backend: checks, allocation, sharing the work among threads.
#include <tuple>

#include "../check.h"
#include "isa.h"
#include "memory.h"
#include "schedule.h"

namespace {

using namespace seqkernels;

// Run a pass over a layer on as many threads as torch uses.
template <class P>
void run(const P& p, int64_t (*bytes)(const P&, const Schedule&),
         void (*pass)(const P&, const Schedule&, int begin, int end, void* memory)) {
  const OwnSchedule schedule(p, static_cast<int>(torch::stable::get_num_threads()));
  const size_t size = static_cast<size_t>(bytes(p, schedule));
  WorkingMemory memory(size);
  if (schedule.members == 1) return pass(p, schedule, 0, 1, memory.data());
  torch::stable::parallel_for(0, schedule.members, 1, [&](int64_t begin, int64_t end) {
    pass(p, schedule, static_cast<int>(begin), static_cast<int>(end), memory.data());
  });
}

// Rows that no step uses are zeros.
void zero_rows(Tensor& tensor, int64_t from) {
  if (!tensor.numel() || tensor.size(0) == from) return;
  const int64_t bytes = tensor.numel() / tensor.size(0) * static_cast<int64_t>(tensor.element_size());
  memset(static_cast<char*>(tensor.mutable_data_ptr()) + from * bytes, 0, (tensor.size(0) - from) * bytes);
}

void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

// `launch` is for backends whose plan says more than that they run.
std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0,
                                                              Optional c_0, Optional batch_sizes, bool save,
                                                              std::vector<int64_t> /*launch*/) {
  LayerForward p{};
  CheckedArguments arguments(p, {take_cell(cell), x, weights, h_0, c_0, batch_sizes});
  p.bfloat16_products = bfloat16_products();
  const int64_t D = p.directions, K = save ? saved_blocks_of(p.cell) : 0;
  Tensor y = allocate(x.scalar_type(), Shape{x.size(0), D * p.projected});
  Tensor h_n = allocate(x.scalar_type(), Shape{D, p.sequences, p.projected});
  Tensor c_n = allocate(x.scalar_type(), Shape{D, p.sequences, c_0 ? p.hidden : 0});
  Tensor saved = allocate(x.scalar_type(), Shape{x.size(0), D, K * p.hidden});
  zero_rows(y, p.rows);
  zero_rows(saved, p.rows);
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.saved = pointer(saved);
  const Kernels& kernels = seqkernels::kernels();
  if (has_states(p)) run(p, kernels.forward_bytes, kernels.forward);
  return {y, h_n, c_n, saved};
}

// Results for the gradients of the weights, to which the kernel is pointed if it runs.
Tensors allocate_grad_weights(LayerBackward& p, const Tensors& weights, bool wanted) {
  Tensors grads;
  p.wants_weights = wanted && p.rows && has_states(p);
  for (const Tensor& weight : weights) {
    const auto sizes = weight.sizes();
    grads.push_back(allocate(weight.scalar_type(), wanted ? Shape(sizes.begin(), sizes.end()) : Shape{0}));
    if (!p.wants_weights) zero_rows(grads.back(), 0);
  }
  const auto pointer_if = [](Tensor* tensor) { return tensor ? pointer(*tensor) : nullptr; };
  for (int d = 0; p.wants_weights && d < p.directions; d++) {
    const auto of = weights_of_direction(grads.data(), grads.size(), p.directions, d);
    p.grad_weights[d] = {pointer_if(of.w_ih), pointer_if(of.w_hh), pointer_if(of.b_ih), pointer_if(of.b_hh),
                         pointer_if(of.w_hr)};
  }
  return grads;
}

std::tuple<Tensor, Tensors, Tensor, Tensor> recurrence_backward(StringHandle cell, Optional grad_y, Optional grad_h_n,
                                                                Optional grad_c_n, Tensor x, Tensors weights,
                                                                Tensor h_0, Optional c_0, Optional batch_sizes,
                                                                Tensor y, Tensor saved, bool wants_x,
                                                                bool wants_weights, std::vector<int64_t> /*launch*/) {
  LayerBackward p{};
  CheckedArguments arguments(p, {take_cell(cell), x, weights, h_0, c_0, batch_sizes});
  arguments.set_backward(p, {grad_y, grad_h_n, grad_c_n, y, saved});
  p.bfloat16_products = bfloat16_products();
  const int64_t D = p.directions, B = p.sequences;
  Tensor grad_x = allocate(x.scalar_type(), wants_x ? Shape{x.size(0), p.input} : Shape{0});
  Tensor grad_h_0 = allocate(x.scalar_type(), Shape{D, B, p.projected});
  Tensor grad_c_0 = allocate(x.scalar_type(), Shape{D, B, c_0 ? p.hidden : 0});
  Tensors grad_weights = allocate_grad_weights(p, weights, wants_weights);
  if (wants_x) zero_rows(grad_x, has_states(p) ? p.rows : 0);
  p.wants_x = wants_x;
  p.grad_x = pointer(grad_x);
  p.grad_h_0 = pointer(grad_h_0);
  p.grad_c_0 = pointer(grad_c_0);
  const Kernels& kernels = seqkernels::kernels();
  if (has_states(p)) run(p, kernels.backward_bytes, kernels.backward);
  return {grad_x, grad_weights, grad_h_0, grad_c_0};
}

}  // namespace

// seqkernels/ops.py defines the operators, and explains every argument.
STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  m.impl("recurrence_forward.cpu", TORCH_BOX(&recurrence_forward));
  m.impl("recurrence_backward.cpu", TORCH_BOX(&recurrence_backward));
}
