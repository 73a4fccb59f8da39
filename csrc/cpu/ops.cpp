// The operators of the CPU backend: checks, allocation, sharing the work among threads.
#include <tuple>

#include "../check.h"
#include "../names.h"
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

// Rows that no step uses are zeros; of `rows` rows of `bytes` bytes in all.
void zero_rows(void* data, int64_t bytes, int64_t rows, int64_t from) {
  if (!data || !bytes || rows == from) return;
  const int64_t row = bytes / rows;
  memset(static_cast<char*>(data) + from * row, 0, (rows - from) * row);
}

void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

void zero(Tensor& tensor) {
  if (tensor.numel()) memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
}

// What layers hand to each other, [N, D*P], where nobody keeps it: that of the last two.
class Between {
 public:
  Between(ScalarType type, int64_t layers, const Layer& p, int64_t rows)
      : rows_(allocate(type, {std::min<int64_t>(layers - 1, 2), rows * p.directions * p.projected})) {}

  void* of(int64_t layer) {
    const int64_t bytes = rows_.size(1) * static_cast<int64_t>(rows_.element_size());
    return rows_.numel() ? static_cast<char*>(rows_.mutable_data_ptr()) + layer % rows_.size(0) * bytes : nullptr;
  }

 private:
  Tensor rows_;
};

// `launch` [1]: Layer::bfloat16_parts (seqkernels/backends/cpu.py).
std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0,
                                                              Optional c_0, Optional batch_sizes, bool save,
                                                              std::vector<int64_t> launch, int64_t layers) {
  LayerForward p{};
  const CheckedArguments arguments(p, {take_cell(cell), x, weights, h_0, c_0, batch_sizes, layers});
  p.bfloat16_products = bfloat16_products();
  p.bfloat16_tiles = bfloat16_tiles();
  p.bfloat16_parts = launch.empty() ? 0 : static_cast<int>(launch[0]);
  const ScalarType type = x.scalar_type();
  const int64_t N = x.size(0), D = p.directions, L = layers, B = p.sequences, H = p.hidden, P = p.projected;
  const SavedLayout layout(p, N);
  Tensor y = allocate(type, Shape{N, D * P});
  Tensor h_n = allocate(type, Shape{L * D, B, P});
  Tensor c_n = allocate(type, Shape{L * D, B, c_0 ? H : 0});
  Tensor saved = allocate(type, save ? layout.shape(L) : Shape{N, D, 0});
  Between between(type, save ? 1 : L, p, N);
  const int64_t bytes = x.element_size();
  layout.each_gap(save ? L : 1, [&](int64_t begin, int64_t end) {
    memset(arguments.at(pointer(saved), begin), 0, (end - begin) * bytes);
  });
  for (int64_t l = 0; l < L; l++) {
    if (l) arguments.set_layer(p, l, p.y);
    p.y = l == L - 1 ? pointer(y) : save ? arguments.at(pointer(saved), layout.y_of(l)) : between.of(l);
    p.h_n = arguments.at(pointer(h_n), l * D * B * P);
    p.c_n = arguments.at(pointer(c_n), l * D * B * H);
    p.saved = layout.blocks ? arguments.at(pointer(saved), layout.blocks_of(l)) : nullptr;
    zero_rows(p.y, layout.y * bytes, N, p.rows);
    zero_rows(p.saved, layout.blocks * bytes, N, p.rows);
    const Kernels& kernels = seqkernels::kernels();
    if (has_states(p)) run(p, kernels.forward_bytes, kernels.forward);
  }
  return {y, h_n, c_n, saved};
}

// Results for the gradients of the weights of all layers.
Tensors allocate_grad_weights(const LayerBackward& p, const Tensors& weights, bool wanted) {
  Tensors grads;
  for (const Tensor& weight : weights) {
    const auto sizes = weight.sizes();
    grads.push_back(allocate(weight.scalar_type(), wanted ? Shape(sizes.begin(), sizes.end()) : Shape{0}));
    if (!p.wants_weights) zero(grads.back());
  }
  return grads;
}

