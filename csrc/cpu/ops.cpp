// The operators of the CPU backend: checks, allocation, sharing the work among threads.
#include "ops.h"

#include "../names.h"
#include "isa.h"
#include "kept_weights.h"
#include "passes.h"
#include "quantized_arguments.h"

namespace seqkernels {

namespace {

// A pass over all layers, of every member of an ensemble where there is one, on as many threads as torch uses.
// set(p, member, i) points p to what the i-th layer that runs takes and gives.
template <class P, class Set>
void run(const P& p, int64_t members, int64_t layers, const Pass<P>& pass, const Set& set) {
  const auto run_members = [&](int64_t begin, int64_t end, int threads) {
    P own = p;
    WorkingMemory memory;
    for (int64_t member = begin; member < end; member++)
      for (int64_t i = 0; i < layers; i++) {
        set(own, member, i);
        if (has_states(own)) pass(own, threads, memory);
      }
  };
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const int64_t alone = members_alone(p, members, layers, threads), at_once = std::min<int64_t>(alone, threads);
  if (alone)
    torch::stable::parallel_for(0, at_once, 1, [&](int64_t begin, int64_t end) {
      run_members(alone * begin / at_once, alone * end / at_once, 1);
    });
  if (alone < members) run_members(alone, members, threads);
}

// What the layers of a member hand to each other, [N, D*P], where nobody keeps it: that of the last two.
class Between {
 public:
  Between(ScalarType type, int64_t members, int64_t layers, const Layer& p, int64_t rows) {
    if (layers > 1)
      rows_ = allocate(type, {members, std::min<int64_t>(layers - 1, 2), rows * p.directions * p.projected});
  }

  void* of(int64_t member, int64_t layer) {
    if (!rows_ || !rows_->numel()) return nullptr;
    const int64_t bytes = rows_->size(2) * static_cast<int64_t>(rows_->element_size()), kept = rows_->size(1);
    return static_cast<char*>(rows_->mutable_data_ptr()) + (member * kept + layer % kept) * bytes;
  }

