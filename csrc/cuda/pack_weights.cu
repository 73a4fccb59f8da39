// The kernel that packs the weights of a single CTA, and its launch.
#include "launch.cuh"
#include "mma.cuh"
#include "dispatch.h"

namespace seqkernels {

namespace device {

// Writes recurrent weights in the order in which the threads of a single CTA read them: for each direction, fragment
// and half of a fragment, 16 bytes of each thread. A fragment is `gate` of the `k_block` of columns of the `m_tile` of
// 16 rows of the thread's warp, its group k_block * m_tiles + m_tile, and its number group * gates + gate.
template <class T>
struct PackWeightsKernel {
  static constexpr int threads = 128;
  using Parameters = PackWeights;

  static DEVICE void run(const PackWeights& p) {
    constexpr int k_width = kKBlockBytes / static_cast<int>(sizeof(T));
    const int lanes = p.width / (kMmaRows * p.m_tiles) * kWarpSize, hidden = p.hidden;
    const int i = static_cast<int>(block()) * threads + thread();
    if (i >= p.vec16s) return;
    const int lane = i % lanes, half = i / lanes % 2, fragment = i / lanes / 2 + p.first_group * p.gates;
    const int gate = fragment % p.gates, m_tile = fragment / p.gates % p.m_tiles,
              k_block = fragment / p.gates / p.m_tiles;
    const int64_t matrix = int64_t(hidden) * hidden;
    const Global<const T> w_hh(static_cast<const T*>(p.w_hh[block_y()]), p.gates * matrix);
    const auto factor = [&](int row, int column) {
      if (row >= hidden || column >= hidden) return from_acc<T>(0);
      const int64_t at = p.transposed ? int64_t(column) * hidden + row : int64_t(row) * hidden + column;
      const T weight = w_hh.load(gate * matrix + at);
      if constexpr (sizeof(T) == 4) return p.tf32 ? tf32(weight) : weight;
      return weight;
    };
    Vec16 words;
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const int row =
          (lane / kWarpSize * p.m_tiles + m_tile) * kMmaRows + row_of_word(lane % kWarpSize, half * 4 + word);
      const int column = k_block * k_width + column_of_word<T>(lane % kWarpSize, half * 4 + word);
      if constexpr (sizeof(T) == 4)
        words.word[word] = bits(factor(row, column));
      else
        words.word[word] = bits(pair(factor(row, column), factor(row, column + 1)));
    }
    Global<Vec16>(static_cast<Vec16*>(p.packed) + block_y() * p.vec16s, p.vec16s).store(i, words);
  }
};

}  // namespace device

const char* pack_weights(const PackWeights& p, Scalar scalar, int directions, void* stream) {
  return by_scalar(scalar, [&](auto of) -> const char* {
    using T = device::element_t<decltype(of)::value>;
    if constexpr (sizeof(T) == 8) {
      return "no single CTA kernel for float64";
    } else {
      using Kernel = device::PackWeightsKernel<T>;
      return device::launch<Kernel>(ceil_div(p.vec16s, Kernel::threads), directions, 0, stream, p);
    }
  });
}

}  // namespace seqkernels