// Points the kernel to those of one layer.
void set_grad_weights(LayerBackward& p, int64_t layers, int64_t layer, Tensors& grads) {
  const auto pointer_if = [](Tensor* tensor) { return tensor ? pointer(*tensor) : nullptr; };
  const int all = static_cast<int>(layers) * p.directions, first = static_cast<int>(layer) * p.directions;
  for (int d = 0; p.wants_weights && d < p.directions; d++) {
    const auto of = weights_of_direction(grads.data(), grads.size(), all, first + d);
    p.grad_weights[d] = {pointer_if(of.w_ih), pointer_if(of.w_hh), pointer_if(of.b_ih), pointer_if(of.b_hh),
                         pointer_if(of.w_hr)};
  }
}

std::tuple<Tensor, Tensors, Tensor, Tensor> recurrence_backward(StringHandle cell, Optional grad_y, Optional grad_h_n,
                                                                Optional grad_c_n, Tensor x, Tensors weights,
                                                                Tensor h_0, Optional c_0, Optional batch_sizes,
                                                                Tensor y, Tensor saved, bool wants_x,
                                                                bool wants_weights, std::vector<int64_t> launch,
                                                                int64_t layers) {
  LayerBackward p{};
  CheckedArguments arguments(p, {take_cell(cell), x, weights, h_0, c_0, batch_sizes, layers});
  arguments.set_backward(p, {grad_y, grad_h_n, grad_c_n, y, saved});
  p.bfloat16_products = bfloat16_products();
  p.bfloat16_tiles = bfloat16_tiles();
  p.bfloat16_parts = launch.empty() ? 0 : static_cast<int>(launch[0]);
  p.wants_weights = wants_weights && p.rows && has_states(p);
  const ScalarType type = x.scalar_type();
  const int64_t N = x.size(0), D = p.directions, L = layers, B = p.sequences, H = p.hidden, P = p.projected;
  Tensor grad_x = allocate(type, wants_x ? Shape{N, p.input} : Shape{0});
  Tensor grad_h_0 = allocate(type, Shape{L * D, B, P});
  Tensor grad_c_0 = allocate(type, Shape{L * D, B, c_0 ? H : 0});
  Tensors grad_weights = allocate_grad_weights(p, weights, wants_weights);
  Between between(type, L, p, N);
  for (int64_t l = L; l-- > 0;) {
    if (l < L - 1) p.grad_y = p.grad_x;
    arguments.set_layer_backward(p, l);
    set_grad_weights(p, L, l, grad_weights);
    p.wants_x = l || wants_x;
    p.grad_x = l ? between.of(l) : pointer(grad_x);
    p.grad_h_0 = arguments.at(pointer(grad_h_0), l * D * B * P);
    p.grad_c_0 = arguments.at(pointer(grad_c_0), l * D * B * H);
    zero_rows(p.grad_x, N * p.input * x.element_size(), N, has_states(p) ? p.rows : 0);
    const Kernels& kernels = seqkernels::kernels();
    if (has_states(p)) run(p, kernels.backward_bytes, kernels.backward);
  }
  return {grad_x, grad_weights, grad_h_0, grad_c_0};
}

}  // namespace

// The schema is that of every backend (seqkernels/ops.py, which explains every argument). That of this one stands here,
// so that programs without Python find it: they load this library, and run packages of AOTInductor.
SEQKERNELS_FRAGMENT(m) {
  m.def(
      "recurrence_forward.cpu(str cell, Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, "
      "bool save, int[] launch=[], int layers=1) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "recurrence_backward.cpu(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, "
      "Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved, bool wants_x, "
      "bool wants_weights, int[] launch=[], int layers=1) "
      "-> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, Tensor grad_c_0)");
}

SEQKERNELS_IMPL(CPU, m) {
  m.impl("recurrence_forward.cpu", TORCH_BOX(&recurrence_forward));
  m.impl("recurrence_backward.cpu", TORCH_BOX(&recurrence_backward));
}
