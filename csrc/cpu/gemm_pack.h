// What matrix products multiply: factors, and weights packed into panels.
#pragma once
#include <utility>

#include "team.h"
#include "vec_math.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class C>
inline int64_t vectors_of(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C>;
}

// The distance between rows of n numbers, in whole vectors. Rows a multiple of 1 KiB apart fall into the same few sets
// of the first-level cache; one vector more spreads them.
template <class C>
inline int64_t leading(int64_t n) {
  const int64_t padded = vectors_of<C>(n) * kLanes<C>;
  return padded * sizeof(C) % 1024 ? padded : padded + kLanes<C>;
}

// ---- factors: what products multiply, and what they add up in

// Two successive bfloat16 of a row, which AVX512-BF16 multiplies and adds as one.
struct bfloat16x2 {
  bfloat16 low, high;
};

template <class F>
struct SumOf {
  typedef F type;
};
template <>
struct SumOf<bfloat16x2> {
  typedef float type;
};
template <class F>
using Sum = typename SumOf<F>::type;

// Of which numbers a factor consists.
template <class F>
struct NumberOf {
  typedef F type;
};
template <>
struct NumberOf<bfloat16x2> {
  typedef bfloat16 type;
};
template <class F>
using number_t = typename NumberOf<F>::type;

template <class F>
constexpr int kPerFactor = sizeof(F) / sizeof(Sum<F>) * (std::is_same<F, bfloat16x2>::value ? 2 : 1);

// Factors of a row of n numbers.
template <class F>
inline int64_t factors_of(int64_t n) {
  return (n + kPerFactor<F> - 1) / kPerFactor<F>;
}

// sum + w * x, lane by lane.
template <class F>
inline Vec<Sum<F>> add_product(Vec<Sum<F>> sum, Vec<Sum<F>> w, Vec<Sum<F>> x) {
  return sum + w * x;
}

// x in every lane.
template <class F>
inline Vec<Sum<F>> broadcast(F x) {
  return x - Vec<F>{};
}

#if defined(__AVX512F__)
// Functions that may run AVX512-BF16 and AVX512-VNNI; they do where the machine has them (see Layer::bfloat16_products
// and int8_products).
#define SEQKERNELS_PRODUCT_TARGET __attribute__((target("avx512bf16,avx512vnni")))
template <>
SEQKERNELS_PRODUCT_TARGET inline Vec<float> add_product<bfloat16x2>(Vec<float> sum, Vec<float> w, Vec<float> x) {
  return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(w), bits_of<__m512bh>(x));
}
template <>
inline Vec<float> broadcast(bfloat16x2 x) {
  return bits_of<Vec<float>>(_mm512_set1_epi32(bits_of<int>(x)));
}
#else
#define SEQKERNELS_PRODUCT_TARGET
// The same without that instruction, for tests.
template <>
inline Vec<float> add_product<bfloat16x2>(Vec<float> sum, Vec<float> w, Vec<float> x) {
  const auto low = [](Vec<float> pairs) { return bits_of<Vec<float>>(bits_of<u32>(pairs) << 16); };
  const auto high = [](Vec<float> pairs) { return bits_of<Vec<float>>(bits_of<u32>(pairs) & 0xffff0000u); };
  return sum + low(w) * low(x) + high(w) * high(x);
}
template <>
inline Vec<float> broadcast(bfloat16x2 x) {
  return bits_of<Vec<float>>(bits_of<uint32_t>(x) + u32{});
}
#endif

// Stores the first n lanes of a result of products of F. Where these are of pairs, the machine rounds to bfloat16 by
// one instruction, to which denormal numbers are zero.
template <class F, class S>
SEQKERNELS_INLINE void store_result(S* p, Vec<acc_t<S>> x, int64_t n = kLanes<acc_t<S>>) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<F, bfloat16x2>::value && std::is_same<S, bfloat16>::value) {
    __m256i bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
    return n >= kLanes<float> ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits)
                              : _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
  }
#endif
  store(p, x, n);
}

// Which of how many bfloat16 a number is the sum of.
struct Part {
  int number = 0, count = 1;
};

// What of a number becomes that bfloat16 when it is rounded. Of two the second is what the first leaves. An infinity
// counts as the largest bfloat16 then, as its products with both parts of another number may have both signs.
SEQKERNELS_INLINE Vec<float> part_of(Vec<float> x, Part part) {
  if (part.count == 1) return x;
  constexpr float kMax = 0x1.fep127f;
  const Vec<float> finite = clamp<float>(x, -kMax, kMax);
  return part.number ? finite - to_acc(from_acc(finite, bfloat16{}), bfloat16{}) : finite;
}
inline Vec<double> part_of(Vec<double> x, Part) { return x; }

