// The operators of the CUDA backend: checks, results, and the order in which a pass is done. Nothing waits for the GPU,
// and nothing is read again from the host's memory, so that all of it can be captured in a CUDA graph.
#include <tuple>

#include "../mask_arguments.h"
#include "../names.h"
#include "host.h"
#include "results.h"

#ifndef SEQKERNELS_EMULATOR
#include <cuda_runtime_api.h>
#endif

namespace seqkernels {

void set_sweep(SweepArgs& sweep, const Layer& p, int64_t rows, bool tf32) {
  sweep.cell = p.cell;
  sweep.scalar = p.scalar;
  sweep.tf32 = tf32;
  sweep.directions = p.directions;
  sweep.steps = p.steps;
  sweep.sequences = p.sequences;
  sweep.rows = rows;
  sweep.hidden = p.hidden;
  sweep.projected = p.projected;
}

void zero_rows(const CallContext& context, const Layer& p, void* data, int64_t elements, int64_t rows, bool ragged) {
  if (!data || !elements || !ragged) return;
  const int64_t from = p.batch_sizes ? p.rows : 0, width = elements / rows;
  if (from == rows) return;
  Tensor rest = context.view(context.at(data, from * width), {rows - from, width});
  zero(rest);
}

Plan plan_of(int64_t path, int64_t tile, int64_t units) {
  check(path >= 0 && path < kPaths, "unknown path ", path, "; there are ", kPaths);
  Plan plan;
  plan.path = static_cast<Path>(path);
  plan.tile = static_cast<int>(tile);
  plan.units = static_cast<int>(units);
  return plan;
}

void begin_as(const CallContext& context, Tensor& state, const void* initial) {
  if (!state.numel()) return;
  const auto sizes = state.sizes();
  if (initial)
    copy(state, context.view(initial, Shape(sizes.begin(), sizes.end())));
  else
    zero(state);
}

}  // namespace seqkernels

namespace {

using namespace seqkernels;

StepMasks checked_masks(const MaskArguments& masks, Layer& p, const Tensor& x) {
  check(!masks.any() || !p.has_projection, "there are no kernels with masks and a projection");
  masks.check_for(p, x);
  masks.set(p);
  return {.recurrent = masks.pointer(masks.recurrent),
          .candidate = masks.pointer(masks.candidate),
          .zoneout_h = masks.pointer(masks.zoneout_h),
          .zoneout_c = masks.pointer(masks.zoneout_c),
          .pieces = nullptr,
          .states = 0};
}

// Pieces whose numbers seqkernels/backends/side_by_side.py has checked: nobody here reads what is on a GPU.
StepMasks checked_pieces(CheckedArguments& arguments, Layer& p, const Optional& pieces) {
  check(!p.has_projection, "there are no kernels with pieces and a projection");
  StepMasks masks{};
  arguments.set_pieces_unread(p, *pieces);
  masks.pieces = p.pieces;
  masks.states = p.states;
  return masks;
}

// ---- forward

// Where layer `l` writes its results.
void set_results(const CallContext& context, LayerForward& p, const CheckedArguments& arguments, int64_t l,
                 ForwardResults& results, Between& between, bool ragged) {
  const int64_t rows = results.y.size(0), D = p.directions, C = p.states;
  const SavedLayout layout(p, rows);
  void* saved = results.save ? pointer(results.saved) : nullptr;
  p.y = l == arguments.layers() - 1 ? pointer(results.y)
        : results.save              ? arguments.at(saved, layout.y_of(l))
                                    : between.of(context, l);
  p.saved = layout.blocks ? arguments.at(saved, layout.blocks_of(l)) : nullptr;
  p.h_n = arguments.at(pointer(results.h_n), l * D * C * p.projected);
  p.c_n = arguments.at(pointer(results.c_n), l * D * C * p.hidden);
  zero_rows(context, p, p.y, layout.y, rows, ragged);
  zero_rows(context, p, p.saved, layout.blocks, rows, ragged);
}

// The arguments of a sweep through one layer.
void set_layer(ForwardArgs& sweep, const LayerForward& p) {
  for (int d = 0; d < p.directions; d++) {
    const auto& w = p.weights[d];
    sweep.w_hh[d] = w.w_hh, sweep.b_ih[d] = w.b_ih, sweep.b_hh[d] = w.b_hh;
  }
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0;
  sweep.y = p.y, sweep.saved = p.saved;
  sweep.h_n = p.h_n, sweep.c_n = p.c_n;
}

void run_forward(const CallContext& context, LayerForward& p, const CheckedArguments& arguments, const Plan& plan,
                 bool tf32, const Optional& batch_sizes, const StepMasks& masks, ForwardResults& results) {
  const int64_t rows = results.y.size(0), L = arguments.layers();
  ForwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, masks, false);
  const Workspace<ForwardWorkspace> memory(context, context, p, rows, batch_sizes, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  SavedLayout(p, rows).each_gap(results.save ? L : 1, [&](int64_t begin, int64_t end) {
    Tensor gap = context.view(context.at(pointer(results.saved), begin), {end - begin});
    zero(gap);
  });
  Between between(context, results.save ? 1 : L, p, rows);
  for (int64_t l = 0; l < L; l++) {
    if (l) arguments.set_layer(p, l, p.y);
    set_results(context, p, arguments, l, results, between, batch_sizes.has_value());
    set_layer(sweep, p);
    pack_weights(context, sweep, sweep.w_hh, launch, memory->sweep);
    project_input(context, p, rows, *memory, sweep);
    Tensor h_n = of_layer(context, results.h_n, L, l), c_n = of_layer(context, results.c_n, L, l);
    if (masks.pieces) {  // those without rows keep their states
      begin_as(context, h_n, p.h_0);
      begin_as(context, c_n, p.c_0);
    }
    if (plan.path != Path::stepwise) {
      sweep_forward(context, launch, memory->sweep, sweep, masks);
    } else {
      stepwise_forward(context, p, steps, sweep, masks, h_n, c_n);
    }
  }
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Forward forward(const StackArguments& given, bool save, bool tf32, const Plan& plan, const Optional& pieces,
                const MaskArguments& masks = {}) {
  LayerForward p{};
  CheckedArguments arguments(p, given, check_options().with(pieces, given.batch_sizes));
  const CallContext context(given.x);
  const StepMasks of_steps = pieces ? checked_pieces(arguments, p, pieces) : checked_masks(masks, p, given.x);
  ForwardResults results(context, p, given.layers, given.x.size(0), save);
  if (p.steps && p.rows && has_states(p)) {
    run_forward(context, p, arguments, plan, tf32, given.batch_sizes, of_steps, results);
  } else {
    zero(results.y);
    zero(results.saved);
    if (p.states && (p.hidden || p.projected)) copy_states(results, given.h_0, given.c_0);
  }
  return {results.y, results.h_n, results.c_n, results.saved};
}

Forward cuda_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes,
                     bool save, bool tf32, int64_t path, int64_t tile, int64_t units, int64_t layers, Optional pieces) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers);
  return forward(given, save, tf32 && !pieces, plan_of(path, tile, units), pieces);
}

