// Launches of the kernels for the persistent grid: which there are, how much of the weights each holds in registers, and how
// many groups of blocks run at the same time.
#include "persistent_grid.cuh"
//
#include "launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

constexpr int UNITS = 16, WARPS = 8;

// Fragments of the weights that a thread can hold in registers beside all else without spilling, as the compiler's code
// for sm_90a has it; tests/test_cuda_compiled.py reads it there.
template <class Product>
constexpr int held(Cell cell, bool backward) {
  const bool lstm = cell == Cell::lstm, rnn = gates_of(cell) == 1;
  if (std::is_same_v<Product, Fp32Fma>) return rnn ? (backward ? 12 : 17) : lstm ? 8 : backward ? 9 : 10;
  if (std::is_same_v<Product, Tf32> && backward) return lstm ? 16 : 17;
  return rnn && !backward ? 22 : 18;
}

template <template <class> class Pass, bool BACKWARD, Cell CELL, class Product, bool EVEN>
using KernelOf = Pass<Slice<CELL, Product, UNITS, WARPS, held<Product>(CELL, BACKWARD), EVEN>>;

template <class Kernel, class Arrays>
const char* launch_kernel(const Arrays& arrays, const Clusters& clusters, const Groups& groups, void* exchange,
                          void* flags, void* stream) {
  typename Kernel::Parameters p{Kernel::of(arrays, clusters.tile, groups.blocks, groups.cluster),
                                0,
                                groups.groups,
                                groups.blocks,
                                exchange,
                                groups.numbers,
                                static_cast<uint32_t*>(flags)};
  if (p.bytes > clusters.memory) return "the weights do not fit into the registers and the shared memory of the blocks";
  for (; p.first_direction < arrays.directions; p.first_direction += groups.directions) {
    const char* error =
        launch<Kernel>(groups.groups * groups.blocks, groups.directions, p.bytes, stream, p, {groups.cluster, true});
    if (error) return error;
  }
  return nullptr;
}

template <template <class> class Pass, bool BACKWARD, class Arrays, class... Rest>
const char* by_layer(const Arrays& arrays, Rest... rest) {
  return by_cell(arrays.cell, [&](auto cell) {
    return by_product(arrays, [&](auto product) {
      constexpr Cell CELL = decltype(cell)::value;
      using Product = decltype(product);
      return arrays.hidden % 2 ? launch_kernel<KernelOf<Pass, BACKWARD, CELL, Product, false>>(arrays, rest...)
                               : launch_kernel<KernelOf<Pass, BACKWARD, CELL, Product, true>>(arrays, rest...);
    });
  });
}

}  // namespace

const char* clusters_at_once(int blocks, int& clusters) {
  // Any kernel for slices: a block of each has the registers of a multiprocessor for itself.
  return count_clusters<KernelOf<PersistentGridForward, false, Cell::lstm, Fp32Fma, true>>(blocks, clusters);
}

const char* persistent_grid_groups(const SweepArgs& s, const Clusters& clusters, bool backward, Groups& groups) {
  if (s.scalar == Scalar::float64) return "no kernel for the persistent grid in float64";
  if (clusters.units != 2 * UNITS && clusters.units != 4 * UNITS)
    return "no kernel for the persistent grid by clusters of so many blocks";
  // In all that matters here, the kernels are like any of them.
  using Forward = KernelOf<PersistentGridForward, false, Cell::lstm, Fp32Fma, true>::Exchange;
  using Backward = KernelOf<PersistentGridBackward, true, Cell::lstm, Fp32Fma, true>::Exchange;
  groups.cluster = clusters.units / UNITS;
  groups.blocks = ceil_div(s.hidden, clusters.units) * groups.cluster;
  int running = 0;
  const char* error = clusters_at_once(groups.cluster, running);
  if (error) return error;
  const int at_once = running * groups.cluster / groups.blocks;
  if (at_once == 0) return "the GPU does not run as many blocks at the same time as the hidden units need";
  groups.directions = at_once < s.directions ? 1 : s.directions;
  const int64_t tiles = (s.sequences + clusters.tile - 1) / clusters.tile;
  const int room = at_once / groups.directions;
  groups.groups = tiles < room ? static_cast<int>(tiles) : room;
  const auto numbers = backward ? Backward::numbers : Forward::numbers;
  groups.numbers = numbers(groups.blocks, groups.cluster);
  const int64_t all = int64_t{s.directions} * groups.groups;
  groups.bytes = all * 2 * groups.numbers * (backward || s.scalar == Scalar::float32 ? 4 : 2);
  groups.flags = all * groups.blocks * (backward ? Backward::FLAGS : Forward::FLAGS);
  return nullptr;
}

const char* persistent_grid_forward(const ForwardArgs& sweep, const Clusters& clusters, const Groups& groups, void* exchange,
                              void* flags, void* stream) {
  return by_layer<PersistentGridForward, false>(sweep, clusters, groups, exchange, flags, stream);
}

const char* persistent_grid_backward(const BackwardArgs& sweep, const Clusters& clusters, const Groups& groups,
                               void* exchange, void* flags, void* stream) {
  return by_layer<PersistentGridBackward, true>(sweep, clusters, groups, exchange, flags, stream);
}

}  // namespace seqkernels