// A vector of factors, as bits: of the first n numbers from p on, zeros behind them.
template <class F, class S>
inline Vec<Sum<F>> load_factors(const S* p, int64_t n, Part part = {}) {
  if constexpr (std::is_same<F, bfloat16x2>::value) {
    constexpr int V = kLanes<float>;
    bfloat16 numbers[2 * V] = {};
    if constexpr (std::is_same<S, bfloat16>::value) {
      memcpy(numbers, p, n < 2 * V ? n * sizeof(S) : sizeof(numbers));
    } else {
      store_result<F>(numbers, part_of(load(p, n), part));
      if (n > V) store_result<F>(numbers + V, part_of(load(p + V, n - V), part));
    }
    return bits_of<Vec<float>>(numbers);
  } else {
    return load(p, n);
  }
}

// Stores numbers [at, at + lanes of a vector) of a row of n numbers. An unpaired last one is paired with zero.
template <class F>
inline void store_factors(F* row, int64_t at, int64_t n, Vec<Sum<F>> x) {
  if constexpr (std::is_same<F, bfloat16x2>::value) {
    bfloat16* numbers = &row->low + at;
    store_result<F>(numbers, x);
    if (n % 2 && n - at < kLanes<float>) numbers[n - at] = {};
  } else {
    store(row + at, x);
  }
}

constexpr int kMaxVectors = 4;  // of a panel: gates of a cell, or units of a single matrix

// Rows of a tile, and how many factors of each it has (tiles.h).
constexpr int64_t kTileRows = 16, kTileDepth = 16;
constexpr int64_t kMaxTileRows = 2 * kTileRows;  // multiplied at once

// Rows of left factors: `parts` of each number (part_of), those of one part `gap` factors behind those of the other.
struct Parts {
  int count = 1;
  int64_t gap = 0;

  // Stores numbers [at, at + lanes of a vector) of a row of n numbers.
  template <class F>
  SEQKERNELS_INLINE void store(F* row, int64_t at, int64_t n, Vec<Sum<F>> x) const {
    if constexpr (std::is_same<F, bfloat16x2>::value)
      if (count == 2) {
        store_factors(row, at, n, part_of(x, {0, 2}));
        return store_factors(row + gap, at, n, part_of(x, {1, 2}));
      }
    store_factors(row, at, n, x);
  }
};

// Whether tiles multiply such factors.
template <class F>
constexpr bool kInTiles = false;
template <>
constexpr bool kInTiles<bfloat16x2> = true;

// A packed matrix [K, groups, units]: `groups` equal matrices side by side (the gates of a cell). A panel has `width`
// vectors of units of every group, so that all gates of a unit come out of one pass. Per k its vectors lie together.
// The last panel may have fewer. With a single group, lanes behind the last unit are zero. With several, the units that
// remain for the last panel are packed closely, one group's lanes after the other's: 100 units of 4 gates are 25
// vectors and not 28. k counts factors. Vectors of as many factors as a tile is deep are a tile; for products by tiles
// zeros follow the last factor, so that all tiles are whole. Of numbers in two parts, a panel of the second follows
// each of the first.
template <class F>
struct Panels {
  static constexpr int V = kLanes<Sum<F>>;
  int64_t k, units;
  int groups;
  int width;
  int64_t depth;  // k, and the zeros behind it
  int parts;

  // Several vectors a row fill the accumulators with few broadcasts. A single group takes them from its units.
  Panels(int64_t k, int64_t units, int groups, bool tiles = false, int parts = 1)
      : k(k),
        units(units),
        groups(groups),
        width(groups == 1 ? kMaxVectors : 1),
        depth(tiles ? (k + kTileDepth - 1) / kTileDepth * kTileDepth : k),
        parts(parts) {}

  int64_t vectors() const { return vectors_of<Sum<F>>(units); }  // of one group
  int64_t count() const { return (vectors() + width - 1) / width; }
  int64_t size() const { return count() ? offset(count() - 1) + vectors_in(count() - 1) * V * depth * parts : 0; }
  int64_t offset(int64_t panel) const { return panel * width * V * groups * depth * parts; }
  int width_of(int64_t panel) const { return static_cast<int>(min(width, vectors() - panel * width)); }
  // How many lanes lie between a unit's gates.
  int64_t lanes_of_group(int64_t panel) const { return groups == 1 ? V : min(V, units - panel * V); }
  int vectors_in(int64_t panel) const {
    return static_cast<int>(groups == 1 ? width_of(panel) : vectors_of<Sum<F>>(groups * lanes_of_group(panel)));
  }
};

// ---- packing

// rows[i][k] <-> rows[k][i], in log2(V) rounds. Each swaps blocks of half the size.
template <int kBlock, class C, int... kLane>
inline void swap_blocks(Vec<C>& a, Vec<C>& b, std::integer_sequence<int, kLane...>) {
  const Vec<C> low = shuffle<C, (kLane & kBlock ? kLane - kBlock + kLanes<C> : kLane)...>(a, b);
  b = shuffle<C, (kLane & kBlock ? kLane + kLanes<C> : kLane + kBlock)...>(a, b);
  a = low;
}

