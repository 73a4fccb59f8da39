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
                        void* flags, void* stream) {
  const SliceShape slices = grid_shape(args.hidden, shape.units / kGridUnits);
  auto p = slice_args<Kernel, GridArgs<Args>>(args, slices, shape.tile);
  if (p.bytes > shape.shared_memory)
    return "the weights do not fit into the registers and the shared memory of the blocks";
  p.groups = groups.groups;
  p.blocks = slices.blocks;
  p.buffers = exchange;
  p.values = groups.values;
  p.flags = static_cast<uint32_t*>(flags);
  Cooperation cooperation;
  cooperation.cluster = slices.cluster;
  cooperation.whole_grid = true;
  for (; p.first_direction < args.directions; p.first_direction += groups.directions) {
    const char* error =
        launch<Kernel>(groups.groups * slices.blocks, groups.directions, p.bytes, stream, p, cooperation);
    if (error) return error;
  }
  return nullptr;
}

template <template <class> class Pass, Cell CELL, class MathPolicy, bool BACKWARD, class Args, class... Rest>
const char* run(const Args& args, const LaunchShape& shape, Rest... rest) {
  return by_slice_config<Path::persistent_grid, CELL, MathPolicy, BACKWARD, kGridUnits>(
      args, shape.arch, [&](auto config) { return launch_grid<Pass<decltype(config)>>(args, shape, rest...); });
}

}  // namespace

template <Cell CELL, Scalar SCALAR, bool TF32>
const char* persistent_grid_forward(const ForwardArgs& args, const LaunchShape& shape, const GridGroups& groups,
                                    void* exchange, void* flags, void* stream) {
  return run<PersistentGridForward, CELL, policy_t<SCALAR, TF32>, false>(args, shape, groups, exchange, flags, stream);
}

template <Cell CELL, Scalar SCALAR, bool TF32>
const char* persistent_grid_backward(const BackwardArgs& args, const LaunchShape& shape, const GridGroups& groups,
                                     void* exchange, void* flags, void* stream) {
  return run<PersistentGridBackward, CELL, policy_t<SCALAR, TF32>, true>(args, shape, groups, exchange, flags, stream);
}

template const char* persistent_grid_forward<SEQKERNELS_INSTANCE>(const ForwardArgs&, const LaunchShape&,
                                                                  const GridGroups&, void*, void*, void*);
template const char* persistent_grid_backward<SEQKERNELS_INSTANCE>(const BackwardArgs&, const LaunchShape&,
                                                                   const GridGroups&, void*, void*, void*);

}  // namespace seqkernels