 private:
  Optional rows_;
};

// A result of member `member` of `members`, from an element of it on.
void* of_member(Tensor& tensor, int64_t member, int64_t members, int64_t element = 0) {
  const int64_t first = member * (static_cast<int64_t>(tensor.numel()) / members) + element;
  void* data = pointer(tensor);
  return data ? static_cast<char*>(data) + first * static_cast<int64_t>(tensor.element_size()) : nullptr;
}
void* of_member(Optional& tensor, int64_t member, int64_t members, int64_t element = 0) {
  return tensor ? of_member(*tensor, member, members, element) : nullptr;
}

// How products are to be made: as the machine can, and the plan of the call allows.
void set_products(Layer& p, const Launch& launch) {
  p.bfloat16_products = bfloat16_products();
  p.bfloat16_tiles = bfloat16_tiles();
  p.bfloat16_parts = launch.empty() ? 0 : static_cast<int>(launch[0]);
  p.as_among_others = launch.size() > 1 && launch[1];
}

// For packed weights that stay.
void* memory_in(FromSlot& slot, int64_t layer, const PackedLayout& layout) {
  KeptWeights* const weights = layout.bytes ? slot.weights() : nullptr;
  return weights ? weights->of_layer(layer, layout) : nullptr;
}

// What one layer with options has besides; none of them of a plain one.
void set_masks(Layer& p, const MaskArguments& masks, const Tensor& x) {
  masks.check_for(p, x);
  masks.set(p);
}

}  // namespace

Results forward(const StackArguments& given, bool save, const Launch& launch, const Optional& pieces,
                const MaskArguments& masks, bool empty) {
  LayerForward p{};
  CheckedArguments arguments(p, given, CheckOptions{}.with(pieces, given.batch_sizes));
  arguments.set_pieces(p, pieces);
  set_masks(p, masks, given.x);
  set_products(p, launch);
  const ScalarType type = given.x.scalar_type();
  const int64_t N = arguments.rows(), D = p.directions, L = given.layers, C = p.states, H = p.hidden;
  const int64_t P = p.projected, M = arguments.members();
  const SavedLayout layout(p, N);
  Tensor y = allocate(type, arguments.of_all({N, D * P}));
  Tensor h_n = allocate(type, arguments.of_all({L * D, C, P}));
  Optional c_n, saved;
  if (given.c_0 || empty) c_n = allocate(type, arguments.of_all({L * D, C, given.c_0 ? H : 0}));
  if (save || empty) saved = allocate(type, arguments.of_all(save ? layout.shape(L) : Shape{N, D, 0}));
  Between between(type, M, save ? 1 : L, p, N);
  FromSlot kept(M == 1 && launch.size() > 2 ? launch[2] : 0);
  const int64_t bytes = given.x.element_size();
  const auto set = [&](LayerForward& p, int64_t m, int64_t l) {
    if (!l)
      layout.each_gap(save ? L : 1, [&](int64_t begin, int64_t end) {
        memset(of_member(saved, m, M, begin), 0, (end - begin) * bytes);
      });
    arguments.set_layer(p, l, p.y, m);
    p.y = l == L - 1 ? of_member(y, m, M) : save ? of_member(saved, m, M, layout.y_of(l)) : between.of(m, l);
    p.h_n = of_member(h_n, m, M, l * D * C * P);
    p.c_n = of_member(c_n, m, M, l * D * C * H);
    copy_states(arguments, p, p.h_n, p.h_0, P, bytes);
    copy_states(arguments, p, p.c_n, p.c_0, H, bytes);
    p.saved = layout.blocks ? of_member(saved, m, M, layout.blocks_of(l)) : nullptr;
    p.kept = kept ? memory_in(kept, l, kernels().packed_layout(p)) : nullptr;
    zero_rows(p.y, layout.y * bytes, N, p.rows);
    zero_rows(p.saved, layout.blocks * bytes, N, p.rows);
  };
  run<LayerForward>(p, M, L, {kernels().forward_bytes, kernels().forward}, set);
  return {y, h_n, c_n, saved};
}

namespace {

// Results for the gradients of the weights of all layers.
Tensors allocate_grad_weights(const LayerBackward& p, const Tensors& weights, const Shape& unwanted, bool wanted) {
  Tensors grads;
  for (const Tensor& weight : weights) {
    const auto sizes = weight.sizes();
    grads.push_back(allocate(weight.scalar_type(), wanted ? Shape(sizes.begin(), sizes.end()) : unwanted));
    if (!p.wants_weights) zero(grads.back());
  }
  return grads;
}

// Points the kernel to those of one layer of a member.
void set_grad_weights(LayerBackward& p, int64_t layers, int64_t layer, Tensors& grads, int64_t member,
                      int64_t members) {
  const auto pointer_if = [&](Tensor* tensor) { return tensor ? of_member(*tensor, member, members) : nullptr; };
  const int all = static_cast<int>(layers) * p.directions, first = static_cast<int>(layer) * p.directions;
  for (int d = 0; p.wants_weights && d < p.directions; d++) {
    const auto of = weights_of_direction(grads.data(), grads.size(), all, first + d);
    p.grad_weights[d] = {.w_ih = pointer_if(of.w_ih),
                         .w_hh = pointer_if(of.w_hh),
                         .b_ih = pointer_if(of.b_ih),
                         .b_hh = pointer_if(of.b_hh),
                         .w_hr = pointer_if(of.w_hr)};
  }
}

}  // namespace

Backward backward(const StackArguments& given, const BackwardArguments& of_backward, bool wants_x, bool wants_weights,
                  const Launch& launch, const Optional& pieces, const MaskArguments& masks) {
  LayerBackward p{};
  CheckedArguments arguments(p, given, CheckOptions{}.with(pieces, given.batch_sizes));
  arguments.set_pieces(p, pieces);
  set_masks(p, masks, given.x);
  arguments.set_backward(p, of_backward);
  set_products(p, launch);
  p.wants_weights = wants_weights && p.rows && has_states(p);
  const ScalarType type = given.x.scalar_type();
  const int64_t N = arguments.rows(), D = p.directions, L = given.layers, C = p.states, H = p.hidden;
  const int64_t P = p.projected, M = arguments.members(), bytes = given.x.element_size();
  const Shape unwanted = arguments.of_all({0});
  Tensor grad_x = allocate(type, wants_x ? arguments.of_all({N, p.input}) : unwanted);
  Tensor grad_h_0 = allocate(type, arguments.of_all({L * D, C, P}));
  Tensor grad_c_0 = allocate(type, arguments.of_all({L * D, C, given.c_0 ? H : 0}));
  Tensors grad_weights = allocate_grad_weights(p, given.weights, unwanted, wants_weights);
  Between between(type, M, L, p, N);
  const auto set = [&](LayerBackward& p, int64_t m, int64_t i) {
    const int64_t l = L - 1 - i;
    if (i) p.grad_y = p.grad_x;
    arguments.set_layer_backward(p, l, m);
    set_grad_weights(p, L, l, grad_weights, m, M);
    p.wants_x = l || wants_x;
    p.grad_x = l ? between.of(m, l) : of_member(grad_x, m, M);
    p.grad_h_0 = of_member(grad_h_0, m, M, l * D * C * P);
    p.grad_c_0 = of_member(grad_c_0, m, M, l * D * C * H);
    copy_states(arguments, p, p.grad_h_0, p.grad_h_n, P, bytes);
    copy_states(arguments, p, p.grad_c_0, p.grad_c_n, H, bytes);
    zero_rows(p.grad_x, N * p.input * bytes, N, has_states(p) ? p.rows : 0);
  };
  run<LayerBackward>(p, M, L, {kernels().backward_bytes, kernels().backward}, set);
  return {grad_x, grad_weights, grad_h_0, grad_c_0};
}

}  // namespace seqkernels

