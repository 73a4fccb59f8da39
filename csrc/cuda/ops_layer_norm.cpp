// The operators of layers with layer norm: seqkernels/layer_norm_ops.py says what they take and give. The pass is
// planned as those of ops.cpp are, in `launch`: its path, tile and units.
#include <tuple>

#include "../layer_norm_arguments.h"
#include "../names.h"
#include "host.h"

namespace {

using namespace seqkernels;

Plan plan_of(const std::vector<int64_t>& launch, const Norms& norms) {
  check(norms.blocks == 1, "there are no kernels with layer norm and blocks");
  check(launch.size() == 3, "a pass is launched by a path, a tile and units");
  return seqkernels::plan_of(launch[0], launch[1], launch[2]);
}

bool has_work(const Layer& p) { return p.steps && p.rows && has_states(p); }

void set_step(NormStep& step, const Layer& p, const Norms& norms, int64_t rows, const StepOffsets& steps) {
  set_sweep(step, p, rows, false);
  step.starts = steps.starts(), step.sizes = steps.sizes();
  step.norms = norms;
  step.masks = {.recurrent = p.recurrent,
                .candidate = p.candidate,
                .zoneout_h = p.zoneout_h,
                .zoneout_c = p.zoneout_c,
                .pieces = nullptr,
                .states = 0};
}

// All steps in one launch.
template <class Step>
void sweep(const CallContext& context, const Layer& p, const Plan& plan, Step& step) {
  const SweepLaunch launch(context, p, plan, step, step.masks, Step::backward, true);
  const Workspace<SweepWorkspace> memory(context, launch);
  for (int d = 0; d < p.directions; d++) step.w_hh[d] = p.weights[d].w_hh;
  pack_weights(context, step, step.w_hh, launch, *memory);
  if constexpr (Step::backward)
    check_launch(single_cta_backward(step, launch.shape, memory->packed, context.stream()));
  else
    check_launch(single_cta_forward(step, launch.shape, memory->packed, context.stream()));
}

// Zeros in the rows of results that no step uses.
void begin_rows(const CallContext& context, const Layer& p, const Optional& batch_sizes,
                std::initializer_list<Tensor*> results) {
  for (Tensor* rows : results)
    zero_rows(context, p, pointer(*rows), rows->numel(), rows->size(0), batch_sizes || !has_work(p));
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward layer_norm_forward(StringHandle cell, Tensor gates_x, Tensor w_hh, Tensor scale, Optional shift,
                           Optional scale_c, Optional shift_c, Tensor h_0, Optional c_0, Optional batch_sizes,
                           Optional recurrent, Optional candidate, Optional zoneout_h, Optional zoneout_c, bool of_sum,
                           bool save, std::vector<int64_t> launch) {
  LayerNormForward p{};
  const LayerNormArguments arguments(
      p,
      take_layer_norm(cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes,
                      {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c},
                      of_sum),
      check_options().read_sizes);
  const Plan plan = plan_of(launch, p.norms);
  const CallContext context(gates_x);
  const int64_t N = arguments.all_rows, D = p.directions, B = p.sequences, H = p.hidden;
  Tensor y = context.allocate({N, D * H}), h_n = context.allocate({D, B, H});
  Tensor c_n = context.allocate({D, B, c_0 ? H : 0});
  Tensor saved = context.allocate({N, D, save ? LayerNormArguments::saved_row(p) : 0});
  Tensor statistics = context.allocate({N, D, save ? p.norms.statistics_of_row : 0});
  begin_as(context, h_n, p.h_0);
  begin_as(context, c_n, p.c_0);
  begin_rows(context, p, batch_sizes, {&y, &saved, &statistics});
  if (has_work(p)) {
    Tensor memory = context.allocate({StepOffsets::bytes(p, batch_sizes)}, ScalarType::Byte);
    const StepOffsets steps(context, p, batch_sizes, pointer(memory));
    NormStepForward step{};
    set_step(step, p, p.norms, N, steps);
    step.y = pointer(y), step.saved = pointer(saved), step.statistics = pointer(statistics);
    step.h = pointer(h_n), step.c = pointer(c_n);
    if (plan.path == Path::stepwise)
      stepwise_forward(context, p, steps, step, h_n);
    else
      sweep(context, p, plan, step);
  }
  return {y, h_n, c_n, saved, statistics};
}

// From the sums over the steps of each sequence, [D, B, n], the gradient of a parameter.
Tensor added_up(const CallContext& context, const Tensor& of_sequences) {
  if (of_sequences.dim() == 1) return of_sequences;  // there is no such parameter
  Tensor result = context.allocate({of_sequences.size(0), of_sequences.size(2)});
  const Shape over_sequences{1};
  count_operation();
  torch::stable::sum_out(result, of_sequences, over_sequences);
  return result;
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward layer_norm_sweep_back(StringHandle cell, Optional grad_y, Optional grad_h_n, Optional grad_c_n, Tensor gates_x,
                               Tensor w_hh, Tensor scale, Optional shift, Optional scale_c, Optional shift_c,
                               Tensor h_0, Optional c_0, Optional batch_sizes, Optional recurrent, Optional candidate,
                               Optional zoneout_h, Optional zoneout_c, bool of_sum, Tensor y, Tensor saved,
                               Tensor statistics, std::vector<int64_t> launch) {
  LayerNormBackward p{};
  LayerNormArguments arguments(
      p,
      take_layer_norm(cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes,
                      {.recurrent = recurrent, .candidate = candidate, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c},
                      of_sum),
      check_options().read_sizes);
  arguments.set_backward(
      p,
      {.grad_y = grad_y, .grad_h_n = grad_h_n, .grad_c_n = grad_c_n, .y = y, .saved = saved, .statistics = statistics});
  const Plan plan = plan_of(launch, p.norms);
  const CallContext context(gates_x);
  const int64_t N = arguments.all_rows, D = p.directions, B = p.sequences, H = p.hidden, GH = gates_of(p.cell) * H;
  Tensor grad_gates_x = context.allocate(of_sum ? Shape{0} : Shape{N, D, GH});
  Tensor grad_sums = context.allocate({N, D, GH}), factors = context.allocate({N, D, H});
  Tensor grad_h_0 = context.allocate({D, B, H}), grad_c_0 = context.allocate(c_0 ? Shape{D, B, H} : Shape{0});
  const auto sums = [&](bool given, int64_t n) {
    Tensor of_sequences = context.allocate(given ? Shape{D, B, n} : Shape{0});
    zero(of_sequences);
    return of_sequences;
  };
  Tensor of_scale = sums(true, GH), of_shift = sums(shift.has_value(), GH);
  Tensor of_scale_c = sums(scale_c.has_value(), H), of_shift_c = sums(shift_c.has_value(), H);
  begin_as(context, grad_h_0, p.grad_h_n);
  begin_as(context, grad_c_0, p.grad_c_n);
  begin_rows(context, p, batch_sizes, {&grad_gates_x, &grad_sums, &factors});
  if (has_work(p)) {
    Tensor memory = context.allocate({StepOffsets::bytes(p, batch_sizes)}, ScalarType::Byte);
    const StepOffsets steps(context, p, batch_sizes, pointer(memory));
    NormStepBackward step{};
    set_step(step, p, p.norms, N, steps);
    step.grad_y = p.grad_y, step.h_0 = p.h_0, step.c_0 = p.c_0;
    step.y = p.y, step.saved = p.saved, step.statistics = p.statistics;
    step.grad_h = pointer(grad_h_0), step.grad_c = pointer(grad_c_0);
    step.grad_gates_x = pointer(grad_gates_x), step.grad_sums = pointer(grad_sums), step.factors = pointer(factors);
    step.grad_scale = pointer(of_scale), step.grad_shift = pointer(of_shift);
    step.grad_scale_c = pointer(of_scale_c), step.grad_shift_c = pointer(of_shift_c);
    if (plan.path == Path::stepwise)
      stepwise_backward(context, p, steps, step, grad_h_0);
    else
      sweep(context, p, plan, step);
  }
  return {grad_gates_x,
          grad_sums,
          factors,
          added_up(context, of_scale),
          added_up(context, of_shift),
          added_up(context, of_scale_c),
          added_up(context, of_shift_c),
          grad_h_0,
          grad_c_0};
}

}  // namespace

SEQKERNELS_FRAGMENT(m) {
  m.def("cuda_layer_norm_forward" SEQKERNELS_LAYER_NORM_FORWARD);
  m.def("cuda_layer_norm_sweep_back" SEQKERNELS_LAYER_NORM_SWEEP_BACK);
}

#ifdef SEQKERNELS_EMULATOR
SEQKERNELS_IMPL(CPU, m) {
#else
SEQKERNELS_IMPL(CUDA, m) {
#endif
  m.impl("cuda_layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("cuda_layer_norm_sweep_back", TORCH_BOX(&layer_norm_sweep_back));
}
