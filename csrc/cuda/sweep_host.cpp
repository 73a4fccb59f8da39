// The paths that take all steps in one launch: checks of the plan, and the memory that the CTAs share.
#include "host.h"

namespace seqkernels {

namespace {

// Raises an error if the plan does not fit the layer or the GPU.
LaunchShape checked_shape(const CallContext& context, const Layer& p, const Plan& plan, bool tf32, bool masked,
                          bool backward, bool layer_norm) {
  const Gpu gpu = context.gpu();
  LayerFacts facts{};
  facts.cell = p.cell;
  facts.scalar = p.scalar;
  facts.tf32 = tf32;
  facts.has_projection = p.has_projection;
  facts.directions = p.directions;
  facts.hidden = p.hidden;
  facts.sequences = p.sequences;
  facts.masked = masked;
  facts.layer_norm = layer_norm;
  const std::string reason = reason_against(plan, facts, gpu, backward);
  if (!reason.empty()) check_launch(reason.c_str());
  LaunchShape shape{};
  shape.arch = arch_of(gpu.target);
  shape.tile = plan.tile;
  shape.units = plan.units;
  shape.shared_memory = gpu.shared_memory;
  return shape;
}

// The exchanges of the persistent grid begin without tags: the memory may have those of a call before, or of the last
// time that a CUDA graph ran.
void clear_tags(const CallContext& context, const SweepLaunch& launch, const SweepWorkspace& memory) {
  Tensor exchange = context.view(memory.exchange, {launch.groups.bytes}, {1}, ScalarType::Byte);
  zero(exchange);
}

SingleCtaLayout layout_of(const SweepLaunch& launch, const SweepArgs& sweep) {
  const Math math = math_of(sweep.scalar, sweep.tf32);
  const Variant variant = variant_of(launch.shape.arch, sweep.cell, math, launch.backward, launch.hidden % 2 == 0);
  const int width = single_cta_width(math, launch.hidden);
  if (launch.shape.tile == 1 && !launch.masked && !launch.layer_norm) return one_sequence_layout(variant, width);
  return single_cta_layout(variant, width, launch.masked, launch.layer_norm);
}

template <class Masked, class Args>
Masked with_masks(const Args& sweep, const StepMasks& masks) {
  Masked masked{};
  static_cast<Args&>(masked) = sweep;
  masked.masks = masks;
  return masked;
}

}  // namespace

SweepLaunch::SweepLaunch(const CallContext& context, const Layer& p, const Plan& plan, const SweepArgs& sweep,
                         const StepMasks& masks, bool backward, bool layer_norm)
    : path(plan.path),
      backward(backward),
      masked(masks.any()),
      layer_norm(layer_norm),
      hidden(masked || layer_norm ? as_odd(p.hidden) : p.hidden) {
  if (path == Path::stepwise) return;
  shape = checked_shape(context, p, plan, sweep.tf32, masked, backward, layer_norm);
  if (path == Path::single_cta) {
    layout = layout_of(*this, sweep);
    packed_bytes = p.directions * layout.packed_bytes(shape.shared_memory);
  }
  if (path == Path::persistent_grid) check_launch(persistent_grid_groups(sweep, shape, backward, groups));
}

SweepWorkspace::SweepWorkspace(Carver& carver, const SweepLaunch& launch)
    : packed(carver.take(launch.packed_bytes)), exchange(carver.take(launch.groups.bytes)) {}

void pack_weights(const CallContext& context, const SweepArgs& sweep, const void* const (&w_hh)[2],
                  const SweepLaunch& launch, const SweepWorkspace& memory) {
  if (!launch.packed_bytes) return;
  PackWeights pack{};
  std::copy_n(w_hh, 2, pack.w_hh);
  pack.packed = memory.packed;
  pack.gates = gates_of(sweep.cell);
  pack.hidden = static_cast<int>(sweep.hidden);
  pack.width = launch.layout.width;
  pack.first_group = launch.layout.first_packed(launch.shape.shared_memory);
  pack.vec16s = static_cast<int>(launch.layout.packed_bytes(launch.shape.shared_memory) / 16);
  pack.m_tiles = launch.layout.m_tiles;
  pack.transposed = launch.backward;
  pack.tf32 = sweep.tf32;
  check_launch(pack_weights(pack, sweep.scalar, sweep.directions, context.stream()));
}

void sweep_forward(const CallContext& context, const SweepLaunch& launch, const SweepWorkspace& memory,
                   const ForwardArgs& sweep, const StepMasks& masks) {
  if (launch.masked) {
    const auto masked = with_masks<MaskedForwardArgs>(sweep, masks);
    check_launch(single_cta_forward(masked, launch.shape, memory.packed, context.stream()));
  } else if (launch.path == Path::single_cta) {
    check_launch(single_cta_forward(sweep, launch.shape, memory.packed, context.stream()));
  } else if (launch.path == Path::cluster) {
    check_launch(cluster_forward(sweep, launch.shape, context.stream()));
  } else {
    clear_tags(context, launch, memory);
    check_launch(persistent_grid_forward(sweep, launch.shape, launch.groups, memory.exchange, context.stream()));
  }
}

void sweep_backward(const CallContext& context, const SweepLaunch& launch, const SweepWorkspace& memory,
                    const BackwardArgs& sweep, const StepMasks& masks) {
  if (launch.masked) {
    const auto masked = with_masks<MaskedBackwardArgs>(sweep, masks);
    check_launch(single_cta_backward(masked, launch.shape, memory.packed, context.stream()));
  } else if (launch.path == Path::single_cta) {
    check_launch(single_cta_backward(sweep, launch.shape, memory.packed, context.stream()));
  } else if (launch.path == Path::cluster) {
    check_launch(cluster_backward(sweep, launch.shape, context.stream()));
  } else {
    clear_tags(context, launch, memory);
    check_launch(persistent_grid_backward(sweep, launch.shape, launch.groups, memory.exchange, context.stream()));
  }
}

}  // namespace seqkernels
