// The operators of the CUDA backend: checks, results, and the order in which a pass is done. Nothing waits for the GPU,
// and nothing is read again from the host's memory, so that all of it can be captured in a CUDA graph.
#include <tuple>

#include "host.h"

#ifndef SEQKERNELS_EMULATOR
#include <cuda_runtime_api.h>
#endif

namespace {

using namespace seqkernels;

// Kernels read two units at once.
CheckOptions check_options() {
  CheckOptions options;
  options.alignment = 2;
#ifdef SEQKERNELS_EMULATOR
  options.read_sizes = !emulator::sizes_on_gpu;
#endif
  return options;
}

Plan plan_of(int64_t path, int64_t tile, int64_t units) {
  check(path >= 0 && path < kPaths, "unknown path ", path, "; there are ", kPaths);
  Plan plan;
  plan.path = static_cast<Path>(path);
  plan.tile = static_cast<int>(tile);
  plan.units = static_cast<int>(units);
  return plan;
}

// Rows that no step uses are zeros; where only the GPU knows which these are, all rows are.
void zero_rows(const CallContext& context, const Layer& p, Tensor& tensor, bool ragged) {
  if (!tensor.numel() || !ragged) return;
  const int64_t rows = tensor.size(0), from = p.batch_sizes ? p.rows : 0, width = tensor.numel() / rows;
  if (from == rows) return;
  Tensor rest = context.view(context.at(tensor.mutable_data_ptr(), from * width), {rows - from, width});
  zero(rest);
}

// What the passes of a sweep have in common, but for the steps. `rows`: of x.
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

// ---- forward

struct ForwardResults {
  Tensor y, h_n, c_n, saved;
};

// No step: the final states are the initial ones.
void copy_states(ForwardResults& results, const Tensor& h_0, const Optional& c_0) {
  copy(results.h_n, h_0);
  if (c_0) copy(results.c_n, *c_0);
}

void run_forward(const CallContext& context, const Layer& p, const Plan& plan, bool tf32, const Tensor& h_0,
                 const Optional& c_0, const Optional& batch_sizes, ForwardResults& results) {
  const int64_t rows = results.y.size(0);
  ForwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, false);
  const Workspace<ForwardMemory> memory(context, context, p, rows, batch_sizes, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  sweep.gates_x = memory->gates_x;
  for (int d = 0; d < p.directions; d++) {
    const auto& w = p.weights[d];
    sweep.w_hh[d] = w.w_hh;
    const int64_t folded = (gates_of(p.cell) - apart_of(p.cell)) * p.hidden;
    sweep.b_hn[d] = apart_of(p.cell) && w.b_hh ? context.at(w.b_hh, folded) : nullptr;
  }
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0;
  sweep.y = pointer(results.y), sweep.saved = pointer(results.saved);
  sweep.h_n = pointer(results.h_n), sweep.c_n = pointer(results.c_n);
  prepare_weights(context, sweep, sweep.w_hh, launch, memory->sweep, folded_biases(p, memory->biases));
  project_input(context, p, rows, *memory);
  if (plan.path != Path::stepwise) return sweep_forward(context, launch, memory->sweep, sweep);
  copy(results.h_n, h_0);
  Tensor c = context.allocate({p.directions, p.sequences, c_0 ? p.hidden : 0}, context.accumulator_type());
  if (c_0) copy(c, *c_0);
  stepwise_forward(context, p, steps, sweep, results.h_n, c);
  if (c_0) copy(results.c_n, c);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_forward(StringHandle cell, Tensor x, Tensors weights, Tensor h_0,
                                                        Optional c_0, Optional batch_sizes, bool save, bool tf32,
                                                        int64_t path, int64_t tile, int64_t units) {
  const Cell known = take_cell(cell);  // first, so that no check leaves the string behind
  const Plan plan = plan_of(path, tile, units);
  LayerForward p{};
  CheckedArguments arguments(p, {known, x, weights, h_0, c_0, batch_sizes}, check_options());
  const CallContext context(x);
  const int64_t D = p.directions, N = x.size(0), B = p.sequences, H = p.hidden, K = saved_blocks_of(p.cell);
  ForwardResults results{context.allocate({N, D * p.projected}), context.allocate({D, B, p.projected}),
                         context.allocate({D, B, c_0 ? H : 0}), context.allocate({N, D, save ? K * H : 0})};
  zero_rows(context, p, results.y, batch_sizes.has_value());
  zero_rows(context, p, results.saved, batch_sizes.has_value());
  if (has_states(p)) {
    if (p.steps && p.rows)
      run_forward(context, p, plan, tf32, h_0, c_0, batch_sizes, results);
    else
      copy_states(results, h_0, c_0);
  }
  return {results.y, results.h_n, results.c_n, results.saved};
}

// ---- backward

struct BackwardResults {
  bool wants_x, wants_weights;
  Tensor grad_x;
  Tensors grad_weights;
  Tensor grad_h_0, grad_c_0;
};

BackwardResults allocate_results(const CallContext& context, const LayerBackward& p, const Tensor& x,
                                 const Tensors& weights, bool wants_x, bool wants_weights) {
  const int64_t D = p.directions, B = p.sequences;
  const auto like = [&](const Tensor& tensor, bool wanted) {
    const auto sizes = tensor.sizes();
    return context.allocate(wanted ? Shape(sizes.begin(), sizes.end()) : Shape{0});
  };
  BackwardResults results{wants_x,
                          wants_weights,
                          like(x, wants_x),
                          {},
                          context.allocate({D, B, p.projected}),
                          context.allocate({D, B, states_of(p.cell) > 1 ? p.hidden : 0})};
  for (const Tensor& weight : weights) results.grad_weights.push_back(like(weight, wants_weights));
  return results;
}

// The gradient of a state, if it is added to in place, begins as that of the final state: `final_grad`, or zero.
void begin_as(const CallContext& context, Tensor& grad, const void* final_grad) {
  if (!grad.numel()) return;
  const auto sizes = grad.sizes();
  if (final_grad)
    copy(grad, context.view(final_grad, Shape(sizes.begin(), sizes.end())));
  else
    zero(grad);
}

// No step: the gradients of the initial states are those of the final ones, all others zeros.
void pass_gradients(const CallContext& context, const LayerBackward& p, BackwardResults& results) {
  begin_as(context, results.grad_h_0, p.grad_h_n);
  begin_as(context, results.grad_c_0, p.grad_c_n);
  zero(results.grad_x);
  for (Tensor& grad : results.grad_weights) zero(grad);
}

// Rows that no step uses have no gradient.
SweepGradients begin_gradients(const CallContext& context, const Layer& p, int64_t rows, bool ragged,
                               const BackwardMemory& memory) {
  const int64_t D = p.directions, FH = gradient_blocks_of(p.cell) * p.hidden;
  SweepGradients grads{context.view(memory.gates, {D, rows, FH}), {}};
  if (p.has_projection) grads.projected = context.view(memory.projected, {D, rows, p.projected});
  if (ragged && !(p.batch_sizes && p.rows == rows)) {
    zero(grads.gates);
    if (grads.projected) zero(*grads.projected);
  }
  return grads;
}

void run_backward(const CallContext& context, const LayerBackward& p, const Plan& plan, bool tf32, int64_t rows,
                  const Optional& batch_sizes, BackwardResults& results) {
  BackwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, true);
  const Workspace<BackwardMemory> memory(context, context, p, rows, results.wants_weights, batch_sizes, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  const SweepGradients grads = begin_gradients(context, p, rows, batch_sizes.has_value(), *memory);
  for (int d = 0; d < p.directions; d++) sweep.w_hh[d] = p.weights[d].w_hh;
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0, sweep.y = p.y, sweep.saved = p.saved;
  sweep.grad_y = p.grad_y, sweep.grad_h_n = p.grad_h_n, sweep.grad_c_n = p.grad_c_n;
  sweep.grad_gates = memory->gates;
  sweep.grad_h_0 = pointer(results.grad_h_0), sweep.grad_c_0 = pointer(results.grad_c_0);
  if (plan.path != Path::stepwise) {
    prepare_weights(context, sweep, sweep.w_hh, launch, memory->sweep, {});
    sweep_backward(context, launch, memory->sweep, sweep);
  } else {
    begin_as(context, results.grad_h_0, p.grad_h_n);
    const auto sizes = results.grad_c_0.sizes();
    Tensor grad_c = context.allocate(Shape(sizes.begin(), sizes.end()), context.accumulator_type());
    begin_as(context, grad_c, p.grad_c_n);
    stepwise_backward(context, p, steps, sweep, grads, results.grad_h_0, grad_c);
    if (grad_c.numel()) copy(results.grad_c_0, grad_c);
  }
  if (results.wants_x) multiply_grad_x(context, p, grads, results.grad_x);
  if (results.wants_weights) multiply_grad_weights(context, p, sweep, grads, *memory, results.grad_weights);
}

std::tuple<Tensor, Tensors, Tensor, Tensor> cuda_backward(StringHandle cell, Optional grad_y, Optional grad_h_n,
                                                          Optional grad_c_n, Tensor x, Tensors weights, Tensor h_0,
                                                          Optional c_0, Optional batch_sizes, Tensor y, Tensor saved,
                                                          bool wants_x, bool wants_weights, bool tf32, int64_t path,
                                                          int64_t tile, int64_t units) {
  const Cell known = take_cell(cell);
  const Plan plan = plan_of(path, tile, units);
  LayerBackward p{};
  CheckedArguments arguments(p, {known, x, weights, h_0, c_0, batch_sizes}, check_options());
  const CallContext context(x);
  arguments.set_backward(p, {grad_y, grad_h_n, grad_c_n, y, saved});
  BackwardResults results = allocate_results(context, p, x, weights, wants_x, wants_weights);
  if (p.steps && p.rows && has_states(p))
    run_backward(context, p, plan, tf32, x.size(0), batch_sizes, results);
  else
    pass_gradients(context, p, results);
  return {results.grad_x, results.grad_weights, results.grad_h_0, results.grad_c_0};
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

// What seqkernels/backends/cuda/host.py calls: the operators of seqkernels/ops.py, and how to run them: whether float32
// factors may be rounded to TF32, and the plan of the pass (plan.h).
STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def(
      "cuda_forward(str cell, Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, bool save, "
      "bool tf32, int path, int tile, int units) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "cuda_backward(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor[] weights, "
      "Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved, bool wants_x, bool wants_weights, "
      "bool tf32, int path, int tile, int units) -> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, "
      "Tensor grad_c_0)");
  m.def("cuda_clusters() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_clusters", TORCH_BOX(&cuda_clusters));
}

#ifdef SEQKERNELS_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
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

STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def("cuda_build() -> str");
  m.def("cuda_driver() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
  m.impl("cuda_driver", TORCH_BOX(&cuda_driver));
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CUDA, m) {
#endif
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
}
