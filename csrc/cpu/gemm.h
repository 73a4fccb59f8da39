// Matrix products: a register-blocked microkernel over packed panels, and the loops around it.
#pragma once
#include "tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

// Rounding errors grow with the length of a chain of sums, so that each chain has so many steps of k at most. Its slice
// of a panel stays in the first-level cache while rows pass over it.
constexpr int64_t kChain = 128;

struct Chain {
  int64_t begin, end;  // of k
};

// Calls run(chain) for each of those of k steps.
template <class Run>
inline void for_chains(int64_t k, const Run& run) {
  const int64_t chains = (k + kChain - 1) / kChain;
  for (int64_t i = 0; i < chains; i++) run(Chain{k * i / chains, k * (i + 1) / chains});
}

// Where rows of sums go, and what is added to each, unless that is null. Rows are so many vectors apart; 0 where all
// add the same.
template <class F>
struct Sums {
  Vec<Sum<F>>* to;
  int64_t stride;
  const Vec<Sum<F>>* added = nullptr;
  int64_t added_stride = 0;

  // What comes on top of sums that are there.
  Sums more() const { return {to, stride, to, stride}; }
  Sums from(int64_t row) const {
    return {to + row * stride, stride, added ? added + row * added_stride : added, added_stride};
  }
};

// The microkernel: sums over the k of a chain of a[r][k * step] * panel[k][v], for R rows and N vectors, the panel's
// rows `stride` apart; then the same of the next R rows, `runs` times. It always adds in the same order, so that a
// row's result does not depend on the rows beside it.
template <int R, int N, class F>
SEQKERNELS_PRODUCT_TARGET __attribute__((noinline)) void multiply(int64_t runs, Chain chain, const F* const* a,
                                                                  int64_t step, const F* panel, int64_t stride,
                                                                  Sums<F> sums) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  panel += chain.begin * stride;
  for (; runs; runs--, a += R, sums = sums.from(R)) {
    const F* row[R];
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) row[r] = a[r];
    Vec<C> sum[R][N] = {};
    const F* panel_row = panel;
    for (int64_t at = chain.begin * step; at < chain.end * step; at += step, panel_row += stride) {
      const auto x_of = [&](int r) { return in_register<N>(broadcast(row[r][at])); };
      const auto w_of = [&](int v) {
        return in_register<R>(Vec<C>(load(reinterpret_cast<const C*>(panel_row) + v * V)));
      };
      if constexpr (R <= N) {  // registers hold the fewer factors, so that each is read once
        Vec<C> x[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) x[r] = x_of(r);
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
          const Vec<C> w = w_of(v);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) sum[r][v] = add_product<F>(sum[r][v], w, x[r]);
        }
      } else {
        Vec<C> w[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) w[v] = w_of(v);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) {
          const Vec<C> x = x_of(r);
#pragma GCC unroll 8
          for (int v = 0; v < N; v++) sum[r][v] = add_product<F>(sum[r][v], w[v], x);
        }
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++)
        sums.to[r * sums.stride + v] = sums.added ? sums.added[r * sums.added_stride + v] + sum[r][v] : sum[r][v];
  }
}

// Rows of the microkernel, with N vectors each.
template <int N>
constexpr int kMr = kAccumulators / N < 8 ? kAccumulators / N : 8;

// `runs` times as many rows.
template <int N, class F, int R = kMr<N>>
void multiply_rows(int64_t rows, int64_t runs, const Chain& chain, const F* const* a, const F* panel, int64_t stride,
                   const Sums<F>& sums) {
  if (rows == R) return multiply<R, N>(runs, chain, a, 1, panel, stride, sums);
  if constexpr (R > 1) multiply_rows<N, F, R - 1>(rows, runs, chain, a, panel, stride, sums);
}

// In BLIS's words: kMc rows pass over a panel, and of one that is packed just to be used once kKc steps of k.
constexpr int64_t kMc = 48;
constexpr int64_t kKc = 384;

// Which rows are multiplied together: at most kMc, those of some runs of the microkernel, or of whole AMX tiles. Each
// run has nearly as many rows, as one row at the end would not use all multipliers.
struct RowBlocks {
  int64_t rows, runs, count;
  bool tiles;

  RowBlocks(int64_t rows, int64_t of_run, bool tiles)
      : rows(rows),
        runs((rows + of_run - 1) / of_run),
        count(tiles ? max(min(rows, 1), (rows + kTileRows) / (2 * kTileRows)) : (runs * of_run + kMc - 1) / kMc),
        tiles(tiles) {}

