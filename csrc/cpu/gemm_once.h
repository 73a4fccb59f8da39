// Products with a matrix that is used once, which lies as torch has it: it is read, or written, in the order in which
// it lies, as few rows wait for its memory.
#pragma once
#include "gemm.h"

namespace seqkernels::SEQKERNELS_ISA {

constexpr int64_t kSlice = 64;  // rows of a matrix that is used once, whose products are added up first

// sums[r][v] += the sum of a[r][i] * w[i][v] over N rows of a matrix, from its first n columns on.
template <int R, int N, class S, class C>
__attribute__((noinline)) void add_rows_of_matrix(const S* const* w, const C* const* a, int64_t n,
                                                  Vec<C>* const* sums) {
  constexpr int V = kLanes<C>;
  Vec<C> x[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) x[r][i] = broadcast(a[r][i]);
  const auto add = [&](int64_t at, auto lanes) {
    Vec<C> row[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) row[i] = load(w[i] + at, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vec<C> sum = sums[r][at / V];
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) sum = add_product<C>(sum, row[i], x[r][i]);
      sums[r][at / V] = sum;
    }
  };
  int64_t at = 0;
  for (; at + V <= n; at += V) add(at, std::integral_constant<int64_t, V>{});
  if (at < n) add(at, n - at);
}

// What product_once does for few rows, with the same bits: slice after slice of the matrix, and of each, row after row.
// R: `rows` or more, those behind the last being the last again.
template <int R, class S, class Source, class Row, class Each>
inline void product_of_few_rows(const Panels<acc_t<S>>& shape, const Source& source, int64_t first, int64_t last,
                                int64_t rows, const Row& row, const Each& each, Vec<acc_t<S>>* of_slice,
                                Vec<acc_t<S>>* sums) {
  using C = acc_t<S>;
  constexpr int V = kLanes<C>;
  constexpr int64_t kStrip = kKc * kMaxVectors / (3 * R);  // vectors: sums of a slice stay in the nearest cache
  for (int64_t k0 = 0; k0 < shape.k; k0 += kSlice)
    for (int64_t strip = first; strip < last; strip += kStrip) {
      const int64_t end = min(last, strip + kStrip), n = min(shape.units, end * V) - strip * V;
      const int64_t k_end = min(shape.k, k0 + kSlice);
      Vec<C>* parts[R];
      for (int r = 0; r < R; r++) parts[r] = of_slice + r * kStrip;
      for (int64_t i = 0; i < R * kStrip; i++) of_slice[i] = Vec<C>{};
      const auto add = [&](int64_t k, auto count) {
        constexpr int N = decltype(count)::value;
        const S* w[N];
        const C* a[R];
        for (int i = 0; i < N; i++) w[i] = source(k + i) + strip * V;
        for (int64_t r = 0; r < R; r++) a[r] = row(min(r, rows - 1)) + k;
        add_rows_of_matrix<R, N>(w, a, n, parts);
      };
      int64_t k = k0;
      for (; k + 4 <= k_end; k += 4) add(k, std::integral_constant<int, 4>{});
      for (; k < k_end; k++) add(k, std::integral_constant<int, 1>{});
      for (int64_t r = 0; r < rows; r++)
        for (int64_t u = strip; u < end; u++) {
          Vec<C>& sum = sums[r * (last - first) + u - first];
          sum = k0 ? sum + parts[r][u - strip] : parts[r][u - strip];
        }
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t u = first; u < last; u++)
      each(r, u * V, min(shape.units - u * V, V), sums[r * (last - first) + u - first]);
}

// Calls run(constant) with a constant that is at least `rows`.
template <class Run>
inline void with_few_rows(int64_t rows, const Run& run) {
  if (rows <= 1) return run(std::integral_constant<int, 1>{});
  if (rows <= 2) return run(std::integral_constant<int, 2>{});
  if (rows <= 4) return run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, kFewRows>{});
}

