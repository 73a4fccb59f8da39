// From the launches that the host calls to those of a pass, a cell and a dtype, and what is the same for all of these.
#include "dispatch.h"

#include "instances.h"

namespace seqkernels {

namespace {

// Calls with the traits of the cell, and as constants the dtype and whether it is rounded to TF32. Kernels that take
// all steps in one launch do not exist for float64.
template <class Call>
const char* by_instance(const SweepArgs& s, const char* float64, Call call) {
  return with_cell(s.cell, [&](auto cell) {
    return by_scalar(s.scalar, [&](auto scalar) -> const char* {
      constexpr Scalar SCALAR = decltype(scalar)::value;
      if constexpr (SCALAR == Scalar::float64)
        return float64;
      else if constexpr (SCALAR == Scalar::float32)
        return s.tf32 ? call(cell, scalar, Constant<true>{}) : call(cell, scalar, Constant<false>{});
      else
        return call(cell, scalar, Constant<false>{});
    });
  });
}

constexpr const char* kNoSingleCta = "no single CTA kernel for so many hidden units in this dtype";
constexpr const char* kNoCluster = "no cluster kernel for float64";
constexpr const char* kNoGrid = "no kernel for the persistent grid in float64";

}  // namespace

const char* single_cta_forward(const ForwardArgs& args, const LaunchShape& shape, const void* packed, void* stream) {
  return by_instance(args, kNoSingleCta, [&](auto cell, auto scalar, auto tf32) {
    return single_cta_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(args, shape, packed,
                                                                                                  stream);
  });
}

const char* single_cta_backward(const BackwardArgs& args, const LaunchShape& shape, const void* packed, void* stream) {
  return by_instance(args, kNoSingleCta, [&](auto cell, auto scalar, auto tf32) {
    return single_cta_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(args, shape, packed,
                                                                                                  stream);
  });
}

const char* cluster_forward(const ForwardArgs& args, const LaunchShape& shape, void* stream) {
  return by_instance(args, kNoCluster, [&](auto cell, auto scalar, auto tf32) {
    return cluster_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(args, shape, stream);
  });
}

const char* cluster_backward(const BackwardArgs& args, const LaunchShape& shape, void* stream) {
  return by_instance(args, kNoCluster, [&](auto cell, auto scalar, auto tf32) {
    return cluster_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(args, shape, stream);
  });
}

const char* persistent_grid_groups(const SweepArgs& args, const LaunchShape& shape, bool backward, GridGroups& groups) {
  if (args.scalar == Scalar::float64) return kNoGrid;
  const int cluster = shape.units / kGridUnits;
  if (shape.units % kGridUnits || (cluster != kGridClusters[0] && cluster != kGridClusters[1]))
    return "no kernel for the persistent grid by clusters of so many blocks";
  int running = 0;
  const char* error = clusters_at_once(cluster, running);
  if (error) return error;
  Variant variant{};
  variant.math = math_of(args.scalar, args.tf32);
  variant.backward = backward;
  groups = grid_groups(variant, grid_shape(args.hidden, cluster), args.directions, args.sequences, shape.tile, running);
  return groups.groups ? nullptr : "the GPU does not run as many blocks at the same time as the hidden units need";
}

const char* persistent_grid_forward(const ForwardArgs& args, const LaunchShape& shape, const GridGroups& groups,
                                    void* exchange, void* stream) {
  return by_instance(args, kNoGrid, [&](auto cell, auto scalar, auto tf32) {
    return persistent_grid_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(
        args, shape, groups, exchange, stream);
  });
}

const char* persistent_grid_backward(const BackwardArgs& args, const LaunchShape& shape, const GridGroups& groups,
                                     void* exchange, void* stream) {
  return by_instance(args, kNoGrid, [&](auto cell, auto scalar, auto tf32) {
    return persistent_grid_sweep<decltype(cell)::cell, decltype(scalar)::value, decltype(tf32)::value>(
        args, shape, groups, exchange, stream);
  });
}

}  // namespace seqkernels
