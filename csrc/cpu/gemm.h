// Matrix products: weights packed into panels, a register-blocked microkernel over them, and loops around it.
#pragma once
#include <utility>

#include "team.h"
#include "vec.h"

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

// A packed matrix [K, groups, units]: `groups` equal matrices side by side (the gates of a cell). A panel holds
// `width` vectors of units of every group, so that all gates of a unit come out of one pass; per k its vectors lie
// together. The last panel may be narrower. Of a single group, lanes behind the last unit are zero; of several, the
// units left over for the last panel are packed closely, one group's lanes after the other's: 100 units of 4 gates are
// 25 vectors and not 28. k counts factors.
template <class F>
struct Panels {
  static constexpr int V = kLanes<Sum<F>>;
  int64_t k, units;
  int groups;
  int width;

  // 4 vectors a row fill the accumulators with the fewest broadcasts; a single group takes them of its units.
  Panels(int64_t k, int64_t units, int groups) : k(k), units(units), groups(groups), width(groups == 1 ? 4 : 1) {}

  int64_t vectors() const { return vectors_of<Sum<F>>(units); }  // of one group
  int64_t count() const { return (vectors() + width - 1) / width; }
  int64_t size() const { return count() ? offset(count() - 1) + vectors_in(count() - 1) * V * k : 0; }
  int64_t offset(int64_t panel) const { return panel * width * V * groups * k; }
  int width_of(int64_t panel) const { return static_cast<int>(least(width, vectors() - panel * width)); }
  // How many lanes lie between a unit's gates.
  int64_t lanes_of_group(int64_t panel) const { return groups == 1 ? V : least(V, units - panel * V); }
  int vectors_in(int64_t panel) const {
    return static_cast<int>(groups == 1 ? width_of(panel) : vectors_of<Sum<F>>(groups * lanes_of_group(panel)));
  }
};

constexpr int kMostVectors = 4;  // of a panel

// ---- packing

// rows[i][k] <-> rows[k][i]: in log2(V) rounds, each swapping blocks of half the size.
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

// Panel j of a source whose number (group, unit, i) lies at (group * units + unit) * n + i: torch's [gates * H, n].
template <class F, class S>
__attribute__((noinline)) void pack_transposed(const Panels<F>& shape, int64_t j, const S* source, int64_t n,
                                               F* packed) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  const int vectors = shape.vectors_in(j);
  const int64_t lanes = shape.lanes_of_group(j), first = j * shape.width * V;
  C* panel = reinterpret_cast<C*>(packed + shape.offset(j));
  const S* from[kMostVectors * V];
  for (int lane = 0; lane < vectors * V; lane++) {
    const int64_t group = shape.groups == 1 ? 0 : lane / lanes, unit = first + lane - group * lanes;
    from[lane] = group < shape.groups && unit < shape.units ? source + (group * shape.units + unit) * n : nullptr;
  }
  for (int64_t k = 0; k < shape.k; k += V)
    for (int v = 0; v < vectors; v++) {
      const int64_t i = k * kPerFactor<F>;
      Vec<C> rows[V];
#pragma GCC unroll 16
      for (int u = 0; u < V; u++) rows[u] = from[v * V + u] ? load_factors<F>(from[v * V + u] + i, n - i) : Vec<C>{};
      transpose<C>(rows);
      for (int64_t u = 0; u < least(V, shape.k - k); u++) store(panel + ((k + u) * vectors + v) * V, rows[u]);
    }
}

// Panel j of a source of one group whose element (k, unit) lies at k * units + unit. Rows [first, first + count) of the
// source become the panel's from row `to` on.
template <class S>
__attribute__((noinline)) void pack_rows(const Panels<Compute<S>>& shape, int64_t j, const S* source, int64_t first,
                                         int64_t count, int64_t to, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int V = kLanes<C>;
  const int width = shape.width_of(j);
  C* panel = packed + shape.offset(j) + to * width * V;
  for (int64_t k = 0; k < count; k++)
    for (int v = 0; v < width; v++) {
      const int64_t unit = (j * shape.width + v) * V;
      store(panel + (k * width + v) * V, load(source + (first + k) * shape.units + unit, shape.units - unit));
    }
}

// ---- products

// Steps of k that are added up before their sum joins the total: rounding errors grow with the length of a chain.
constexpr int64_t kChain = 128;

// out[r][v] (+)= sum over k of a[r][k * step] * panel[k][v], for R rows and N vectors, the panel's rows `stride` apart;
// always in the same order, so that a row's result does not depend on the rows beside it.
template <int R, int N, class F>
SEQKERNELS_PRODUCT_TARGET __attribute__((noinline)) void multiply(int64_t k, const F* const* a, int64_t step,
                                                                  const F* panel, int64_t stride, bool add,
                                                                  Vec<Sum<F>>* out) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  const F* row[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) row[r] = a[r];
  const int64_t chains = (k + kChain - 1) / kChain;
  for (int64_t chain = 0, at = 0; chain < chains; chain++) {
    Vec<C> sum[R][N] = {};
    for (const int64_t end = k * (chain + 1) / chains * step; at < end; at += step, panel += stride) {
      Vec<C> w[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) w[v] = load(reinterpret_cast<const C*>(panel) + v * V);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const Vec<C> x = broadcast(row[r][at]);
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[r][v] = add_product<F>(sum[r][v], w[v], x);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) out[r * N + v] = add || chain ? out[r * N + v] + sum[r][v] : sum[r][v];
  }
}

template <int N>
constexpr int kRows = kAccumulators / N < 8 ? kAccumulators / N : 8;

