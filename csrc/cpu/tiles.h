// Products of bfloat16 by Intel's AMX: eight registers of up to 16 rows of 64 bytes each, the tiles. What is said of
// the instructions stands in volume 2 of Intel's Software Developer's Manual (LDTILECFG, TILELOADD, TDPBF16PS).
#pragma once
#include "gemm_pack.h"
#if defined(SEQKERNELS_EMULATED_TILES)
#include "../../tests/cpu/tile_emulation.h"
#define SEQKERNELS_TILES
#elif defined(SEQKERNELS_AMX) && defined(__AVX512F__)
#define SEQKERNELS_TILES
#endif

namespace seqkernels::SEQKERNELS_ISA {

// What LDTILECFG loads: the shapes of all tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of tiles 0 to 7; zeros behind them
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if defined(SEQKERNELS_EMULATED_TILES)
using namespace tile_emulation;
#elif defined(SEQKERNELS_TILES)
// The compiler knows nothing of tiles. As all of these are volatile and touch memory, it keeps their order, also among
// other loads and stores.
inline void load_tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile) : "memory");
}
template <int kTile>
inline void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(rows), "r"(stride) : "memory");
}
template <int kTile>
inline void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(rows), "r"(stride) : "memory");
}
// C += A B, of which A has pairs of successive bfloat16 of a row, and B pairs of a column side by side.
template <int kC, int kA, int kB>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB) : "memory");
}
#endif

// The tiles of a thread that runs a pass, released at its end: released ones cost a change of threads nothing. The
// shape of products is that of the last call of `configure`.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
#if defined(SEQKERNELS_TILES)
  ~Tiles() {
    if (rows_) release_tiles();
  }

  // Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 of B. It takes some 200 cycles, so never for the same again.
  void configure(int rows) {
    if (rows == rows_) return;
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileDepth);
    }
    load_tile_config(config);
    rows_ = rows;
  }

 private:
  int rows_ = 0;
#endif
};

// Factors of a product that lie in `segments` pieces of k numbers, `gap` apart (the directions of a layer).
struct Depth {
  int64_t k;
  int segments = 1;
  int64_t gap = 0;
  Tiles* tiles = nullptr;  // by which to multiply pairs of bfloat16
};

#if defined(SEQKERNELS_TILES)
static_assert(kVectorBytes == 64, "a vector of a panel is a row of a tile");

// Rows of the left factor for one tile: where they are, and the bytes from each to the next, 0 if these differ.
struct TileRows {
  const bfloat16x2* const* a;
  int64_t count, stride;

  TileRows(const bfloat16x2* const* a, int64_t count) : a(a), count(count), stride(64) {
    const auto bytes_after = [&](int64_t r) {
      return reinterpret_cast<intptr_t>(a[r]) - reinterpret_cast<intptr_t>(a[r - 1]);
    };
    if (count > 1) stride = bytes_after(1);
    for (int64_t r = 2; r < count; r++)
      if (bytes_after(r) != stride) stride = 0;
  }

  // Factors [k, k + n) of all rows become a tile, by way of `copy` where they do not lie like one; zeros follow them.
  template <int kTile>
  SEQKERNELS_INLINE void load_tile_of(int64_t k, int64_t n, float (*copy)[kTileDepth]) const {
    if (n == kTileDepth && stride) return load_tile<kTile>(a[0] + k, stride);
    for (int64_t r = 0; r < count; r++) store(copy[r], load(reinterpret_cast<const float*>(a[r] + k), n));
    load_tile<kTile>(copy, sizeof(*copy));
  }
};

// Vector v of M tiles of rows: the sums are tile `v` of one, and tiles 2 v and 2 v + 1 of two.
template <int M, int v>
SEQKERNELS_INLINE void add_tile_products(const bfloat16x2* panel, int64_t stride) {
  constexpr int kB = 6 + v % 2;
  load_tile<kB>(panel + v * kLanes<float>, stride * sizeof(bfloat16x2));
  multiply_tiles<M * v, 4, kB>();
  if constexpr (M == 2) multiply_tiles<M * v + 1, 5, kB>();
}

template <int M, int v>
SEQKERNELS_INLINE void store_sums(Vec<float>* const (&out)[M], int64_t stride) {
  store_tile<M * v>(out[0] + v, stride);
  if constexpr (M == 2) store_tile<M * v + 1>(out[1] + v, stride);
}

// out[m][r * kStride + v] = sum over k of rows[m][r][k] * panel[k][v], for M tiles of rows and vectors v.
template <int M, int kStride, int... v>
SEQKERNELS_INLINE void multiply_rows_of_tiles(const Depth& depth, const TileRows (&rows)[M], const bfloat16x2* panel,
                                              int64_t stride, Vec<float>* const (&out)[M],
                                              std::integer_sequence<int, v...>) {
  alignas(64) float copies[M][16][kTileDepth];
  (zero_tile<M * v>(), ...);
  if constexpr (M == 2) (zero_tile<M * v + 1>(), ...);
  for (int segment = 0; segment < depth.segments; segment++)
    for (int64_t k = 0; k < depth.k; k += kTileDepth, panel += kTileDepth * stride) {
      const int64_t at = segment * depth.gap + k, n = min(depth.k - k, kTileDepth);
      rows[0].template load_tile_of<4>(at, n, copies[0]);
      if constexpr (M == 2) rows[1].template load_tile_of<5>(at, n, copies[1]);
      (add_tile_products<M, v>(panel, stride), ...);
    }
  (store_sums<M, v>(out, kStride * sizeof(Vec<float>)), ...);
}

// What the vector code's multiply_block does, for a panel whose segments are padded (Panels::depth): out[r][v] of N
// vectors. As a last tile of fewer rows would take as long and want another configuration, it takes some of those
// before it again, with the same result. A row's sum is one chain, which errs far less than its rounding to bfloat16.
template <int N>
__attribute__((noinline)) void multiply_block_by_tiles(int64_t rows, const Depth& depth, const bfloat16x2* const* a,
                                                       const bfloat16x2* panel, int64_t stride, Vec<float>* out) {
  const int64_t height = min(rows, kTileRows), last = rows - height;
  depth.tiles->configure(static_cast<int>(height));
  for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
    const int64_t first = min(r, last), second = min(r + kTileRows, last);
    if (first == second) {
      multiply_rows_of_tiles<1, N>(depth, {{a + first, height}}, panel, stride, {out + first * N},
                                   std::make_integer_sequence<int, N>{});
      continue;
    }
    const TileRows both[] = {{a + first, height}, {a + second, height}};
    const auto two = [&](int vector, auto vectors) {
      multiply_rows_of_tiles<2, N>(depth, both, panel + vector * kLanes<float>, stride,
                                   {out + first * N + vector, out + second * N + vector}, vectors);
    };
    two(0, std::make_integer_sequence < int, N == 1 ? 1 : 2 > {});
    if constexpr (N > 2) two(2, std::make_integer_sequence<int, N - 2>{});
  }
}
#endif

}  // namespace seqkernels::SEQKERNELS_ISA