template <class C, int kBlock = 1>
inline void transpose(Vec<C>* rows) {
  constexpr int V = kLanes<C>;
  if constexpr (kBlock < V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
      if (!(i & kBlock)) swap_blocks<kBlock, C>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, V>{});
    transpose<C, kBlock * 2>(rows);
  }
}

// A panel of which lane l is the row of n numbers from[l]; zeros for null.
template <class F, class S>
__attribute__((noinline)) void pack_lanes(const S* const* from, int vectors, int64_t k, int64_t n, F* packed,
                                          Part part = {}) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  C* panel = reinterpret_cast<C*>(packed);
  for (int64_t k0 = 0; k0 < k; k0 += V)
    for (int v = 0; v < vectors; v++) {
      const int64_t i = k0 * kPerFactor<F>;
      Vec<C> rows[V];
#pragma GCC unroll 16
      for (int u = 0; u < V; u++)
        rows[u] = from[v * V + u] ? load_factors<F>(from[v * V + u] + i, n - i, part) : Vec<C>{};
      transpose<C>(rows);
      for (int64_t u = 0; u < min(V, k - k0); u++) store(panel + ((k0 + u) * vectors + v) * V, rows[u]);
    }
}

// Panel j of a source whose number (group, unit, i) lies at (group * units + unit) * n + i: torch's [gates * H, n].
template <class F, class S>
void pack_transposed(const Panels<F>& shape, int64_t j, const S* source, int64_t n, F* packed) {
  constexpr int V = kLanes<Sum<F>>;
  const int vectors = shape.vectors_in(j);
  const int64_t lanes = shape.lanes_of_group(j), first = j * shape.width * V;
  const S* from[kMaxVectors * V];
  for (int lane = 0; lane < vectors * V; lane++) {
    const int64_t group = shape.groups == 1 ? 0 : lane / lanes, unit = first + lane - group * lanes;
    from[lane] = group < shape.groups && unit < shape.units ? source + (group * shape.units + unit) * n : nullptr;
  }
  for (int part = 0; part < shape.parts; part++)
    pack_lanes(from, vectors, shape.depth, n, packed + shape.offset(j) + part * shape.depth * vectors * V,
               {part, shape.parts});
}

// Rows of n numbers as the lanes of panels: factors that a matrix is multiplied by where it lies. row(r) points to
// them.
template <class F, class Row>
inline void turn_rows(const Panels<F>& shape, int64_t n, const Row& row, F* turned) {
  using S = number_t<F>;
  constexpr int V = kLanes<Sum<F>>;
  for (int64_t j = 0; j < shape.count(); j++) {
    const S* from[kMaxVectors * V];
    for (int64_t lane = 0; lane < shape.vectors_in(j) * V; lane++) {
      const int64_t r = j * shape.width * V + lane;
      from[lane] = r < shape.units ? reinterpret_cast<const S*>(row(r)) : nullptr;
    }
    pack_lanes(from, shape.vectors_in(j), shape.k, n, turned + shape.offset(j));
  }
}

// Lane by lane, a factor of the numbers of successive rows: row(i) is a vector of the i-th.
template <class F, class Row>
inline Vec<Sum<F>> factor_of_rows(int64_t i, int64_t rows, const Row& row) {
  if constexpr (std::is_same<F, bfloat16x2>::value) {
    const auto rounded = [&](int64_t k) { return __builtin_convertvector(from_acc(row(k), bfloat16{}), u32); };
    return bits_of<Vec<float>>(rounded(2 * i) | (2 * i + 1 < rows ? rounded(2 * i + 1) << 16 : u32{}));
  } else {
    return row(i);
  }
}

// Panel j of a source of one group whose element (k, unit) lies at k * units + unit. `rows` rows of the source become
// factors of the panel from `to` on, and zeros those behind them, before `end`.
template <class F, class S>
__attribute__((noinline)) void pack_rows(const Panels<F>& shape, int64_t j, const S* source, int64_t rows, int64_t to,
                                         int64_t end, F* packed) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  const int width = shape.width_of(j);
  for (int part = 0; part < shape.parts; part++) {
    C* panel = reinterpret_cast<C*>(packed + shape.offset(j)) + (part * shape.depth + to) * width * V;
    for (int64_t k = 0; k < end - to; k++)
      for (int v = 0; v < width; v++) {
        const int64_t unit = (j * shape.width + v) * V;
        const auto row = [&](int64_t i) {
          return part_of(load(source + i * shape.units + unit, shape.units - unit), {part, shape.parts});
        };
        store(panel + (k * width + v) * V, k < factors_of<F>(rows) ? factor_of_rows<F>(k, rows, row) : Vec<C>{});
      }
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