// One layer with masks.
Forward cuda_masked_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0, Optional c_0,
                            Optional batch_sizes, Optional recurrent, Optional candidate, Optional zoneout_h,
                            Optional zoneout_c, bool save, int64_t path, int64_t tile, int64_t units) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, 1);
  return forward(given, save, false, plan_of(path, tile, units), {},
                 {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c});
}

// ---- backward

// Rows that no step uses have no gradient.
SweepGradients begin_gradients(const CallContext& context, const Layer& p, int64_t rows, bool ragged,
                               const BackwardWorkspace& memory) {
  const int64_t D = p.directions, FH = stored_gradients_of(p.cell) * p.hidden;
  SweepGradients grads(context.view(memory.gates, {D, rows, FH}));
  if (p.has_projection) grads.projected = context.view(memory.projected, {D, rows, p.projected});
  if (ragged && !(p.batch_sizes && p.rows == rows)) {
    zero(grads.gates);
    if (grads.projected) zero(*grads.projected);
  }
  return grads;
}

// The arguments of a sweep back through one layer.
void set_layer(BackwardArgs& sweep, const LayerBackward& p, BackwardResults& results) {
  for (int d = 0; d < p.directions; d++) sweep.w_hh[d] = p.weights[d].w_hh;
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0, sweep.y = p.y, sweep.saved = p.saved;
  sweep.grad_y = p.grad_y, sweep.grad_h_n = p.grad_h_n, sweep.grad_c_n = p.grad_c_n;
  sweep.grad_h_0 = pointer(results.grad_h_0), sweep.grad_c_0 = pointer(results.grad_c_0);
}

void run_backward(const CallContext& context, LayerBackward& p, const CheckedArguments& arguments, const Plan& plan,
                  bool tf32, int64_t rows, const Optional& batch_sizes, const StepMasks& masks,
                  BackwardResults& results) {
  const int64_t L = arguments.layers();
  BackwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, masks, true);
  const Workspace<BackwardWorkspace> memory(context, context, p, rows, results.wants_weights, batch_sizes, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  const SweepGradients grads = begin_gradients(context, p, rows, batch_sizes.has_value(), *memory);
  sweep.grad_gates = memory->gates;
  Between between(context, L, p, rows);
  for (int64_t l = L; l-- > 0;) {
    arguments.set_layer_backward(p, l);
    const Tensor grad_x = l ? context.view(between.of(context, l), {rows, p.input}) : results.grad_x;
    BackwardResults own(context, results, L, l, grad_x, l || results.wants_x);
    set_layer(sweep, p, own);
    if (masks.pieces) {
      begin_as(context, own.grad_h_0, p.grad_h_n);
      begin_as(context, own.grad_c_0, p.grad_c_n);
    }
    if (plan.path != Path::stepwise) {
      pack_weights(context, sweep, sweep.w_hh, launch, memory->sweep);
      sweep_backward(context, launch, memory->sweep, sweep, masks);
    } else {
      stepwise_backward(context, p, steps, sweep, masks, grads, own.grad_h_0, own.grad_c_0);
    }
    if (own.wants_x) multiply_grad_x(context, p, grads, own.grad_x);
    if (own.wants_weights) multiply_grad_weights(context, p, sweep, grads, *memory, masks, own.grad_weights);
    if (l) p.grad_y = own.grad_x.const_data_ptr();
  }
}

