// Matrix products for the recurrence: weights packed once into panels, and a register-blocked microkernel over them.
#pragma once
#include "vec.h"

namespace seqkernels::SEQKERNELS_ISA {

// A packed matrix [K, groups, units]: `groups` equal matrices side by side (the gates of a cell). A panel holds up to
// kWidth vectors of units of every group, so that all gates of a unit come out of one pass; per k its vectors lie
// together. Lanes behind the last unit are zero.
struct Packed {
  int64_t k, units;
  int groups;
  int width;  // vectors of units in a full panel
};

template <class C>
inline Packed packed_shape(int64_t k, int64_t units, int groups) {
  // 4 vectors a row fill the accumulators with the fewest broadcasts; a single group shares them among its units.
  return {k, units, groups, groups == 1 ? 4 : 1};
}

template <class C>
inline int64_t panel_units(const Packed& shape) {
  return shape.width * kLanes<C>;
}

template <class C>
inline int64_t panels(const Packed& shape) {
  return (shape.units + panel_units<C>(shape) - 1) / panel_units<C>(shape);
}

// Vectors of units in panel j: the last panel may be narrower.
template <class C>
inline int panel_width(const Packed& shape, int64_t j) {
  const int64_t left = (shape.units - j * panel_units<C>(shape) + kLanes<C> - 1) / kLanes<C>;
  return static_cast<int>(left < shape.width ? left : shape.width);
}

template <class C>
inline int64_t panel_offset(const Packed& shape, int64_t j) {
  return j * panel_units<C>(shape) * shape.groups * shape.k;
}

template <class C>
inline int64_t packed_size(const Packed& shape) {
  return panels<C>(shape) * panel_units<C>(shape) * shape.groups * shape.k;
}

// Element (k, group, unit) of the source lies at source[group * group_stride + unit * unit_stride + k * k_stride].
template <class S>
inline void pack_panel(const Packed& shape, int64_t j, const S* source, int64_t group_stride, int64_t unit_stride,
                       int64_t k_stride, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int V = kLanes<C>;
  constexpr int64_t kBlock = 64;  // steps of k whose lines stay in L1 while all lanes pass over them
  const int width = panel_width<C>(shape, j), vectors = width * shape.groups;
  C* panel = packed + panel_offset<C>(shape, j);
  for (int64_t k0 = 0; k0 < shape.k; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < shape.k ? k0 + kBlock : shape.k;
    for (int v = 0; v < vectors; v++) {
      const int group = v / width;
      for (int lane = 0; lane < V; lane++) {
        const int64_t unit = j * panel_units<C>(shape) + (v % width) * V + lane;
        C* to = panel + v * V + lane;
        if (unit >= shape.units) {
          for (int64_t k = k0; k < k1; k++) to[k * vectors * V] = 0;
          continue;
        }
        const S* from = source + group * group_stride + unit * unit_stride;
        for (int64_t k = k0; k < k1; k++) to[k * vectors * V] = scalar(from[k * k_stride]);
      }
    }
  }
}

// Steps of k that are added up before their sum joins the total: rounding errors grow with the length of a chain.
constexpr int64_t kChain = 64;

// out[r][v] = sum over k of a[r * lda + k] * panel[k][v], for R rows and N vectors; always in the same order, so that
// a row's result does not depend on the rows beside it.
template <int R, int N, class C>
inline void multiply(int64_t k, const C* a, int64_t lda, const C* panel, Vec<C>* out) {
  constexpr int V = kLanes<C>;
  for (int64_t k0 = 0; k0 < k; k0 += kChain) {
    const int64_t k1 = k0 + kChain < k ? k0 + kChain : k;
    Vec<C> sum[R][N] = {};
    for (int64_t i = k0; i < k1; i++) {
      Vec<C> w[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) w[v] = load(panel + (i * N + v) * V);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const C x = a[r * lda + i];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[r][v] += w[v] * x;
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) out[r * N + v] = k0 ? out[r * N + v] + sum[r][v] : sum[r][v];
  }
}

template <int N>
constexpr int kRows = kAccumulators / N < 8 ? kAccumulators / N : 8;

template <int N, class C, int R = kRows<N>>
inline void multiply_rows(int rows, int64_t k, const C* a, int64_t lda, const C* panel, Vec<C>* out) {
  if (rows == R) return multiply<R, N>(k, a, lda, panel, out);
  if constexpr (R > 1) multiply_rows<N, C, R - 1>(rows, k, a, lda, panel, out);
}

// Multiplies a [rows, K] with a panel, a block of rows at a time; each(r, out) sees the vectors of row r.
template <int N, class C, class Each>
inline void for_rows(int64_t rows, int64_t k, const C* a, int64_t lda, const C* panel, const Each& each) {
  Vec<C> out[kRows<N> * N];
  // Blocks of nearly equal height: a last block of one row would leave the multipliers idle.
  const int64_t blocks = (rows + kRows<N> - 1) / kRows<N>;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t r0 = rows * b / blocks, r1 = rows * (b + 1) / blocks;
    multiply_rows<N>(static_cast<int>(r1 - r0), k, a + r0 * lda, lda, panel, out);
    for (int64_t r = r0; r < r1; r++) each(r, out + (r - r0) * N);
  }
}

// The product of a [rows, K] with a packed matrix of one group; each(r, unit, lanes, x) sees every vector of it.
template <class C, class Each>
inline void product(const Packed& shape, int64_t rows, const C* a, int64_t lda, const C* packed, const Each& each) {
  constexpr int V = kLanes<C>;
  for (int64_t j = 0; j < panels<C>(shape); j++) {
    const C* panel = packed + panel_offset<C>(shape, j);
    const int64_t unit0 = j * panel_units<C>(shape);
    const auto rows_of = [&](auto width) {
      constexpr int N = decltype(width)::value;
      for_rows<N>(rows, shape.k, a, lda, panel, [&](int64_t r, const Vec<C>* out) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
          const int64_t unit = unit0 + v * V;
          each(r, unit, shape.units - unit < V ? shape.units - unit : V, out[v]);
        }
      });
    };
    switch (panel_width<C>(shape, j)) {
      case 1: rows_of(std::integral_constant<int, 1>{}); break;
      case 2: rows_of(std::integral_constant<int, 2>{}); break;
      case 3: rows_of(std::integral_constant<int, 3>{}); break;
      default: rows_of(std::integral_constant<int, 4>{});
    }
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
