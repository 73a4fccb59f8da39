// Launches of the cluster kernels: which there are, and how much of the weights each holds in registers.
#include "cluster.cuh"
//
#include "launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

// Fragments of the weights that a thread can hold in registers beside all else without spilling, as the compiler's code
// for sm_90a has it; tests/test_cuda_compiled.py reads it there.
template <class Product>
constexpr int held(Cell cell, bool backward) {
  const bool lstm = cell == Cell::lstm, rnn = gates_of(cell) == 1;
  if (std::is_same_v<Product, Fp32Fma>) return rnn ? (backward ? 12 : 17) : backward ? 11 : lstm ? 10 : 12;
  return rnn && !backward ? 22 : 18;
}

template <template <class> class Pass, bool BACKWARD, Cell CELL, class Product, int UNITS, bool EVEN, class Arrays>
const char* launch_kernel(const Arrays& arrays, const Clusters& clusters, void* stream) {
  constexpr int WARPS = UNITS == 48 && !BACKWARD ? 6 : 8;
  using Kernel = Pass<Slice<CELL, Product, UNITS, WARPS, held<Product>(CELL, BACKWARD), EVEN>>;
  const int blocks = ceil_div(arrays.hidden, UNITS);
  const auto p = Kernel::of(arrays, clusters.tile, blocks, blocks);
  if (p.bytes > clusters.memory)
    return "the weights do not fit into the registers and the shared memory of the cluster";
  const int64_t tiles = (arrays.sequences + clusters.tile - 1) / clusters.tile;
  if (blocks > 16) return "a cluster has at most 16 blocks, too few for so many hidden units";
  if (blocks < 2) return "a cluster has at least 2 blocks, more than so few hidden units need";  // st.async demands it
  return launch<Kernel>(tiles * blocks, arrays.directions, p.bytes, stream, p, {blocks, false});
}

template <template <class> class Pass, bool BACKWARD, Cell CELL, class Product, class Arrays>
const char* by_units(const Arrays& arrays, const Clusters& clusters, void* stream) {
  const auto with = [&](auto units) {
    constexpr int UNITS = decltype(units)::value;
    return arrays.hidden % 2 ? launch_kernel<Pass, BACKWARD, CELL, Product, UNITS, false>(arrays, clusters, stream)
                             : launch_kernel<Pass, BACKWARD, CELL, Product, UNITS, true>(arrays, clusters, stream);
  };
  switch (clusters.units) {
    case 32: return with(std::integral_constant<int, 32>{});
    case 48: return with(std::integral_constant<int, 48>{});
    case 64: return with(std::integral_constant<int, 64>{});
    default: return "no cluster kernel with so many units a block";
  }
}

template <template <class> class Pass, bool BACKWARD, class Arrays>
const char* by_layer(const Arrays& arrays, const Clusters& clusters, void* stream) {
  if (arrays.scalar == Scalar::float64) return "no cluster kernel for float64";
  return by_cell(arrays.cell, [&](auto cell) {
    return by_product(arrays, [&](auto product) {
      return by_units<Pass, BACKWARD, decltype(cell)::value, decltype(product)>(arrays, clusters, stream);
    });
  });
}

}  // namespace

const char* cluster_forward(const ForwardArgs& sweep, const Clusters& clusters, void* stream) {
  return by_layer<ClusterForward, false>(sweep, clusters, stream);
}

const char* cluster_backward(const BackwardArgs& sweep, const Clusters& clusters, void* stream) {
  return by_layer<ClusterBackward, true>(sweep, clusters, stream);
}

}  // namespace seqkernels