  // Of tiles, two a block, and what is left in the last: as it is not less than one, unless all is.
  int64_t begin(int64_t block) const {
    if (tiles) return block == count ? rows : 2 * kTileRows * block;
    return rows * (runs * block / count) / runs;
  }
};
static_assert(3 * kTileRows <= kMc && kMc % kMr<1> == 0 && kMc % kMr<2> == 0 && kMc % kMr<3> == 0 && kMc % kMr<4> == 0);

// Multiplies a block of at most kMc rows with N vectors of a panel. a[] points to the rows, and moves along them.
template <int N, class F>
__attribute__((noinline)) void multiply_block(int64_t rows, Depth depth, const F** a, const F* panel, int64_t stride,
                                              Sums<F> sums) {
#if defined(SEQKERNELS_TILES)
  if constexpr (kInTiles<F>)
    if (depth.tiles)
      return with_parts(depth, [&](auto in_parts) {
        multiply_block_by_tiles<N, decltype(in_parts)::value>(rows, depth, a, panel, stride, sums.to);
      });
#endif
  if (!depth.k) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t v = 0; v < N; v++)
        sums.to[r * sums.stride + v] = sums.added ? sums.added[r * sums.added_stride + v] : Vec<Sum<F>>{};
    return;
  }
  const int64_t runs = (rows + kMr<N> - 1) / kMr<N>, of_run = rows / runs, longer = rows - of_run * runs;
  const int64_t of_longer = longer * (of_run + 1);
  for (int segment = 0; segment < depth.segments; segment++) {
    for_chains(depth.k, [&](const Chain& chain) {
      if (longer) multiply_rows<N>(of_run + 1, longer, chain, a, panel, stride, sums);
      multiply_rows<N>(of_run, runs - longer, chain, a + of_longer, panel, stride, sums.from(of_longer));
      sums = sums.more();
    });
    panel += depth.k * stride;
    for (int64_t r = 0; r < rows; r++) a[r] += depth.gap;
  }
}

// Multiplies rows (row(r) points to them) with N vectors of a panel. each(r, out) sees the vectors of row r, behind
// which lies one more that may be read, and may change them; then(r, out) sees what it has left there, after all rows
// beside it.
template <int N, class F, class Row, class Each, class Then>
inline void for_rows(int64_t rows, Depth depth, const Row& row, const F* panel, int64_t stride, const Each& each,
                     const Then& then) {
  Vec<Sum<F>> out[kMc * N + 1];
  out[kMc * N] = Vec<Sum<F>>{};
  const F* a[kMc];
  const RowBlocks blocks(rows, kMr<N>, depth.tiles);
  for (int64_t b = 0, r0 = 0, count; b < blocks.count; b++, r0 += count) {
    count = blocks.begin(b + 1) - r0;
    for (int64_t r = 0; r < count; r++) a[r] = row(r0 + r);
    multiply_block<N>(count, depth, a, panel, stride, {out, N});
    for (int64_t r = 0; r < count; r++) each(r0 + r, out + r * N);
    for (int64_t r = 0; r < count; r++) then(r0 + r, out + r * N);
  }
}
template <int N, class F, class Row, class Each>
inline void for_rows(int64_t rows, Depth depth, const Row& row, const F* panel, int64_t stride, const Each& each) {
  for_rows<N>(rows, depth, row, panel, stride, each, [](int64_t, const Vec<Sum<F>>*) {});
}

// Sums that are stored as they are, with one row added to each, all in whole vectors. In calls of product() the
// microkernel itself puts them there, if there is one chain: what is added comes last, or bits would depend on who
// adds.
template <class F>
struct Stored {
  Sum<F>* rows;
  int64_t stride;
  const Sum<F>* added;