using Backward = std::tuple<Tensor, Tensors, Tensor, Tensor>;

Backward backward(const StackArguments& given, const BackwardArguments& of_backward, bool wants_x, bool wants_weights,
                  bool tf32, const Plan& plan, const Optional& pieces, const MaskArguments& masks = {}) {
  LayerBackward p{};
  CheckedArguments arguments(p, given, check_options().with(pieces, given.batch_sizes));
  const CallContext context(given.x);
  const StepMasks of_steps = pieces ? checked_pieces(arguments, p, pieces) : checked_masks(masks, p, given.x);
  arguments.set_backward(p, of_backward);
  BackwardResults results(context, p, given.layers, given.x, given.weights, wants_x, wants_weights);
  if (p.steps && p.rows && has_states(p))
    run_backward(context, p, arguments, plan, tf32, given.x.size(0), given.batch_sizes, of_steps, results);
  else
    pass_gradients(context, p, results);
  return {results.grad_x, results.grad_weights, results.grad_h_0, results.grad_c_0};
}

Backward cuda_backward(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor x,
                       Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes, Tensor y, Tensor saved,
                       bool wants_x, bool wants_weights, bool tf32, int64_t path, int64_t tile, int64_t units,
                       int64_t layers, Optional pieces) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers);
  return backward(given, {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved},
                  wants_x, wants_weights, tf32 && !pieces, plan_of(path, tile, units), pieces);
}

Backward cuda_masked_backward(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor x,
                              Tensors weights, Tensor h_0, Optional c_0, Optional batch_sizes, Optional recurrent,
                              Optional candidate, Optional zoneout_h, Optional zoneout_c, Tensor y, Tensor saved,
                              bool wants_x, bool wants_weights, int64_t path, int64_t tile, int64_t units) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, 1);
  return backward(given, {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved},
                  wants_x, wants_weights, false, plan_of(path, tile, units), {},
                  {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c});
}

// Of clusters of 1, 2, ... 16 blocks, how many the current GPU runs at the same time: 0 where it has no code for them.
std::vector<int64_t> cuda_clusters() {
  std::vector<int64_t> counts;
  for (int blocks = 1; blocks <= kMaxCluster; blocks++) {
    int clusters = 0;
    counts.push_back(clusters_at_once(blocks, clusters) ? 0 : clusters);
  }
  return counts;
}

}  // namespace

#define SEQKERNELS_PASS "int path, int tile, int units"

// What seqkernels/backends/cuda/host.py calls. Beside the arguments of the operators in seqkernels/ops.py: whether
// float32 factors may be rounded to TF32, but for kernels with pieces, which multiply them as they are, and the plan of
// the pass (plan.h).
SEQKERNELS_FRAGMENT(m) {
  m.def("cuda_forward" SEQKERNELS_FORWARD_SCHEMA("", "bool tf32, " SEQKERNELS_PASS SEQKERNELS_OF_STACK));
  m.def("cuda_backward" SEQKERNELS_BACKWARD_SCHEMA("", "bool tf32, " SEQKERNELS_PASS SEQKERNELS_OF_STACK));
  // By the masked_forward and masked_backward of seqkernels/masked_ops.py. float32 is multiplied as it is.
  m.def("cuda_masked_forward" SEQKERNELS_FORWARD_SCHEMA(SEQKERNELS_MASKS, SEQKERNELS_PASS));
  m.def("cuda_masked_backward" SEQKERNELS_BACKWARD_SCHEMA(SEQKERNELS_MASKS, SEQKERNELS_PASS));
  m.def("cuda_clusters() -> int[]");
}

SEQKERNELS_IMPL(CompositeExplicitAutograd, m) { m.impl("cuda_clusters", TORCH_BOX(&cuda_clusters)); }

#ifdef SEQKERNELS_EMULATOR
SEQKERNELS_IMPL(CPU, m) {
#else
// nvcc's version, and what it compiled for: sm_80, compute_80, ...; to be read as well where the library does not load.
__attribute__((used)) static const char kBuild[] = SEQKERNELS_CUDA_BUILD;
static std::string cuda_build() { return kBuild; }

// The newest CUDA that the driver knows: 1000 times its major and 10 times its minor number; 0 without a driver.
static int64_t cuda_driver() {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  check(error == cudaSuccess, "CUDA does not say what its driver knows: ", cudaGetErrorString(error));
  return version;
}

SEQKERNELS_FRAGMENT(m) {
  m.def("cuda_build() -> str");
  m.def("cuda_driver() -> int");
}

SEQKERNELS_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
  m.impl("cuda_driver", TORCH_BOX(&cuda_driver));
}

SEQKERNELS_IMPL(CUDA, m) {
#endif
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
  m.impl("cuda_masked_forward", TORCH_BOX(&cuda_masked_forward));
  m.impl("cuda_masked_backward", TORCH_BOX(&cuda_masked_backward));
}