template <int N, class F, int R = kRows<N>>
void multiply_rows(int rows, int64_t k, const F* const* a, int64_t step, const F* panel, int64_t stride, bool add,
                   Vec<Sum<F>>* out) {
  if (rows == R) return multiply<R, N>(k, a, step, panel, stride, add, out);
  if constexpr (R > 1) multiply_rows<N, F, R - 1>(rows, k, a, step, panel, stride, add, out);
}

// Steps of k whose slice of a panel stays in the caches nearby while rows pass over it, and rows that do so.
constexpr int64_t kDepth = 384;
constexpr int64_t kRowsBlock = 48;

// Factors of a product that lie in `segments` pieces of k numbers, `gap` apart (the directions of a layer).
struct Depth {
  int64_t k;
  int segments = 1;
  int64_t gap = 0;
};

// A block of at most kRowsBlock rows, which a[] points to (and is moved along), with N vectors of a panel.
template <int N, class F>
__attribute__((noinline)) void multiply_block(int64_t rows, Depth depth, const F** a, const F* panel, int64_t stride,
                                              Vec<Sum<F>>* out) {
  // Tiles of nearly equal height: a last tile of one row would leave the multipliers idle.
  const int64_t tiles = (rows + kRows<N> - 1) / kRows<N>;
  for (int segment = 0; segment < depth.segments; segment++) {
    for (int64_t k0 = 0; k0 < depth.k; k0 += kDepth) {
      const int64_t k = least(depth.k - k0, kDepth);
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
        multiply_rows<N>(static_cast<int>(r1 - r0), k, a + r0, 1, panel, stride, segment || k0, out + r0 * N);
      }
      panel += k * stride;
      for (int64_t r = 0; r < rows; r++) a[r] += k;
    }
    for (int64_t r = 0; r < rows; r++) a[r] += depth.gap - depth.k;
  }
}

// Multiplies rows (row(r) points to them) with N vectors of a panel; each(r, out) sees the vectors of row r, behind
// which lies one more that may be read.
template <int N, class F, class Row, class Each>
inline void for_rows(int64_t rows, Depth depth, const Row& row, const F* panel, int64_t stride, const Each& each) {
  Vec<Sum<F>> out[kRowsBlock * N + 1];
  out[kRowsBlock * N] = Vec<Sum<F>>{};
  const F* a[kRowsBlock];
  const int64_t tall = depth.k > kDepth ? kRowsBlock / kRows<N> * kRows<N> : kRows<N>;
  const int64_t blocks = (rows + tall - 1) / tall;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t r0 = rows * b / blocks, count = rows * (b + 1) / blocks - r0;
    for (int64_t r = 0; r < count; r++) a[r] = row(r0 + r);
    multiply_block<N>(count, depth, a, panel, stride, out);
    for (int64_t r = 0; r < count; r++) each(r0 + r, out + r * N);
  }
}

// Panels j in [first, last), from the last one on if `backwards`: when steps take turns, each finds in the cache what
// the step before used last, although all panels together may not fit into it.
template <class Each>
inline void for_panels(int64_t first, int64_t last, bool backwards, const Each& each) {
  for (int64_t i = first; i < last; i++) each(backwards ? first + last - 1 - i : i);
}

// Calls run(constant) with the number of vectors as a compile-time constant.
template <class Run>
inline void with_width(int64_t vectors, const Run& run) {
  switch (vectors) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    default: return run(std::integral_constant<int, 4>{});
  }
}

// The product of rows with vectors [first, last) of a packed matrix of one group; each(r, unit, lanes, x) sees every
// vector of it.
template <class F, class Row, class Each>
inline void product(const Panels<F>& shape, const F* packed, int64_t first, int64_t last, int64_t rows, Depth depth,
                    const Row& row, const Each& each, bool backwards = false) {
  constexpr int V = kLanes<Sum<F>>;
  if (first >= last) return;
  for_panels(first / shape.width, (last - 1) / shape.width + 1, backwards, [&](int64_t j) {
    const int64_t u = most(first, j * shape.width), end = least(last, (j + 1) * shape.width);
    const int64_t stride = shape.width_of(j) * V;
    const F* panel = packed + shape.offset(j) + u % shape.width * V;
    const auto rows_of = [&](auto width) {
      constexpr int N = decltype(width)::value;
      for_rows<N>(rows, depth, row, panel, stride, [&](int64_t r, const Vec<Sum<F>>* out) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
          const int64_t unit = (u + v) * V;
          each(r, unit, least(shape.units - unit, V), out[v]);
        }
      });
    };
    with_width(end - u, rows_of);
  });
}

// Dot products of a row of n numbers with V rows of w [*, n], those from `lanes` on repeating the last: for a matrix
// that is used too seldom to be worth packing.
template <class F, class S>
SEQKERNELS_PRODUCT_TARGET __attribute__((noinline)) Vec<Sum<F>> dots(const S* w, int64_t lanes, int64_t n, const F* a) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>, kStep = V * kPerFactor<F>;
  const C* factors = reinterpret_cast<const C*>(a);
  Vec<C> sums[V] = {};
  const S* row[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) row[i] = w + least(i, lanes - 1) * n;
  int64_t at = 0;
  for (; at + kStep <= n; at += kStep, factors += V) {
    const Vec<C> x = load(factors);
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) sums[i] = add_product<F>(sums[i], load_factors<F>(row[i] + at, kStep), x);
  }
  if (at < n) {
    const Vec<C> x = load(factors, factors_of<F>(n - at));
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) sums[i] = add_product<F>(sums[i], load_factors<F>(row[i] + at, n - at), x);
  }
  transpose<C>(sums);
#pragma GCC unroll 4
  for (int width = V / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace seqkernels::SEQKERNELS_ISA
