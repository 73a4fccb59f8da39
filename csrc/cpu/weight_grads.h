// The gradients of input and weights: products over the rows of a chunk of steps, once a sweep has written the
// gradients of its gates.
#pragma once
#include "backward_memory.h"
#include "gemm.h"
#include "vec_math.h"

namespace seqkernels::SEQKERNELS_ISA {

// grad_x = gradients of the gates times W_ih, of this range's rows of a chunk.
template <class S>
void input_gradient(const LayerBackward& p, const BackwardMemory<S>& memory, const WorkRange& work,
                    const Chunk& chunk) {
  using C = acc_t<S>;
  if (memory.once) {
    const S* w_ih = static_cast<const S*>(p.weights[0].w_ih);
    S* grad_x = static_cast<S*>(p.grad_x) + chunk.row * p.input;
    C* slice = memory.panels + work.begin * memory.panel_size;
    return product_once<S>(
        memory.ih, [&](int64_t k) { return w_ih + memory.columns.gate_of_input(k) * p.input; },
        work.first(memory.ih.vectors()), work.last(memory.ih.vectors()), chunk.rows,
        [&](int64_t r) { return memory.grads + r * memory.ldg; },
        [&](int64_t r, int64_t unit, int64_t lanes, Vec<C> x) { store(grad_x + r * p.input + unit, x, lanes); }, slice,
        memory.sums_behind(slice));
  }
  const int64_t first = work.first(chunk.rows), count = work.last(chunk.rows) - first;
  const auto row = [&](int64_t r) { return memory.grads + (first + r) * p.directions * memory.ldg; };
  S* grad_x = static_cast<S*>(p.grad_x) + (chunk.row + first) * p.input;
  product(memory.ih, memory.w_ih, 0, memory.ih.vectors(), count, {memory.columns.gates, p.directions, memory.ldg}, row,
          [&](int64_t r, int64_t unit, int64_t lanes, Vec<C> x) { store(grad_x + r * p.input + unit, x, lanes); });
}

// out[column][unit] (+)= sum over a chunk's rows of grads[row][column] * right(row)[unit], for this range's columns.
// pack(row, unit, lanes) is a vector of the right factor, out_row(column) the place of a column's sums.
template <class S, class Pack, class OutRow>
void add_products(const BackwardMemory<S>& memory, const WorkRange& work, const Chunk& chunk, bool add,
                  const acc_t<S>* grads, int64_t stride, int64_t columns, int64_t width, const Pack& pack,
                  const OutRow& out_row) {
  using C = acc_t<S>;
  constexpr int V = kLanes<C>;
  constexpr int kTile = kMr<kMaxVectors>;  // columns of a tile
  const int64_t tiles = (columns + kTile - 1) / kTile, first = work.first(tiles), last = work.last(tiles);
  if (first == last) return;
  C* panels = memory.panels + work.begin * memory.panel_size;
  for (int64_t row0 = 0; row0 < chunk.rows; row0 += kKc) {
    const int64_t depth = min(kKc, chunk.rows - row0);
    // As many panels as there is room for: of few rows all, so that the sums are written row after row.
    const int64_t strip = memory.kPanelSize / (depth * kMaxVectors * V) * kMaxVectors * V;
    for (int64_t strip0 = 0; strip0 < width; strip0 += strip) {
      const int64_t strip_end = min(width, strip0 + strip);
      const auto vectors_at = [&](int64_t unit) { return min(kMaxVectors, vectors_of<C>(width - unit)); };
      const auto panel_at = [&](int64_t unit) { return panels + (unit - strip0) * depth; };
      for (int64_t unit0 = strip0; unit0 < strip_end; unit0 += kMaxVectors * V)
        for (int64_t k = 0; k < depth; k++)
          for (int64_t v = 0, vectors = vectors_at(unit0); v < vectors; v++) {
            const int64_t unit = unit0 + v * V;
            store(panel_at(unit0) + (k * vectors + v) * V, pack(chunk.row + row0 + k, unit, min(width - unit, V)));
          }
      for (int64_t tile = first; tile < last; tile++) {
        const int64_t column = tile * kTile;
        const int count = static_cast<int>(min(kTile, columns - column));
        const C* a[kTile];
        for (int r = 0; r < kTile; r++) a[r] = grads + row0 * stride + column + (r < count ? r : 0);
        for (int64_t unit0 = strip0; unit0 < strip_end; unit0 += kMaxVectors * V)
          with_width(vectors_at(unit0), [&](auto n) {
            constexpr int N = decltype(n)::value;
            Vec<C> out[kTile * N];
            multiply<kTile, N>(depth, a, stride, panel_at(unit0), N * V, false, out);
            for (int r = 0; r < count; r++)
              for (int v = 0; v < N; v++) {
                const int64_t lanes = min(width - unit0 - v * V, V);
                C* to = out_row(column + r) + unit0 + v * V;
                store(to, add || row0 ? load(to, lanes) + out[r * N + v] : out[r * N + v], lanes);
              }
          });
      }
    }
  }
}

// The gradients of biases: adds a chunk's rows up, in chains as the products have them.
template <class S>
void sum_columns(const BackwardMemory<S>& memory, const WorkRange& work, const Chunk& chunk, int d, bool add,
                 int directions) {
  using C = acc_t<S>;
  constexpr int V = kLanes<C>;
  const int64_t width = memory.columns.width, stride = directions * memory.ldg, vectors = vectors_of<C>(width);
  const C* grads = memory.grads + d * memory.ldg;
  C* sums = memory.direction[d].column_sums;
  for (int64_t u = work.first(vectors); u < work.last(vectors); u++) {
    const int64_t lanes = min(width - u * V, V);
    Vec<C> total = add ? load(sums + u * V) : Vec<C>{};
    for (int64_t row0 = 0; row0 < chunk.rows; row0 += kChain) {
      Vec<C> sum = {};
      for (int64_t row = row0; row < min(chunk.rows, row0 + kChain); row++)
        sum += load(grads + row * stride + u * V, lanes);
      total += sum;
    }
    store(sums + u * V, total);
  }
}

// Adds a chunk's part of all gradients of direction d's weights.
template <class S>
void weight_gradients(const LayerBackward& p, const BackwardMemory<S>& memory, const WorkRange& work,
                      const Chunk& chunk, int d, bool add) {
  using C = acc_t<S>;
  const auto& sums = memory.direction[d];
  const Columns& columns = memory.columns;
  const int64_t I = p.input, H = p.hidden, P = p.projected, D = p.directions, stride = D * memory.ldg;
  const C* grads = memory.grads + d * memory.ldg;
  const S* x = static_cast<const S*>(p.x);
  const S* y = static_cast<const S*>(p.y) + d * P;
  const S* h_0 = static_cast<const S*>(p.h_0) + d * p.sequences * P;

  add_products(
      memory, work, chunk, add, grads, stride, columns.gates, I,
      [&](int64_t row, int64_t unit, int64_t lanes) { return load(x + row * I + unit, lanes); },
      [&](int64_t column) { return sums.grad_w_ih + columns.gate_of_input(column) * I; });
  add_products(
      memory, work, chunk, add, grads + columns.recurrent, stride, columns.gates, P,
      [&](int64_t row, int64_t unit, int64_t lanes) {
        const int64_t before = memory.before[d][row];
        return load((before < 0 ? h_0 + (-1 - before) * P : y + before * D * P) + unit, lanes);
      },
      [&](int64_t column) { return sums.grad_w_hh + column * P; });
  if (p.has_projection) {
    const int64_t K = saved_blocks_of(p.cell);
    const S* saved = static_cast<const S*>(p.saved) + d * K * H;
    add_products(
        memory, work, chunk, add, grads + columns.projected, stride, P, H,
        [&](int64_t row, int64_t unit, int64_t lanes) {  // o tanh(c), which an LSTM projects
          const S* from = saved + row * D * K * H + unit;
          return load(from + 3 * H, lanes) * tanh(load(from + 4 * H, lanes));
        },
        [&](int64_t column) { return sums.grad_w_hr + column * H; });
  }
  sum_columns(memory, work, chunk, d, add, p.directions);
}

// The sums become the results.
template <class S>
void finish_weight_gradients(const LayerBackward& p, const BackwardMemory<S>& memory, const WorkRange& work) {
  const Columns& columns = memory.columns;
  for (int d = 0; d < p.directions; d++) {
    const auto& sums = memory.direction[d];
    const WeightsOf<void*>& user = p.grad_weights[d];
    const auto store_sums = [&](const acc_t<S>* from, void* to, int64_t size) {
      if (memory.kSumsApart && to) store_state(from, static_cast<S*>(to), Units::of<acc_t<S>>(work, size));
    };
    store_sums(sums.grad_w_ih, user.w_ih, columns.gates * p.input);
    store_sums(sums.grad_w_hh, user.w_hh, columns.gates * p.projected);
    store_sums(sums.grad_w_hr, user.w_hr, p.projected * p.hidden);
    if (work.begin != 0 || !user.b_ih) continue;
    S* b_ih = static_cast<S*>(user.b_ih);
    for (int64_t column = 0; column < columns.gates; column += p.hidden)
      store_state(sums.column_sums + column, b_ih + columns.gate_of_input(column), {0, p.hidden});
    store_state(sums.column_sums + columns.recurrent, static_cast<S*>(user.b_hh), {0, columns.gates});
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