// out[i][v] = sum over R rows of a[r][columns[i]] * right[r][v], for n numbers of each of N columns.
template <int R, int N, class C>
__attribute__((noinline)) void multiply_columns(const C* const* a, const int64_t* columns, const C* const* right,
                                                int64_t n, C* const* out) {
  constexpr int V = kLanes<C>;
  Vec<C> x[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) x[r][i] = broadcast(a[r][columns[i]]);
  const auto multiply_at = [&](int64_t at, auto lanes) {
    Vec<C> sums[N] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<C> of_row = load(right[r] + at);
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) sums[i] = add_product<C>(sums[i], of_row, x[r][i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) store(out[i] + at, sums[i], lanes);
  };
  int64_t at = 0;
  for (; at + V <= n; at += V) multiply_at(at, std::integral_constant<int64_t, V>{});
  if (at < n) multiply_at(at, n - at);
}

// The same of columns [first, last), of `rows` rows, as many as fill the registers at once: out(column) is a place.
template <int R, class C, class Out>
inline void multiply_all_columns(int64_t rows, const C* const* a, int64_t first, int64_t last, const C* const* right,
                                 int64_t n, const Out& out) {
  if constexpr (R > 1)
    if (rows < R) return multiply_all_columns<R - 1>(rows, a, first, last, right, n, out);
  constexpr int N = R == 1 ? 4 : R <= 6 ? 2 : 1;
  for (int64_t column = first; column < last; column += N) {
    int64_t columns[N];
    C* places[N];
    for (int64_t i = 0; i < N; i++) columns[i] = min(column + i, last - 1), places[i] = out(columns[i]);
    multiply_columns<R, N>(a, columns, right, n, places);
  }
}

// As `product`, with a matrix of which row k lies at source(k), read in the order in which it lies, kSlice of its rows
// after the other. They are packed into `slice` just before they are multiplied with, unless there are few rows. sums:
// [rows, last - first] vectors.
constexpr int64_t kSliceVectors = kKc * kMaxVectors / kSlice;

template <class S, class Source, class Row, class Each>
inline void product_once(const Panels<acc_t<S>>& shape, const Source& source, int64_t first, int64_t last, int64_t rows,
                         const Row& row, const Each& each, acc_t<S>* slice, Vec<acc_t<S>>* sums) {
  using C = acc_t<S>;
  constexpr int V = kLanes<C>;
  if (rows <= kFewRows)
    return with_few_rows(rows, [&](auto count) {
      product_of_few_rows<decltype(count)::value, S>(shape, source, first, last, rows, row, each,
                                                     reinterpret_cast<Vec<C>*>(slice), sums);
    });
  const auto for_panels_of = [&](int64_t begin, int64_t end, const auto& run) {
    for (int64_t u = begin; u < end; u += kMaxVectors)
      with_width(min(kMaxVectors, end - u), [&](auto width) { run(u, width, sums + (u - first) * rows); });
  };
  for (int64_t k0 = 0; k0 < shape.k; k0 += kSlice)
    for (int64_t strip = first; strip < last; strip += kSliceVectors) {
      const int64_t end = min(last, strip + kSliceVectors), depth = min(kSlice, shape.k - k0);
      for (int64_t k = 0; k < depth; k++)
        for_panels_of(strip, end, [&](int64_t u, auto width, Vec<C>*) {
          for (int64_t v = 0; v < width; v++)
            store(slice + ((u - strip) * depth + k * width + v) * V,
                  load(source(k0 + k) + (u + v) * V, shape.units - (u + v) * V));
        });
      for_panels_of(strip, end, [&](int64_t u, auto width, Vec<C>* out) {
        constexpr int N = decltype(width)::value;
        const C* panel = slice + (u - strip) * depth * V;
        const int64_t runs = (rows + kMr<N> - 1) / kMr<N>;
        for (int64_t i = 0; i < runs; i++) {
          const int64_t r0 = rows * i / runs, count = rows * (i + 1) / runs - r0;
          const C* a[kMr<N>];
          for (int64_t r = 0; r < count; r++) a[r] = row(r0 + r) + k0;
          const Sums<C> to{out + r0 * N, N};
          multiply_rows<N>(count, 1, {0, depth}, a, panel, N * V, k0 ? to.more() : to);
        }
      });
    }
  for_panels_of(first, last, [&](int64_t u, auto width, const Vec<C>* out) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t v = 0; v < width; v++) each(r, (u + v) * V, min(shape.units - (u + v) * V, V), out[r * width + v]);
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
