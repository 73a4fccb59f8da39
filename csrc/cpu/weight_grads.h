// The gradients of input and weights: products over the rows of a chunk of steps, once a sweep has written the
// gradients of its gates.
#pragma once
#include "backward_memory.h"
#include "gemm_once.h"
#include "vec_math.h"

namespace seqkernels::SEQKERNELS_ISA {

// grad_x = gradients of the gates times W_ih, of this range's rows of a chunk.
template <class S, class F>
void input_gradient(const LayerBackward& p, const BackwardMemory<S, F>& memory, const WorkRange& work,
                    const Chunk& chunk, Tiles* tiles) {
  using C = acc_t<S>;
  if constexpr (!BackwardMemory<S, F>::kPairs) {
    if (memory.once) {
      const S* w_ih = static_cast<const S*>(p.weights[0].w_ih);
      S* grad_x = static_cast<S*>(p.grad_x) + chunk.row * p.input;
      C* slice = memory.panels + work.begin * memory.panel_size;
      return product_once<S>(
          memory.ih, [&](int64_t k) { return w_ih + memory.columns.gate_of_input(k) * p.input; },
          work.first(memory.ih.vectors()), work.last(memory.ih.vectors()), chunk.rows,
          [&](int64_t r) { return memory.grads + r * memory.ldg; },
          [&](int64_t r, int64_t unit, int64_t lanes, Vec<C> x) { store(grad_x + r * p.input + unit, x, lanes); },
          slice, memory.sums_behind(slice));
    }
  }
  const int64_t first = work.first(chunk.rows), count = work.last(chunk.rows) - first;
  const auto row = [&](int64_t r) {
    return reinterpret_cast<const F*>(memory.grads + (first + r) * p.directions * memory.grad_row);
  };
  S* grad_x = static_cast<S*>(p.grad_x) + (chunk.row + first) * p.input;
  Depth depth = Depth::of(factors_of<F>(memory.columns.gates), tiles, memory.grad_parts());
  depth.segments = p.directions, depth.gap = memory.grad_row / kPerFactor<F>;
  product(memory.ih, memory.w_ih, 0, memory.ih.vectors(), count, depth, row,
          [&](int64_t r, int64_t unit, int64_t lanes, Vec<C> x) { store(grad_x + r * p.input + unit, x, lanes); });
}

// The transposed gradients of `count` columns from grads on, `stride` apart: columns [kWeightMr, turned_row] of factors
// of `rows` rows, with zeros behind them. `count` is at most kWeightMr; what is in the other columns does not matter.
template <class F, class Memory>
__attribute__((noinline)) void turn_columns(const Memory& memory, const number_t<F>* grads, int64_t stride,
                                            int64_t rows, int64_t count, F* turned) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  for (int64_t column = 0; column < Memory::kWeightMr; column += V)
    for (int64_t k0 = 0; k0 < factors_of<F>(rows); k0 += V) {
      Vec<C> block[V];
      const auto row = [&](int64_t i) { return load(grads + i * stride + column, max(0, count - column)); };
      for (int64_t k = 0; k < V; k++)
        block[k] = k0 + k < factors_of<F>(rows) ? factor_of_rows<F>(k0 + k, rows, row) : Vec<C>{};
      transpose<C>(block);
      for (int64_t i = 0; i < V; i++)
        store(reinterpret_cast<C*>(turned + (column + i) * memory.turned_row + k0), block[i]);
    }
}

// Factors of `rows` rows, of which right(row, v) is vector v of `vectors`, become a panel, with zeros up to `depth`.
template <class F, class Right>
void pack_panel(int64_t rows, int64_t depth, int parts, int64_t vectors, F* panel, const Right& right) {
  using C = Sum<F>;
  constexpr int V = kLanes<C>;
  for (int part = 0; part < parts; part++)
    for (int64_t k = 0; k < depth; k++)
      for (int64_t v = 0; v < vectors; v++) {
        const auto row = [&](int64_t i) { return part_of(right(i, v), {part, parts}); };
        store(reinterpret_cast<C*>(panel) + ((part * depth + k) * vectors + v) * V,
              k < factors_of<F>(rows) ? factor_of_rows<F>(k, rows, row) : Vec<C>{});
      }
}

