// Launches of the single CTA kernels: which there are, and how much of the weights each holds in registers.
#include "single_cta.cuh"
//
#include "launch.cuh"

#include <algorithm>

namespace seqkernels {

using namespace device;

namespace {

// Groups of fragments that a thread can hold in registers beside all else without spilling, as the compiler's code for
// sm_80 and sm_90a has it; tests/test_cuda_compiled.py reads it there, and select.py says the same.
template <class Product>
constexpr int held(Cell cell, int width, bool backward, bool even) {
  const bool lstm = cell == Cell::lstm;
  if (gates_of(cell) == 1) return 16;
  if (std::is_same_v<Product, Fp32Fma>) {
    if (lstm) return !backward ? 1 : width > 64 && even ? 3 : 2;
    return backward ? 4 : 3;
  }
  if (std::is_same_v<Product, Tf32>) return lstm ? (backward ? 3 : 4) : backward ? 5 : 6;
  if (width <= 128) return 4;
  if (lstm) return backward || !even ? 2 : 4;
  return backward ? 4 : 5;
}

// Hidden units that the kernel for a layer is made for; 0: there is none. For odd numbers of units there are fewer.
int width_of(Scalar scalar, int64_t hidden) {
  const int widest = scalar == Scalar::float32 ? 128 : scalar == Scalar::float64 ? 0 : 256;
  for (const int width : {32, 64, 96, 128, 192, 256}) {
    const bool for_odd = width % 64 == 0 && width != 192;
    if (hidden <= width && width <= widest && (for_odd || hidden % 2 == 0)) return width;
  }
  return 0;
}

// Call with the type of the configuration of a layer's kernel.
template <bool BACKWARD, Cell CELL, class Product, int WIDTH, bool EVEN, class Call>
const char* with(Call call) {
  constexpr int BLOCKS = WIDTH > 128 ? 2 : 1, RESIDENT = held<Product>(CELL, WIDTH, BACKWARD, EVEN);
  return call(Configuration<CELL, Product, WIDTH, BLOCKS, RESIDENT, EVEN>{});
}

template <bool BACKWARD, Cell CELL, class Product, class Call>
const char* by_width(const SweepArgs& s, Call call) {
  constexpr bool wide = sizeof(typename Product::T) == 2;
  constexpr int W192 = wide ? 192 : 128, W256 = wide ? 256 : 128;  // of float32 there are none
  if (s.hidden % 2) {
    switch (width_of(s.scalar, s.hidden)) {
      case 64: return with<BACKWARD, CELL, Product, 64, false>(call);
      case 128: return with<BACKWARD, CELL, Product, 128, false>(call);
      default: return with<BACKWARD, CELL, Product, W256, false>(call);
    }
  }
  switch (width_of(s.scalar, s.hidden)) {
    case 32: return with<BACKWARD, CELL, Product, 32, true>(call);
    case 64: return with<BACKWARD, CELL, Product, 64, true>(call);
    case 96: return with<BACKWARD, CELL, Product, 96, true>(call);
    case 128: return with<BACKWARD, CELL, Product, 128, true>(call);
    case 192: return with<BACKWARD, CELL, Product, W192, true>(call);
    default: return with<BACKWARD, CELL, Product, W256, true>(call);
  }
}

template <bool BACKWARD, class Call>
const char* by_layer(const SweepArgs& s, Call call) {
  return by_cell(s.cell, [&](auto cell) {
    return by_product(
        s, [&](auto product) { return by_width<BACKWARD, decltype(cell)::value, decltype(product)>(s, call); });
  });
}

template <template <class> class Pass, bool BACKWARD, class Arrays>
const char* run(const Arrays& arrays, int tile, int memory, void* packed, void* stream) {
  if (!width_of(arrays.scalar, arrays.hidden)) return "no single CTA kernel for so many hidden units in this dtype";
  return by_layer<BACKWARD>(arrays, [&](auto configuration) -> const char* {
    using C = decltype(configuration);
    using Kernel = Pass<C>;
    using Packing = PackWeightsKernel<typename C::T>;
    if (memory < Kernel::buffers) return "a block has too little shared memory for a single CTA kernel";
    const int shared = std::min(C::Held::others, (memory - Kernel::buffers) / C::Held::group_bytes);
    const PackWeights arrange{{arrays.w_hh[0], arrays.w_hh[1]},
                          packed,
                          C::G,
                          static_cast<int>(arrays.hidden),
                          C::HIDDEN,
                          C::BLOCKS,
                          BACKWARD,
                          arrays.tf32};
    const char* error = launch<Packing>((C::Held::words + Packing::threads - 1) / Packing::threads,
                                          arrays.directions, 0, stream, arrange);
    if (error) return error;
    return launch<Kernel>((arrays.sequences + tile - 1) / tile, arrays.directions,
                          Kernel::buffers + shared * C::Held::group_bytes, stream, {{arrays}, packed, tile, shared});
  });
}

}  // namespace

int64_t single_cta_words(Cell cell, Scalar scalar, int64_t hidden) {
  const int64_t width = width_of(scalar, hidden);
  return gates_of(cell) * width * width / (scalar == Scalar::float32 ? 4 : 8);
}

const char* single_cta_forward(const ForwardArgs& sweep, int tile, int memory, void* packed, void* stream) {
  return run<SingleCtaForward, false>(sweep, tile, memory, packed, stream);
}

const char* single_cta_backward(const BackwardArgs& sweep, int tile, int memory, void* packed, void* stream) {
  return run<SingleCtaBackward, true>(sweep, tile, memory, packed, stream);
}

}  // namespace seqkernels
