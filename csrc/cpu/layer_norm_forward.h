// The forward sweep of a layer with layer norm. All products of a step are there before any is normalized, so that a
// step has phases: products; the cell; and where c is normalized, what is read from it. In a team each phase waits for
// all units, and every member normalizes its own by means over all, which it computes itself.
#pragma once
#include "layer_norm_memory.h"
#include "row_means.h"

namespace seqkernels::SEQKERNELS_ISA {

template <Cell kCell, class C>
class LayerNormForwardSweep {
  using Memory = LayerNormForwardMemory<C>;
  using V = Vec<C>;
  using Traits = CellTraits<kCell>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int G = Traits::gates;
  static constexpr bool kHasC = Traits::states == 2;

 public:
  LayerNormForwardSweep(const LayerNormForward& p, const Memory& memory, const typename Memory::PerTask& mine,
                        const Task& task, const WorkRange& work)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        work(work),
        of(memory.direction[task.direction]),
        units(Units::of<C>(work, p.hidden)) {}

  void run() {
    change_states(-1, at.step(0));
    work.wait();
    for (int64_t i = 0; i < p.steps; i++) run_step(at.step(i));
  }

 private:
  // Between step t and the next: what ended leaves its states, what begins takes them.
  void change_states(int64_t t, int64_t next) const {
    const int64_t H = p.hidden;
    at.change_states(
        t, next,
        [&](int64_t r, int64_t state) {
          store_state(mine.h + r * memory.ldh, at.at_state(static_cast<C*>(p.h_n), state, H), units);
          if (kHasC) store_state(mine.c + r * memory.ldh, at.at_state(static_cast<C*>(p.c_n), state, H), units);
        },
        [&](int64_t r, int64_t state) {
          C* h = mine.h + r * memory.ldh;
          load_state(at.at_state(static_cast<const C*>(p.h_0), state, H), h, units);
          for (int64_t unit = units.first; p.recurrent && unit < units.last; unit += kLane)
            put_factors(mine.factors, r, unit, load(h + unit));
          if (kHasC) load_state(at.at_state(static_cast<const C*>(p.c_0), state, H), mine.c + r * memory.ldh, units);
        });
  }

  void run_step(int64_t t) {
    const int64_t running = at.running(t), later = at.task.direction ? t - 1 : t + 1;
    row0 = at.row(t, 0);
    multiply_states(running, t % 2);
    work.wait();
    for (int64_t r = 0; r < running; r++) run_cell(r);
    if (p.norms.scale_c) {
      work.wait();
      for (int64_t r = 0; r < running; r++) read_c(r);
    }
    swap(mine.h, mine.h_next);
    swap(mine.factors, mine.factors_next);
    change_states(t, later);
    if (later >= 0 && later < p.steps) work.wait();
  }

  // What is normalized: W_hh h, and of_sum W_ih x beside it.
  void multiply_states(int64_t running, bool backwards) const {
    const int64_t vectors = memory.hh.vectors();
    if (memory.matrices == 1) return multiply_matrix(0, work.first(vectors), work.last(vectors), running, backwards);
    for (int64_t i = work.first(memory.matrices); i < work.last(memory.matrices); i++)
      multiply_matrix(i, 0, vectors, running, backwards);
  }

  // Vectors [first, last) of what matrix i of W_hh gives, which multiplies the units of its block.
  void multiply_matrix(int64_t i, int64_t first, int64_t last, int64_t running, bool backwards) const {
    const int64_t n = memory.hh.k, column0 = i * memory.hh.units;
    const C* const h = mine.factors + i % p.norms.blocks * n;
    const auto row = [&](int64_t r) { return h + r * memory.ldh; };
    const auto put = [&](int64_t r, int64_t unit, int64_t lanes, V x) {
      const int64_t column = column0 + unit;
      if (p.norms.of_sum) x += load(at.of_row<C>(p.norms.gates_x, row0, r, memory.columns) + column, lanes);
      store(mine.sums + r * memory.lds + column, x, lanes);
    };
    if (memory.packed)
      return product(memory.hh, of.w_hh + i * memory.hh.size(), first, last, running, {n}, row, put, backwards);
    const C* const w_hh = static_cast<const C*>(p.weights[at.task.direction].w_hh) + column0 * n;
    for (int64_t unit = first * kLane; unit < min(last * kLane, memory.hh.units); unit += kLane)
      for (int64_t r = 0; r < running; r++) {
        const int64_t left = memory.hh.units - unit;
        put(r, unit, min(left, kLane), dots(w_hh + unit * n, left, n, row(r)));
      }
  }

