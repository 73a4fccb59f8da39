// Products of bfloat16 and int8 by Intel's AMX: eight registers of up to 16 rows of 64 bytes each, the tiles. What is
// said of the instructions stands in volume 2 of Intel's Software Developer's Manual (LDTILECFG, TILELOADD, TDPBF16PS,
// TDPBUSD).
#pragma once
#include "gemm_int8.h"
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
// The same of fours: A has them of uint8, B of int8, and C of int32.
template <int kC, int kA, int kB>
inline void multiply_byte_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB) : "memory");
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
  Tiles* tiles = nullptr;  // by which to multiply, where these are factors for tiles
  Parts parts = {};        // of the left factor, and of the panels as many

  // Of one piece.
  static Depth of(int64_t k, Tiles* tiles, Parts parts = {}) {
    Depth depth{k};
    depth.tiles = tiles, depth.parts = parts;
    return depth;
  }
};

#if defined(SEQKERNELS_TILES)
static_assert(kVectorBytes == 64, "a vector of a panel is a row of a tile");

// Rows of the left factor for one tile: where they are, and the bytes from each to the next, 0 if these differ.
template <class F>
struct TileRows {
  const F* const* a = nullptr;
  int64_t count = 0, stride = 0;

  TileRows() = default;
  TileRows(const F* const* a, int64_t count) : a(a), count(count), stride(64) {
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

// Products of blocks of rows with panels of N vectors, one block after the other, in slices of kTileDepth factors:
// between them vector code can work on the sums of the block before, while the tiles are multiplied. A block is one or
// two tiles of rows. Two are multiplied with two vectors at once, in as many passes as that takes, so that a tile that
// is loaded is used twice; one with all vectors. A row's sum is one chain, which errs far less than its rounding to
// bfloat16.
template <int N, bool kInParts, class F>
class TileProducts {
 public:
  // Panels' rows are `stride` apart, and their segments padded (Panels::depth).
  TileProducts(const Depth& depth, int64_t stride) : depth_(depth), stride_(stride) {}

  // Begins with `count` rows, at most kMaxTileRows, and a panel: out[r][v] becomes their product. As a last tile of
  // fewer rows would take as long and want another configuration, it takes some of the first again, with the same
  // result.
  template <class Row>
  void begin(int64_t count, const Row& row, const F* panel, Vec<Sum<F>>* out) {
    for (int64_t r = 0; r < count; r++) a_[r] = row(r);
    const int64_t height = min(count, kTileRows);
    second_ = count - height;
    rows_[0] = TileRows<F>(a_, height), rows_[1] = TileRows<F>(a_ + second_, height);
    depth_.tiles->configure(static_cast<int>(height));
    panel_ = panel, out_ = out;
    pass_ = 0, segment_ = 0, k_ = 0;
    const int64_t passes = !second_ ? 1 : kInParts ? N : (N + 1) / 2;
    slices_ = passes * depth_of_panel() / kTileDepth;
    for (int64_t i = 0; !slices_ && i < count * N; i++) out[i] = Vec<Sum<F>>{};
  }

  // So many of these complete the block.
  int64_t slices() const { return slices_; }
  SEQKERNELS_INLINE void slice() {
    if constexpr (kInParts)
      second_ ? slice_in_parts<2>(pass_, std::make_integer_sequence<int, 1>{})
              : slice_in_parts<1>(0, std::make_integer_sequence<int, N>{});
    else if (!second_)
      slice_of<1>(0, std::make_integer_sequence<int, N>{});
    else if (N <= 2 || pass_ == 0)
      slice_of<2>(0, std::make_integer_sequence < int, N<2 ? N : 2>{});
    else
      slice_of<2>(2, std::make_integer_sequence < int, N<3 ? 1 : N - 2>{});
  }

 private:
  // Factors of one part, with the zeros behind them.
  int64_t depth_of_panel() const { return depth_.segments * ((depth_.k + kTileDepth - 1) / kTileDepth) * kTileDepth; }

  // Vectors first + v of M tiles of rows: the sums are tile `v` of one, and tiles 2 v and 2 v + 1 of two.
  template <int M, int... v>
  SEQKERNELS_INLINE void slice_of(int64_t first, std::integer_sequence<int, v...>) {
    begin_sums<M, v...>(first);
    load_rows<M, 4>(0);
    (add_products<M, v, 4, 6 + v % 2>(next_), ...);
    end_slice<M, v...>(first);
  }

  // The same of numbers in two parts: all products but that of both second parts, which is below what the sum of two
  // resolves. The first parts of rows are the M tiles from 6 - 2 M on, the second the M behind them.
  template <int M, int... v>
  SEQKERNELS_INLINE void slice_in_parts(int64_t first, std::integer_sequence<int, v...>) {
    constexpr int kFirst = 6 - 2 * M, kSecond = 6 - M;
    begin_sums<M, v...>(first);
    load_rows<M, kFirst>(0);
    load_rows<M, kSecond>(depth_.parts.gap);
    const int64_t second = depth_of_panel() * stride_;
    ((add_products<M, v, kFirst, 6>(next_), multiply_rows_with<M, v, kSecond, 6>(),
      add_products<M, v, kFirst, 7>(next_ + second)),
     ...);
    end_slice<M, v...>(first);
  }

  template <int M, int... v>
  SEQKERNELS_INLINE void begin_sums(int64_t first) {
    if (segment_ || k_) return;
    next_ = panel_ + first * kLanes<float>;
    (zero_tile<M * v>(), ...);
    if constexpr (M == 2) (zero_tile<M * v + 1>(), ...);
  }

  // sums += the tiles of rows from kA on times tile kB; which is that of vector v of a panel's next factors.
  template <int M, int v, int kA, int kB>
  SEQKERNELS_INLINE void multiply_rows_with() const {
    multiply<M * v, kA, kB>();
    if constexpr (M == 2) multiply<M * v + 1, kA + 1, kB>();
  }
  template <int kC, int kA, int kB>
  SEQKERNELS_INLINE void multiply() const {
    if constexpr (std::is_same<F, bfloat16x2>::value)
      multiply_tiles<kC, kA, kB>();
    else
      multiply_byte_tiles<kC, kA, kB>();
  }
  template <int M, int v, int kA, int kB>
  SEQKERNELS_INLINE void add_products(const F* panel) const {
    load_tile<kB>(panel + v * kLanes<float>, stride_ * sizeof(F));
    multiply_rows_with<M, v, kA, kB>();
  }

  // The next factors of all rows, `offset` behind those of the first part, become tiles from kTile on.
  template <int M, int kTile>
  SEQKERNELS_INLINE void load_rows(int64_t offset) {
    const int64_t at = offset + segment_ * depth_.gap + k_, n = min(depth_.k - k_, kTileDepth);
    rows_[0].template load_tile_of<kTile>(at, n, copies_[0]);
    if constexpr (M == 2) rows_[1].template load_tile_of<kTile + 1>(at, n, copies_[1]);
  }

  template <int M, int... v>
  SEQKERNELS_INLINE void end_slice(int64_t first) {
    next_ += kTileDepth * stride_, k_ += kTileDepth;
    if (k_ < depth_.k) return;
    k_ = 0;
    if (++segment_ < depth_.segments) return;
    segment_ = 0, pass_++;
    (store_sums<M, v>(out_ + first + v), ...);
  }

  template <int M, int v>
  SEQKERNELS_INLINE void store_sums(Vec<Sum<F>>* out) const {
    store_tile<M * v>(out, N * sizeof(*out));
    if constexpr (M == 2) store_tile<M * v + 1>(out + second_ * N, N * sizeof(*out));
  }

  const Depth depth_;
  const int64_t stride_;
  // The block: its rows, of which the second tile has those from second_ on, if that is not 0.
  const F* a_[kMaxTileRows];
  TileRows<F> rows_[2];
  int64_t second_, slices_;
  const F* panel_;
  Vec<Sum<F>>* out_;
  // Of the next slice.
  int64_t pass_, segment_, k_;
  const F* next_;
  alignas(64) float copies_[2][kTileRows][kTileDepth];
};

// Calls run(constant) with whether numbers are in two parts as a compile-time constant.
template <class Run>
SEQKERNELS_INLINE void with_parts(const Depth& depth, const Run& run) {
  if (depth.parts.count == 2)
    run(std::true_type{});
  else
    run(std::false_type{});
}

// What the vector code's multiply_block does.
template <int N, bool kInParts, class F>
__attribute__((noinline)) void multiply_block_by_tiles(int64_t rows, const Depth& depth, const F* const* a,
                                                       const F* panel, int64_t stride, Vec<Sum<F>>* out) {
  TileProducts<N, kInParts, F> products(depth, stride);
  for (int64_t r = 0; r < rows; r += kMaxTileRows) {
    const int64_t first = min(r, max(0, rows - kTileRows));
    products.begin(
        min(rows, r + kMaxTileRows) - first, [&](int64_t i) { return a[first + i]; }, panel, out + first * N);
    for (int64_t i = 0; i < products.slices(); i++) products.slice();
  }
}
#endif

}  // namespace seqkernels::SEQKERNELS_ISA