namespace {

using namespace seqkernels;

// As operators give them.
Forward all(const Results& results) {
  const auto& [y, h_n, c_n, saved] = results;
  return {y, h_n, c_n.value(), saved.value()};
}

template <bool ensemble>
Forward recurrence_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes,
                           bool save, Launch launch, int64_t layers, Optional pieces) {
  return all(forward(take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers, ensemble), save, launch, pieces));
}

template <bool ensemble>
Backward recurrence_backward(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor x,
                             Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes, Tensor y, Tensor saved,
                             bool wants_x, bool wants_weights, Launch launch, int64_t layers, Optional pieces) {
  return backward(take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers, ensemble),
                  {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved}, wants_x,
                  wants_weights, launch, pieces);
}

// A stack of quantized layers, for inference: weights are packed int8 (seqkernels/quantized.py), all else float32. y is
// that of the last layer; where `c` is wanted, those of all layers, and c their c of every row.
std::tuple<Tensor, Tensor, Tensor> run_quantized(const StackArguments& given, Optional* c) {
  LayerForward p{};
  const QuantizedArguments arguments(p, given);
  p.int8_products = int8_products();
  p.int8_tiles = int8_tiles();
  const int64_t N = given.x.size(0), D = p.directions, L = given.layers, B = p.sequences, H = p.hidden, P = p.projected;
  constexpr int64_t bytes = sizeof(float);
  Tensor y = allocate(ScalarType::Float, c ? Shape{L, N, D * P} : Shape{N, D * P});
  Tensor h_n = allocate(ScalarType::Float, Shape{L * D, B, P});
  Tensor c_n = allocate(ScalarType::Float, Shape{L * D, B, given.c_0 ? H : 0});
  if (c) *c = allocate(ScalarType::Float, Shape{L, N, given.c_0 ? D * H : 0});
  const auto of_layer = [&](Tensor& of, int64_t layer, int64_t size) {
    return of.numel() ? static_cast<float*>(of.mutable_data_ptr()) + layer * size : nullptr;
  };
  Between between(ScalarType::Float, 1, c ? 1 : L, p, N);
  const QuantizedKernels& kernels = seqkernels::quantized_kernels();
  run(p, 1, L, Pass<LayerForward>{kernels.bytes, kernels.forward}, [&](LayerForward& own, int64_t, int64_t l) {
    arguments.set_layer(own, l, own.y);
    own.y = c ? of_layer(y, l, N * D * P) : l == L - 1 ? pointer(y) : between.of(0, l);
    own.saved = c ? of_layer(**c, l, N * D * H) : nullptr;
    own.h_n = of_layer(h_n, l, D * B * P);
    own.c_n = of_layer(c_n, l, D * B * H);
    copy_states(arguments, own, own.h_n, own.h_0, P, bytes);
    copy_states(arguments, own, own.c_n, own.c_0, H, bytes);
    zero_rows(own.y, N * D * P * bytes, N, p.rows);
    zero_rows(own.saved, N * D * H * bytes, N, p.rows);
  });
  return {y, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor> quantized_recurrence(StringHandle cell, Tensor x, Tensors weights, Tensor h_0,
                                                        Optional c_0, Optional batch_sizes, int64_t layers) {
  return run_quantized(take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers), nullptr);
}

Forward quantized_all_states(StringHandle cell, Tensor x, Tensors weights, Tensor h_0, Optional c_0,
                             Optional batch_sizes, int64_t layers) {
  Optional c;
  const auto [y, h_n, c_n] = run_quantized(take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers), &c);
  return {y, h_n, c_n, *c};
}