  // The new states of sequence r; where c is normalized, c and the gate that h is read from it by.
  void run_cell(int64_t r) const {
    const int64_t H = p.hidden, columns = G * H, saved_row = columns + (kHasC ? H : 0);
    const C* const sums = mine.sums + r * memory.lds;
    const Moments<C> moments(sums, columns);
    const C* const gates_x = p.norms.of_sum ? nullptr : at.of_row<C>(p.norms.gates_x, row0, r, columns);
    const C* const mask = p.candidate ? at.at_state(static_cast<const C*>(p.candidate), at.sequence(r), H) : nullptr;
    C* const saved = p.saved ? at.of_row<C>(p.saved, row0, r, saved_row) : nullptr;
    if (p.statistics && !work.begin) *at.of_row<C>(p.statistics, row0, r, p.norms.statistics_of_row) = moments.inverse;
    for (int64_t unit = units.first; unit < units.last; unit += kLane) {
      const int64_t lanes = min(H - unit, kLane);
      V x[G], recurrent[G], blocks[kMaxBlocks];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const int64_t column = g * H + unit;
        const V normalized = moments.of(load(sums + column));
        if (saved) store(saved + column, normalized, lanes);
        recurrent[g] = normalized * load(of.scale + column) + load(of.shift + column);
        x[g] = gates_x ? load(gates_x + column, lanes) : V{};
      }
      const V h_before = load(mine.h + r * memory.ldh + unit);
      C* const c_of = kHasC ? mine.c + r * memory.ldh + unit : nullptr;
      V h = h_before, c_before{}, c{};
      if constexpr (kHasC) c = c_before = load(c_of);
      cell_forward<kCell>(x, recurrent, h, c, blocks);
      if constexpr (Traits::saved_blocks > 0)
        if (mask) drop_candidate<kCell, V>(load(mask + unit, lanes), blocks, h_before, c_before, h, c);
      if constexpr (kHasC) {
        if (p.norms.scale_c) {
          store(mine.c_new + r * memory.ldh + unit, c);
          store(mine.o + r * memory.ldh + unit, blocks[3]);
        }
        c = zoned(p.zoneout_c, r, unit, c_before, c);
        store(c_of, c);
        if (saved) store(saved + columns + unit, c, lanes);
      }
      if (!p.norms.scale_c) put_h(r, unit, h);
    }
  }

  // h of an LSTM whose c is normalized.
  void read_c(int64_t r) const {
    const C* const c = mine.c_new + r * memory.ldh;
    const Moments<C> moments(c, p.hidden);
    if (p.statistics && !work.begin) {
      C* const statistics = at.of_row<C>(p.statistics, row0, r, p.norms.statistics_of_row);
      statistics[1] = moments.mean, statistics[2] = moments.inverse;
    }
    for (int64_t unit = units.first; unit < units.last; unit += kLane) {
      const V shifted = moments.of(load(c + unit)) * load(of.scale_c + unit) + load(of.shift_c + unit);
      put_h(r, unit, load(mine.o + r * memory.ldh + unit) * tanh(shifted));
    }
  }

  SEQKERNELS_INLINE void put_h(int64_t r, int64_t unit, V h) const {
    h = zoned(p.zoneout_h, r, unit, load(mine.h + r * memory.ldh + unit), h);
    store(at.of_row<C>(p.y, row0, r, p.hidden) + unit, h, min(p.hidden - unit, kLane));
    store(mine.h_next + r * memory.ldh + unit, h);
    if (p.recurrent) put_factors(mine.factors_next, r, unit, h);
  }

  // h of sequence r as products read it, which a mask multiplies.
  SEQKERNELS_INLINE void put_factors(C* factors, int64_t r, int64_t unit, V h) const {
    const C* mask = at.at_state(static_cast<const C*>(p.recurrent), at.sequence(r), p.hidden) + unit;
    store(factors + r * memory.ldh + unit, h * load(mask, min(p.hidden - unit, kLane)));
  }

  // The new state of one vector of units, of which `stays` [N, D, H] keeps the old one.
  SEQKERNELS_INLINE V zoned(const void* stays, int64_t r, int64_t unit, V before, V now) const {
    if (!stays) return now;
    return now + load(at.of_row<C>(stays, row0, r, p.hidden) + unit, min(p.hidden - unit, kLane)) * (before - now);
  }

  const LayerNormForward& p;
  const Layout at;
  const Memory& memory;
  typename Memory::PerTask mine;
  const WorkRange work;
  const typename Memory::PerDirection& of;
  const Units units;  // this range's
  int64_t row0;       // of the step that runs
};

template <Cell kCell, class C>
void layer_norm_forward(const LayerNormForward& p, const Schedule& schedule, int begin, int end, void* base) {
  const LayerNormForwardMemory<C> memory(p, schedule, base);
  const WorkRange all = whole_range(schedule, begin, end);
  const auto& hh = memory.hh;
  const int64_t panels = memory.packed ? memory.matrices * hh.count() : 0;
  for (int d = 0; d < p.directions; d++) {
    for (int64_t j = all.first(panels); j < all.last(panels); j++) {
      const int64_t i = j / hh.count();
      const C* const matrix = static_cast<const C*>(p.weights[d].w_hh) + i * hh.units * hh.k;
      pack_transposed(hh, j % hh.count(), matrix, hh.k, memory.direction[d].w_hh + i * hh.size());
    }
    if (!all.begin) memory.direction[d].load(p, p.norms, d);
  }
  all.wait();
  run_tasks(schedule, begin, end, [&](int64_t i, const WorkRange& work) {
    LayerNormForwardSweep<kCell, C>(p, memory, memory.task(p, schedule, i), schedule.task[i], work).run();
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
