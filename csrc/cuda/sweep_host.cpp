// The paths that take all steps in one launch: what speaks against the plan, and the memory that the CTAs share.
#include "host.h"

namespace seqkernels {

namespace {

// How to launch what the plan says; raises what speaks against it.
LaunchShape checked_launch(const CallContext& context, const Layer& p, const Plan& plan, bool tf32, bool backward) {
  const Gpu gpu = context.gpu();
  LayerFacts facts{};
  facts.cell = p.cell;
  facts.scalar = p.scalar;
  facts.tf32 = tf32;
  facts.has_projection = p.has_projection;
  facts.directions = p.directions;
  facts.hidden = p.hidden;
  facts.sequences = p.sequences;
  const std::string reason = reason_against(plan, facts, gpu, backward);
  if (!reason.empty()) check_launch(reason.c_str());
  LaunchShape shape{};
  shape.arch = arch_of(gpu.target);
  shape.tile = plan.tile;
  shape.units = plan.units;
  shape.shared_memory = gpu.shared_memory;
  return shape;
}

// Where a single CTA finds its weights.
Tensor packed_weights(const CallContext& context, const Layer& p) {
  return context.allocate({p.directions, single_cta_packed_bytes(p.cell, p.scalar, p.hidden)}, ScalarType::Byte);
}

// What the CTAs of the persistent grid exchange through.
struct GridWorkspace {
  GridGroups groups{};
  Tensor exchange, flags;

  GridWorkspace(const CallContext& context, const SweepArgs& sweep, const LaunchShape& shape, bool backward)
      : exchange(allocate_exchange(context, sweep, shape, backward)),
        flags(context.allocate({groups.flags}, ScalarType::Int)) {
    torch::stable::zero_(flags);
  }

 private:
  Tensor allocate_exchange(const CallContext& context, const SweepArgs& sweep, const LaunchShape& shape,
                           bool backward) {
    check_launch(persistent_grid_groups(sweep, shape, backward, groups));
    return context.allocate({groups.bytes}, ScalarType::Byte);
  }
};

}  // namespace

void sweep_forward(const CallContext& context, const Layer& p, const Plan& plan, const ForwardArgs& sweep) {
  const LaunchShape shape = checked_launch(context, p, plan, sweep.tf32, false);
  if (plan.path == Path::single_cta) {
    Tensor packed = packed_weights(context, p);
    check_launch(single_cta_forward(sweep, shape, packed.mutable_data_ptr(), context.stream()));
  } else if (plan.path == Path::cluster) {
    check_launch(cluster_forward(sweep, shape, context.stream()));
  } else {
    GridWorkspace workspace(context, sweep, shape, false);
    check_launch(persistent_grid_forward(sweep, shape, workspace.groups, workspace.exchange.mutable_data_ptr(),
                                         workspace.flags.mutable_data_ptr(), context.stream()));
  }
}

void sweep_backward(const CallContext& context, const Layer& p, const Plan& plan, const BackwardArgs& sweep) {
  const LaunchShape shape = checked_launch(context, p, plan, sweep.tf32, true);
  if (plan.path == Path::single_cta) {
    Tensor packed = packed_weights(context, p);
    check_launch(single_cta_backward(sweep, shape, packed.mutable_data_ptr(), context.stream()));
  } else if (plan.path == Path::cluster) {
    check_launch(cluster_backward(sweep, shape, context.stream()));
  } else {
    GridWorkspace workspace(context, sweep, shape, true);
    check_launch(persistent_grid_backward(sweep, shape, workspace.groups, workspace.exchange.mutable_data_ptr(),
                                          workspace.flags.mutable_data_ptr(), context.stream()));
  }
}

}  // namespace seqkernels
