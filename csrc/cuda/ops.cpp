// The operators of the CUDA backend: checks, results, and the order in which a pass is done. Nothing waits for the GPU,
// and nothing is read again from the host's memory, so that all of it can be captured in a CUDA graph.
#include <limits>
#include <tuple>

#include "../mask_arguments.h"
#include "../names.h"
#include "stack.h"

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

Plan plan_of(int64_t path, int64_t tile, int64_t units, int64_t chunks) {
  check(path >= 0 && path < kPaths, "unknown path ", path, "; there are ", kPaths);
  check(chunks > 0, "steps go in one chunk or more, got ", chunks);
  Plan plan;
  plan.path = static_cast<Path>(path);
  plan.tile = static_cast<int>(tile);
  plan.units = static_cast<int>(units);
  plan.chunks = static_cast<int>(std::min<int64_t>(chunks, std::numeric_limits<int>::max()));
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
                     bool save, bool tf32, int64_t path, int64_t tile, int64_t units, int64_t chunks, int64_t layers,
                     Optional pieces) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers);
  return forward(given, save, tf32 && !pieces, plan_of(path, tile, units, chunks), pieces);
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
                       int64_t chunks, int64_t layers, Optional pieces) {
  const StackArguments given = take_stack(cell, x, weights, h_0, c_0, batch_sizes, layers);
  return backward(given, {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved},
                  wants_x, wants_weights, tf32 && !pieces, plan_of(path, tile, units, chunks), pieces);
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
  m.def("cuda_forward" SEQKERNELS_FORWARD_SCHEMA("", "bool tf32, " SEQKERNELS_PASS ", int chunks" SEQKERNELS_OF_STACK));
  m.def(
      "cuda_backward" SEQKERNELS_BACKWARD_SCHEMA("", "bool tf32, " SEQKERNELS_PASS ", int chunks" SEQKERNELS_OF_STACK));
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
