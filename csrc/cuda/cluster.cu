// The cluster kernels of one cell, dtype and pass (instances.h).
#include "cluster.cuh"
//
#include "dispatch.h"
#include "instances.h"
#include "slice_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

template <class Kernel, class Args>
const char* launch_cluster(const Args& args, const LaunchShape& shape, void* stream) {
  const SliceShape slices = cluster_shape(args.hidden, Kernel::UNITS);
  const auto p = slice_args<Kernel, SliceArgs<Args>>(args, slices, shape.tile);
  if (p.bytes > shape.shared_memory)
    return "the weights do not fit into the registers and the shared memory of the cluster";
  if (slices.blocks > kMaxCluster) return "a cluster has at most 16 blocks, too few for so many hidden units";
  if (slices.blocks < kMinCluster) return "a cluster has at least 2 blocks, more than so few hidden units need";
  const int64_t tiles = (args.sequences + shape.tile - 1) / shape.tile;
  Cooperation cooperation;
  cooperation.cluster = slices.blocks;
  return launch<Kernel>(tiles * slices.blocks, args.directions, p.bytes, stream, p, cooperation);
}

template <class C>
using KernelOf = std::conditional_t<C::variant.backward, ClusterBackward<C>, ClusterForward<C>>;

}  // namespace

template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* cluster_sweep(const Pass& args, const LaunchShape& shape, void* stream) {
  constexpr const char* none = "no cluster kernel with so many units a block";
  return by_value<kClusterUnits>(shape.units, none, [&](auto units) {
    constexpr int UNITS = decltype(units)::value;
    return by_slice_config<Path::cluster, CELL, policy_t<SCALAR, TF32>, Pass::backward, UNITS>(
        args, shape.arch, [&](auto config) { return launch_cluster<KernelOf<decltype(config)>>(args, shape, stream); });
  });
}

template const char* cluster_sweep<SEQKERNELS_INSTANCE, SEQKERNELS_PASS>(const SEQKERNELS_PASS&, const LaunchShape&,
                                                                         void*);

}  // namespace seqkernels