  void operator()(int64_t r, int64_t unit, int64_t, Vec<Sum<F>> x) const {
    store(rows + r * stride + unit, x + load(added + unit));
  }
};
inline bool stores_sums(const Depth& depth) { return !depth.tiles && depth.segments == 1 && depth.k <= kChain; }
template <int N, class F, class Row>
inline void store_rows(int64_t rows, Depth depth, const Row& row, const F* panel, int64_t stride, const Stored<F>& to,
                       int64_t unit) {
  constexpr int V = kLanes<Sum<F>>;
  const F* a[kMc];
  const RowBlocks blocks(rows, kMr<N>, false);
  for (int64_t b = 0, r0 = 0, count; b < blocks.count; b++, r0 += count) {
    count = blocks.begin(b + 1) - r0;
    for (int64_t r = 0; r < count; r++) a[r] = row(r0 + r);
    multiply_block<N>(count, depth, a, panel, stride,
                      {reinterpret_cast<Vec<Sum<F>>*>(to.rows + r0 * to.stride + unit), to.stride / V,
                       reinterpret_cast<const Vec<Sum<F>>*>(to.added + unit), 0});
  }
}

// Panels j in [first, last), from the last one on if `backwards`. All panels together may not fit into the cache. If
// every other step goes backwards, each finds there what the step before it used last.
template <class Each>
inline void for_panels(int64_t first, int64_t last, bool backwards, const Each& each) {
  for (int64_t i = first; i < last; i++) each(backwards ? first + last - 1 - i : i);
}

#if defined(SEQKERNELS_TILES)
// Multiplies rows with `panels` panels of N vectors by tiles; panel(i) points to them, one panel after the other.
// each(i, r, out) sees the vectors of row r while the tiles of the next rows are multiplied.
template <int N, bool kInParts, class Row, class Panel, class Each>
SEQKERNELS_INLINE void for_panels_by_tiles(int64_t panels, const Panel& panel, int64_t stride, int64_t rows,
                                           const Depth& depth, const Row& row, const Each& each) {
  const int64_t blocks = (rows + kMaxTileRows - 1) / kMaxTileRows, items = panels * blocks;
  using F = std::remove_const_t<std::remove_pointer_t<decltype(panel(0))>>;
  Vec<Sum<F>> sums[2][kMaxTileRows * N];
  TileProducts<N, kInParts, F> products(depth, stride);
  const auto first_new = [&](int64_t item) { return item % blocks * kMaxTileRows; };
  const auto first_of = [&](int64_t item) { return min(first_new(item), max(0, rows - kTileRows)); };
  const auto end_of = [&](int64_t item) { return min(rows, first_new(item) + kMaxTileRows); };
  const auto begin = [&](int64_t item) {
    const int64_t first = first_of(item);
    const auto row_of = [&](int64_t r) { return row(first + r); };
    products.begin(end_of(item) - first, row_of, panel(item / blocks), sums[item % 2]);
    return products.slices();
  };
  for (int64_t slices = items ? begin(0) : 0; slices; slices--) products.slice();
  for (int64_t item = 0; item < items; item++) {
    const int64_t slices = item + 1 < items ? begin(item + 1) : 0, first = first_new(item),
                  count = end_of(item) - first;
    const Vec<Sum<F>>* out = sums[item % 2] + (first - first_of(item)) * N;
    for (int64_t r = 0, due = 0, i = item / blocks; r < count; r++) {
      each(i, first + r, out + r * N);
      for (due += slices; due >= count; due -= count) products.slice();
    }
  }
}

// The same of panels [first, last) of a packed matrix, all of N vectors: each(panel, r, out).
template <int N, class F, class Row, class Each>
SEQKERNELS_INLINE void for_packed_by_tiles(const Panels<F>& shape, const F* packed, int64_t first, int64_t last,
                                           bool backwards, int64_t rows, const Depth& depth, const Row& row,
                                           const Each& each) {
  const auto panel_of = [&](int64_t i) { return backwards ? last - 1 - i : first + i; };
  with_parts(depth, [&](auto in_parts) {
    for_panels_by_tiles<N, decltype(in_parts)::value>(
        last - first, [&](int64_t i) { return packed + shape.offset(panel_of(i)); }, N * kLanes<Sum<F>>, rows, depth,
        row, [&](int64_t i, int64_t r, const Vec<Sum<F>>* out) { each(panel_of(i), r, out); });
  });
}
#endif

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