// out[column][unit] (+)= sum over a chunk's rows of grads[row][column] * right(row)[unit], for this range's columns.
// pack(row, unit, lanes) is a vector of the right factor, out_row(column) the place of a column's sums.
template <class S, class F, class Pack, class OutRow>
void add_products(const BackwardMemory<S, F>& memory, const WorkRange& work, const Chunk& chunk, bool add,
                  const number_t<F>* grads, int64_t stride, int64_t columns, int64_t width, Tiles* amx_tiles,
                  const Pack& pack, const OutRow& out_row) {
  using C = acc_t<S>;
  using Memory = BackwardMemory<S, F>;
  constexpr int V = kLanes<C>, kWeightMr = Memory::kWeightMr;
  const int64_t blocks = (columns + kWeightMr - 1) / kWeightMr, first = work.first(blocks), last = work.last(blocks);
  if (first == last) return;
  F* panels = memory.panels + work.begin * memory.panel_size;
  if constexpr (!Memory::kPairs)
    if (chunk.rows <= kFewRows && !add) {
      const int64_t strip = Memory::kPanelSize / kFewRows;
      for (int64_t unit0 = 0; unit0 < width; unit0 += strip) {
        const C *a[kFewRows], *right[kFewRows];
        for (int64_t r = 0; r < chunk.rows; r++) {
          a[r] = grads + r * stride, right[r] = panels + r * strip;
          for (int64_t i = 0; i < min(strip, width - unit0); i += V)
            store(panels + r * strip + i, pack(chunk.row + r, unit0 + i, min(width - unit0 - i, V)));
        }
        multiply_all_columns<kFewRows>(chunk.rows, a, first * kWeightMr, min(last * kWeightMr, columns), right,
                                       min(strip, width - unit0),
                                       [&](int64_t column) { return out_row(column) + unit0; });
      }
      return;
    }
  F* turned = memory.turned + work.begin * kWeightMr * memory.turned_row;
  for (int64_t row0 = 0; row0 < chunk.rows; row0 += Memory::kWeightKc) {
    const int64_t rows = min(Memory::kWeightKc, chunk.rows - row0);
    const int64_t depth = Panels<F>(factors_of<F>(rows), 0, 1, Memory::kPairs).depth;
    // As many panels as there is room for: of few rows all, so that the sums are written row after row.
    const int64_t strip = Memory::kPanelSize / (memory.parts * depth * kMaxVectors * V) * kMaxVectors * V;
    for (int64_t strip0 = 0; strip0 < width; strip0 += strip) {
      const int64_t strip_end = min(width, strip0 + strip);
      const auto vectors_at = [&](int64_t unit) { return min(kMaxVectors, vectors_of<C>(width - unit)); };
      const auto panel_at = [&](int64_t unit) { return panels + (unit - strip0) * memory.parts * depth; };
      for (int64_t unit0 = strip0; unit0 < strip_end; unit0 += kMaxVectors * V)
        pack_panel(rows, depth, memory.parts, vectors_at(unit0), panel_at(unit0), [&](int64_t i, int64_t v) {
          const int64_t unit = unit0 + v * V;
          return pack(chunk.row + row0 + i, unit, min(width - unit, V));
        });
      for (int64_t block = first; block < last; block++) {
        const int64_t column = block * kWeightMr;
        const int count = static_cast<int>(min(kWeightMr, columns - column));
        const number_t<F>* left = grads + row0 * stride + column;
        if constexpr (Memory::kPairs)
          for (int part = 0; part < memory.parts; part++)
            turn_columns<F>(memory, left + part * memory.ldg, stride, rows, count, turned + part * memory.turned_part);
        const F* a[kWeightMr];
        for (int r = 0; r < kWeightMr; r++) {
          if constexpr (Memory::kPairs)
            a[r] = turned + r * memory.turned_row;
          else
            a[r] = left + (r < count ? r : 0);
        }
        for (int64_t unit0 = strip0; unit0 < strip_end; unit0 += kMaxVectors * V)
          with_width(vectors_at(unit0), [&](auto n) {
            constexpr int N = decltype(n)::value;
            for (int r = 0; r < count; r++)
              for (int64_t i = 0; i < N * V; i += 64 / static_cast<int64_t>(sizeof(C)))
                prefetch_store(out_row(column + r) + unit0 + i);
            Vec<C> out[kWeightMr * N];
            if constexpr (Memory::kPairs)
              multiply_block<N>(kWeightMr, Depth::of(depth, amx_tiles, {memory.parts, memory.turned_part}), a,
                                panel_at(unit0), N * V, {out, N});
            else
              for_chains(depth, [&](const Chain& chain) {
                const Sums<F> sums{out, N};
                multiply<kWeightMr, N>(1, chain, a, stride, panel_at(unit0), N * V, chain.begin ? sums.more() : sums);
              });
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
template <class S, class F>
void sum_columns(const BackwardMemory<S, F>& memory, const WorkRange& work, const Chunk& chunk, int d, bool add,
                 int directions) {
  using C = acc_t<S>;
  constexpr int V = kLanes<C>;
  const int64_t width = memory.columns.width, stride = directions * memory.grad_row, vectors = vectors_of<C>(width);
  const number_t<F>* grads = memory.grads + d * memory.grad_row;
  C* sums = memory.direction[d].column_sums;
  for (int64_t u = work.first(vectors); u < work.last(vectors); u++) {
    const int64_t lanes = min(width - u * V, V);
    Vec<C> total = add ? load(sums + u * V) : Vec<C>{};
    for (int64_t row0 = 0; row0 < chunk.rows; row0 += kChain) {
      Vec<C> sum = {};
      for (int64_t row = row0; row < min(chunk.rows, row0 + kChain); row++)
        for (int part = 0; part < memory.parts; part++)
          sum += load(grads + row * stride + part * memory.ldg + u * V, lanes);
      total += sum;
    }
    store(sums + u * V, total);
  }
}

// rows(row, unit, lanes) of what an LSTM has projected, o tanh(c): with the c that zoneout may have replaced.
template <class S, class F>
auto unprojected_rows(const LayerBackward& p, const BackwardMemory<S, F>& memory, int d) {
  using V = Vec<acc_t<S>>;
  const int64_t H = p.hidden, D = p.directions, K = saved_blocks_of(p.cell);
  const S* saved = static_cast<const S*>(p.saved) + d * K * H;
  const S* c_0 = static_cast<const S*>(p.c_0) + d * p.states * H;
  const acc_t<S>* candidate = static_cast<const acc_t<S>*>(p.candidate);
  if (candidate) candidate += d * p.sequences * H;
  return [=, &memory, zoned = p.zoneout_c != nullptr](int64_t row, int64_t unit, int64_t lanes) -> V {
    const auto block = [&](int64_t of_row, int k) { return load(saved + (of_row * D * K + k) * H + unit, lanes); };
    V c = block(row, 4);
    if (zoned) {
      const int64_t before = memory.before[d][row];
      const V gates[] = {block(row, 0), block(row, 1), block(row, 2)};
      const V c_before = before < 0 ? V(load(c_0 + (-1 - before) * H + unit, lanes)) : V(block(before, 4));
      const V mask = candidate ? load(candidate + memory.sequence[row] * H + unit, lanes) : V{} + 1;
      c = lstm_c(gates, c_before, mask);
    }
    return block(row, 3) * tanh(c);
  };
}

// Adds a chunk's part of all gradients of direction d's weights.
template <class S, class F>
void weight_gradients(const LayerBackward& p, const BackwardMemory<S, F>& memory, const WorkRange& work,
                      const Chunk& chunk, int d, bool add, Tiles* tiles) {
  const auto& sums = memory.direction[d];
  const Columns& columns = memory.columns;
  const int64_t I = p.input, H = p.hidden, P = p.projected, D = p.directions, stride = D * memory.grad_row;
  const number_t<F>* grads = memory.grads + d * memory.grad_row;
  const S* x = static_cast<const S*>(p.x);
  const S* y = static_cast<const S*>(p.y) + d * P;
  const S* h_0 = static_cast<const S*>(p.h_0) + d * p.states * P;
  const acc_t<S>* recurrent = static_cast<const acc_t<S>*>(p.recurrent);
  if (recurrent) recurrent += d * p.sequences * P;

  add_products(
      memory, work, chunk, add, grads, stride, columns.gates, I, tiles,
      [&](int64_t row, int64_t unit, int64_t lanes) { return load(x + row * I + unit, lanes); },
      [&](int64_t column) { return sums.grad_w_ih + columns.gate_of_input(column) * I; });
  add_products(
      memory, work, chunk, add, grads + columns.recurrent, stride, columns.gates, P, tiles,
      [&](int64_t row, int64_t unit, int64_t lanes) {
        const int64_t before = memory.before[d][row];
        const auto h = load((before < 0 ? h_0 + (-1 - before) * P : y + before * D * P) + unit, lanes);
        return recurrent ? h * load(recurrent + memory.sequence[row] * P + unit, lanes) : h;
      },
      [&](int64_t column) { return sums.grad_w_hh + column * P; });
  if (p.has_projection)
    add_products(memory, work, chunk, add, grads + columns.projected, stride, P, H, tiles,
                 unprojected_rows(p, memory, d), [&](int64_t column) { return sums.grad_w_hr + column * H; });
  sum_columns(memory, work, chunk, d, add, p.directions);
}

// The sums become the results.
template <class S, class F>
void finish_weight_gradients(const LayerBackward& p, const BackwardMemory<S, F>& memory, const WorkRange& work) {
  const Columns& columns = memory.columns;
  for (int d = 0; d < p.directions; d++) {
    const auto& sums = memory.direction[d];
    const WeightsOf<void*>& user = p.grad_weights[d];
    const auto store_sums = [&](const acc_t<S>* from, void* to, int64_t size) {
      if (BackwardMemory<S, F>::kSumsApart && to)
        store_state(from, static_cast<S*>(to), Units::of<acc_t<S>>(work, size));
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
