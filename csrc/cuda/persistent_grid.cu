// The kernels for the persistent grid of one cell and dtype (instances.h).
#include "persistent_grid.cuh"
//
#include "instances.h"
#include "slice_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

// One direction after the other where not both run at once.
template <class Kernel, class Args>
const char* launch_grid(const Args& args, const LaunchShape& shape, const GridGroups& groups, void* exchange,
                        void* stream) {
  const SliceShape slices = grid_shape(args.hidden, shape.units / kGridUnits);
  auto p = slice_args<Kernel, GridArgs<Args>>(args, slices, shape.tile);
  if (p.bytes > shape.shared_memory)
    return "the weights do not fit into the registers and the shared memory of the blocks";
  p.groups = groups.groups;
  p.blocks = slices.blocks;
  p.cluster = slices.cluster;
  p.clusters = slices.blocks / slices.cluster;
  p.buffers = static_cast<Vec16*>(exchange);
  p.vectors = groups.vectors;
  Cooperation cooperation;
  cooperation.cluster = slices.cluster;
  cooperation.whole_grid = true;
  for (; p.first_of_launch < args.directions; p.first_of_launch += groups.directions) {
    const char* error =
        launch<Kernel>(groups.groups * slices.blocks, groups.directions, p.bytes, stream, p, cooperation);
    if (error) return error;
  }
  return nullptr;
}

template <class C>
using KernelOf = std::conditional_t<C::variant.backward, PersistentGridBackward<C>, PersistentGridForward<C>>;

}  // namespace

template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* persistent_grid_sweep(const Pass& args, const LaunchShape& shape, const GridGroups& groups, void* exchange,
                                  void* stream) {
  return by_slice_config<Path::persistent_grid, CELL, policy_t<SCALAR, TF32>, Pass::backward, kGridUnits>(
      args, shape.arch,
      [&](auto config) { return launch_grid<KernelOf<decltype(config)>>(args, shape, groups, exchange, stream); });
}

template const char* persistent_grid_sweep<SEQKERNELS_INSTANCE, ForwardArgs>(const ForwardArgs&, const LaunchShape&,
                                                                             const GridGroups&, void*, void*);
template const char* persistent_grid_sweep<SEQKERNELS_INSTANCE, BackwardArgs>(const BackwardArgs&, const LaunchShape&,
                                                                              const GridGroups&, void*, void*);

}  // namespace seqkernels