// The product of rows with vectors [first, last) of a packed matrix of one group. each(r, unit, lanes, x) sees every
// vector of it.
template <class F, class Row, class Each>
inline void product(const Panels<F>& shape, const F* packed, int64_t first, int64_t last, int64_t rows, Depth depth,
                    const Row& row, const Each& each, bool backwards = false) {
  constexpr int V = kLanes<Sum<F>>;
#if defined(SEQKERNELS_TILES)
  if constexpr (kInTiles<F>)
    if (depth.tiles && shape.width == kMaxVectors) {
      const int64_t begin = (first + kMaxVectors - 1) / kMaxVectors, end = last / kMaxVectors;
      if (begin < end) {
        const auto each_vector = [&](int64_t panel, int64_t r, const Vec<Sum<F>>* out) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < kMaxVectors; v++) {
            const int64_t unit = (panel * kMaxVectors + v) * V;
            each(r, unit, min(shape.units - unit, V), out[v]);
          }
        };
        for_packed_by_tiles<kMaxVectors>(shape, packed, begin, end, backwards, rows, depth, row, each_vector);
        product(shape, packed, first, min(last, begin * kMaxVectors), rows, depth, row, each, backwards);
        first = max(first, end * kMaxVectors);
      }
    }
#endif
  if (first >= last) return;
  for_panels(first / shape.width, (last - 1) / shape.width + 1, backwards, [&](int64_t j) {
    const int64_t u = max(first, j * shape.width), end = min(last, (j + 1) * shape.width);
    const int64_t stride = shape.width_of(j) * V;
    const F* panel = packed + shape.offset(j) + u % shape.width * V;
    const auto rows_of = [&](auto width) {
      constexpr int N = decltype(width)::value;
      if constexpr (std::is_same<Each, Stored<F>>::value)
        if (stores_sums(depth)) return store_rows<N>(rows, depth, row, panel, stride, each, u * V);
      for_rows<N>(rows, depth, row, panel, stride, [&](int64_t r, const Vec<Sum<F>>* out) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
          const int64_t unit = (u + v) * V;
          each(r, unit, min(shape.units - unit, V), out[v]);
        }
      });
    };
    with_width(end - u, rows_of);
  });
}

// For a matrix that is used too seldom to be worth packing: dot products of a row of n numbers with V rows of w [*, n],
// those from `lanes` on repeating the last.
template <class F, class S>
SEQKERNELS_PRODUCT_TARGET __attribute__((noinline)) Vec<Sum<F>> dots(const S* w, int64_t lanes, int64_t n, const F* a) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>, kStep = V * kPerFactor<F>;
  const C* factors = reinterpret_cast<const C*>(a);
  Vec<C> sums[V] = {};
  const S* row[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) row[i] = w + min(i, lanes - 1) * n;
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

// At most so many rows are few, and wait for the memory of a matrix. At most so many are multiplied at once with one
// that is used once (dots_of_turned, gemm_once.h).
constexpr int64_t kFewRows = 8;
constexpr int64_t kRowsOnce = 64;

// The products of turned rows (turn_rows) with V rows of w [*, n]: out[r] is what dots gives for row r, added up as
// packed weights would. Rows of another type than the factors' are converted first, to `converted` [V, k].
template <class F, class S>
__attribute__((noinline)) void dots_of_turned(const S* w, int64_t lanes, int64_t n, const Panels<F>& shape,
                                              const F* turned, F* converted, Vec<Sum<F>>* out) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  const bool as_it_is = sizeof(S) * kPerFactor<F> == sizeof(F) && n % kPerFactor<F> == 0;
  const F* row[V];
  for (int64_t u = 0; u < V; u++) {
    const S* source = w + min(u, lanes - 1) * n;
    row[u] = as_it_is ? reinterpret_cast<const F*>(source) : converted + u * shape.k;
    for (int64_t i = 0; !as_it_is && i < shape.k; i += V)
      store(reinterpret_cast<C*>(converted + u * shape.k + i),
            load_factors<F>(source + i * kPerFactor<F>, n - i * kPerFactor<F>), shape.k - i);
  }
  for (int64_t j = 0; j < shape.count(); j++)
    with_width(shape.vectors_in(j), [&](auto width) {
      constexpr int N = decltype(width)::value;
      Vec<C> products[V * N];
      multiply_block<N>(V, {shape.k}, row, turned + shape.offset(j), N * V, {products, N});
      for (int v = 0; v < N; v++) {
        Vec<C> columns[V];
#pragma GCC unroll 16
        for (int u = 0; u < V; u++) columns[u] = products[u * N + v];
        transpose<C>(columns);
        const int64_t first = (j * shape.width + v) * V;
        for (int64_t r = first; r < min(first + V, shape.units); r++) out[r] = columns[r - first];
      }
    });
}

}  // namespace seqkernels::SEQKERNELS_ISA