Forward masked_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes,
                       Optional recurrent, Optional candidate, Optional zoneout_h, Optional zoneout_c, bool save,
                       Launch launch) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, 1);
  return all(forward(given, save, launch, std::nullopt,
                     {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c}));
}

Backward masked_backward(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor x,
                         Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes, Optional recurrent,
                         Optional candidate, Optional zoneout_h, Optional zoneout_c, Tensor y, Tensor saved,
                         bool wants_x, bool wants_weights, Launch launch) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, 1);
  return backward(given, {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved},
                  wants_x, wants_weights, launch, std::nullopt,
                  {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c});
}

}  // namespace

// The schema is that of every backend (seqkernels/ops.py, which explains every argument). That of this one stands here,
// so that programs without Python find it: they load this library, and run packages of AOTInductor.
#define SEQKERNELS_FORWARD SEQKERNELS_FORWARD_SCHEMA("", "int[] launch=[]" SEQKERNELS_OF_STACK)
#define SEQKERNELS_BACKWARD SEQKERNELS_BACKWARD_SCHEMA("", "int[] launch=[]" SEQKERNELS_OF_STACK)

SEQKERNELS_FRAGMENT(m) {
  m.def("recurrence_forward.cpu" SEQKERNELS_FORWARD);
  m.def("recurrence_backward.cpu" SEQKERNELS_BACKWARD);
  m.def("recurrence_forward.cpu_ensemble" SEQKERNELS_FORWARD);
  m.def("recurrence_backward.cpu_ensemble" SEQKERNELS_BACKWARD);
  // By seqkernels/quantized.py, which explains its arguments.
  m.def("quantized_recurrence(str cell, " SEQKERNELS_STACK "int layers=1) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def("quantized_all_states(str cell, " SEQKERNELS_STACK
        "int layers=1) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c)");
  // One layer with masks (seqkernels/masked_ops.py, whose schema this is).
  m.def("masked_forward.cpu" SEQKERNELS_FORWARD_SCHEMA(SEQKERNELS_MASKS, "int[] launch"));
  m.def("masked_backward.cpu" SEQKERNELS_BACKWARD_SCHEMA(SEQKERNELS_MASKS, "int[] launch"));
}

SEQKERNELS_IMPL(CPU, m) {
  m.impl("recurrence_forward.cpu", TORCH_BOX(&recurrence_forward<false>));
  m.impl("recurrence_backward.cpu", TORCH_BOX(&recurrence_backward<false>));
  m.impl("recurrence_forward.cpu_ensemble", TORCH_BOX(&recurrence_forward<true>));
  m.impl("recurrence_backward.cpu_ensemble", TORCH_BOX(&recurrence_backward<true>));
  m.impl("quantized_recurrence", TORCH_BOX(&quantized_recurrence));
  m.impl("quantized_all_states", TORCH_BOX(&quantized_all_states));
  m.impl("masked_forward.cpu", TORCH_BOX(&masked_forward));
  m.impl("masked_backward.cpu", TORCH_BOX(&masked_backward));
}
