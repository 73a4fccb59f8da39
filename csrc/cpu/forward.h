// The forward sweep over time. A task runs its steps in chunks: first the input projection of the chunk's rows, whose
// result then stays in the caches, then step after step. States are carried in the type of computation.
#pragma once
#include "forward_memory.h"
#include "vec_math.h"

namespace seqkernels::SEQKERNELS_ISA {

// The products of rows (row(i) points to them) with rows [columns.first, columns.last) of w [units, n], not packed.
template <class S, class F, class Row, class Each>
inline void multiply_where_it_lies(const ForwardMemory<S, F>& memory, const S* w, int64_t units, int64_t n,
                                   Units columns, int64_t rows, const Row& row, F* turned, const Each& each) {
  constexpr int kLane = kLanes<acc_t<S>>;
  if (memory.used == WeightsUsed::by_rows) {
    for (int64_t unit = columns.first; unit < columns.last; unit += kLane)
      for (int64_t i = 0; i < rows; i++) each(i, unit, dots(w + unit * n, units - unit, n, row(i)));
    return;
  }
  const Panels<F> shape(factors_of<F>(n), rows, 1);
  turn_rows(shape, n, row, turned);
  Vec<acc_t<S>> out[kRowsOnce];
  for (int64_t unit = columns.first; unit < columns.last; unit += kLane) {
    dots_of_turned(w + unit * n, units - unit, n, shape, turned, turned + memory.turned_rows, out);
    for (int64_t i = 0; i < rows; i++) each(i, unit, out[i]);
  }
}

// gates = W_ih x + biases of the chunk's `count` rows of the layer, rows[i]: the columns of `work`. No inline: the same
// for all cells.
template <class S, class F>
__attribute__((noinline)) void project_inputs(const LayerForward& p, const ForwardMemory<S, F>& memory, int direction,
                                              const WorkRange& work, const int64_t* rows, int64_t count,
                                              acc_t<S>* gates, F* turned, Tiles* tiles) {
  using C = acc_t<S>;
  const auto& weights = memory.direction[direction];
  const int64_t columns = memory.ih.units, first = work.first(memory.ih.vectors());
  const int64_t last = work.last(memory.ih.vectors());
  const auto row = [&](int64_t i) {
    if (memory.x) return static_cast<const F*>(memory.x) + rows[i] * memory.ldi;
    return reinterpret_cast<const F*>(static_cast<const S*>(p.x) + rows[i] * p.input);
  };
  const Stored<F> put{gates, memory.ldg, weights.bias};
  if (memory.used == WeightsUsed::packed)
    return product(memory.ih, weights.w_ih, first, last, count, memory.depth_of(memory.ih, tiles), row, put);
  const S* w_ih = static_cast<const S*>(p.weights[direction].w_ih);
  multiply_where_it_lies(memory, w_ih, columns, p.input, {first * kLanes<C>, min(last * kLanes<C>, columns)}, count,
                         row, turned, [&](int64_t i, int64_t column, Vec<C> x) { put(i, column, 0, x); });
}

template <Cell kCell, class S, class F, bool kMasked>
class ForwardSweep {
  using C = acc_t<S>;
  using Memory = ForwardMemory<S, F>;
  using V = Vec<C>;
  using Traits = CellTraits<kCell>;
  static constexpr int kLane = kLanes<C>;
  static constexpr bool kHasC = Traits::states == 2;
  static constexpr bool kPairs = !std::is_same<C, F>::value;
  // An RNN with zoneout saves its h, before the old one may replace it.
  static constexpr int G = Traits::gates, K = Traits::saved_blocks ? Traits::saved_blocks : kMasked;

 public:
  ForwardSweep(const LayerForward& p, const Memory& memory, const typename Memory::PerTask& mine, const Task& task,
               const WorkRange& work, Tiles* tiles)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        work(work),
        tiles(tiles),
        weights(memory.direction[task.direction]),
        source(p.weights[task.direction]),
        units(Units::of<C>(work, p.hidden)),
        outputs(Units::of<C>(work, p.projected)),
        recurrent(static_cast<const C*>(p.recurrent)),
        candidate(static_cast<const C*>(p.candidate)),
        zoneout_h(static_cast<const C*>(p.zoneout_h)),
        zoneout_c(static_cast<const C*>(p.zoneout_c)),
        rows(mine.rows + work.begin * memory.chunk),
        turned(mine.turned + work.begin * memory.turned_size) {}

  void run() {
    change_states(-1, at.step(0));
    for (int64_t i = 0; i < p.steps;) {
      const auto [count, end] = at.list_rows(i, memory.chunk, rows);
      project_inputs<S, F>(p, memory, at.task.direction, work, rows, count, mine.gates, turned, tiles);
      work.wait();
      for (int64_t first = 0; i < end; first += at.running(at.step(i++))) run_step(at.step(i), first);
    }
  }

 private:
  static void store_results(const C* from, S* to, Units units) {
    for (int64_t i = units.first; i < units.last; i += kLane) store_result<F>(to + i, load(from + i), units.last - i);
  }

  // Between step t and the next: what ended leaves its states, what begins takes them.
  void change_states(int64_t t, int64_t next) const {
    const int64_t H = p.hidden, P = p.projected;
    at.change_states(
        t, next,
        [&](int64_t r, int64_t state) {
          store_results(mine.h + r * memory.ldp, at.at_state(static_cast<S*>(p.h_n), state, P), outputs);
          if (kHasC) store_results(mine.c + r * memory.ldh, at.at_state(static_cast<S*>(p.c_n), state, H), units);
        },
        [&](int64_t r, int64_t state) {
          C* h = mine.h + r * memory.ldp;
          load_state(at.at_state(static_cast<const S*>(p.h_0), state, P), h, outputs);
          for (int64_t unit = outputs.first; (kPairs || kMasked) && unit < outputs.last; unit += kLane)
            put_factors(mine.factors, r, unit, load(h + unit));
          if (kHasC) load_state(at.at_state(static_cast<const S*>(p.c_0), state, H), mine.c + r * memory.ldh, units);
        });
  }

  // W_hh h of the sequences that run, where W_hh lies, and from it their new states.
  template <class Row>
  void multiply_states_unpacked(int64_t running, const Row& row) const {
    const S* w_hh = static_cast<const S*>(source.w_hh);
    const int64_t H = p.hidden, P = p.projected;
    const Panels<F> shape(memory.hh.k, running, 1);
    const bool by_turned = memory.used == WeightsUsed::by_turned;
    if (by_turned) turn_rows(shape, P, row, turned);
    for (int64_t unit = units.first; unit < units.last; unit += kLane) {
      V out[G][kRowsOnce];
      for (int g = 0; g < G; g++) {
        const S* w = w_hh + (g * H + unit) * P;
        if (by_turned) dots_of_turned(w, H - unit, P, shape, turned, turned + memory.turned_rows, out[g]);
        for (int64_t r = 0; !by_turned && r < running; r++) out[g][r] = dots(w, H - unit, P, row(r));
      }
      for (int64_t r = 0; r < running; r++) {
        V products[G];
        for (int g = 0; g < G; g++) products[g] = out[g][r];
        finish(r, unit, products);
      }
    }
  }

  // One step; the gates of its first row are row `first` of the chunk.
  void run_step(int64_t t, int64_t first) {
    const int64_t running = at.running(t);
    const int64_t later = at.task.direction ? t - 1 : t + 1;
    ahead = at.rows_to(t, later) * p.directions;
    row0 = at.row(t, 0);
    gates = mine.gates + first * memory.ldg;
    const bool zeros = t == at.step(0) && products_are_zeros(running);
    multiply_states(running, zeros ? Depth{0} : memory.depth_of(memory.hh, tiles), t % 2);
    if constexpr (Traits::can_project) {
      if (p.has_projection) {
        work.wait();
        project_outputs(running);
      }
    }
    swap(mine.h, mine.h_next);
    swap(mine.factors, mine.factors_next);
    change_states(t, later);
    if (later >= 0 && later < p.steps) work.wait();
  }

  // Whether W_hh h is zeros as all h are, which calls without a state begin with, and so need not be computed. With an
  // infinity or NaN in W_hh it is not. Looking costs as much as multiplying a few rows.
  bool products_are_zeros(int64_t running) const {
    if (kMasked || tiles || memory.used != WeightsUsed::packed || running <= kFewRows) return false;
    const int64_t H = p.hidden, P = p.projected;
    for (int64_t i = 0; i < P; i++)
      if (mine.h[i] != 0) return false;
    for (int64_t r = 1; r < running; r++)
      if (memcmp(mine.h + r * memory.ldp, mine.h, P * sizeof(C))) return false;
    for (int g = 0; g < G; g++)
      if (!are_finite(static_cast<const S*>(source.w_hh) + (g * H + units.first) * P, (units.last - units.first) * P))
        return false;
    return true;
  }

  static bool are_finite(const S* x, int64_t n) {
    u32 bits{};  // of zeros, which have at most a sign, and NaN
    for (int64_t i = 0; i < n; i += kLane) bits |= bits_of<u32>(V(load(x + i, n - i) * 0)) << 1;
    for (int i = 0; i < kLanes<float>; i++)
      if (bits[i]) return false;
    return true;
  }

  // W_hh h of the sequences that run, and from it their new states.
  void multiply_states(int64_t running, const Depth& depth, bool backwards) const {
    const auto row = [&](int64_t r) { return mine.factors + r * memory.ldf; };
    if (memory.used != WeightsUsed::packed) {
      multiply_states_unpacked(running, row);
    } else if constexpr (G == 1) {
      product(
          memory.hh, weights.w_hh, units.first / kLane, vectors_of<C>(units.last), running, depth, row,
          [&](int64_t r, int64_t unit, int64_t, V x) { finish(r, unit, &x); }, backwards);
    } else {
      int64_t first = units.first / kLane, last = vectors_of<C>(units.last);
#if defined(SEQKERNELS_TILES)
      if constexpr (kPairs)
        if (tiles) {
          const int64_t whole = min(last, p.hidden / kLane);
          for_packed_by_tiles<G>(memory.hh, weights.w_hh, first, whole, backwards, running, depth, row,
                                 [&](int64_t j, int64_t r, const V* out) { finish(r, j * kLane, out); });
          first = whole;
        }
#endif
      for_panels(first, last, backwards, [&](int64_t j) {
        const F* panel = weights.w_hh + memory.hh.offset(j);
        const int64_t lanes = memory.hh.lanes_of_group(j);
        if (lanes == kLane)
          return for_rows<G>(
              running, depth, row, panel, G * kLane, [&](int64_t r, V* out) { finish<kWaits>(r, j * kLane, out, out); },
              [&](int64_t r, const V* out) { finish_waiting(r, j * kLane, out); });
        with_width(memory.hh.vectors_in(j), [&](auto width) {
          constexpr int N = min(decltype(width)::value, G);
          for_rows<N>(running, depth, row, panel, N * kLane, [&](int64_t r, const V* out) {
            V recurrent[G];
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) recurrent[g] = load(reinterpret_cast<const C*>(out) + g * lanes);
            finish(r, j * kLane, recurrent);
          });
        });
      });
    }
  }

  void project_outputs(int64_t running) const {
    const auto row = [&](int64_t r) { return mine.unprojected + r * memory.ldu; };
    const auto put = [&](int64_t r, int64_t unit, int64_t, V x) { put_h(r, unit, x); };
    if (memory.used == WeightsUsed::packed)
      return product(memory.hr, weights.w_hr, outputs.first / kLane, vectors_of<C>(outputs.last), running,
                     memory.depth_of(memory.hr, tiles), row, put);
    const S* w_hr = static_cast<const S*>(source.w_hr);
    multiply_where_it_lies(memory, w_hr, p.projected, p.hidden, outputs, running, row, turned,
                           [&](int64_t r, int64_t unit, V x) { put_h(r, unit, x); });
  }

  // The new states of one vector of units of sequence r, from the gates' W_hh h. A new h that `waits` is left to
  // finish_waiting, with what it is made of; that may lie where the products do.
  template <bool waits = false>
  SEQKERNELS_INLINE void finish(int64_t r, int64_t unit, const V* products, V* o_and_c = nullptr) const {
    cell_t<S> x[G], recurrent[G], blocks[K + 1], h{}, c{};
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      x[g] = load(gates + r * memory.ldg + g * p.hidden + unit);
      constexpr int kAdded = G - Traits::apart;
      recurrent[g] =
          g < kAdded ? products[g] : V(products[g] + load(weights.bias_apart + (g - kAdded) * p.hidden + unit));
    }
    C* const c_of = mine.c + r * memory.ldh + unit;
    if constexpr (Traits::needs_h_prev) h = load(mine.h + r * memory.ldp + unit);
    if constexpr (kHasC) c = load(c_of);
    [[maybe_unused]] const cell_t<S> h_before = h, c_before = c;
    cell_forward<kCell>(x, recurrent, h, c, blocks);
    if constexpr (kMasked && Traits::saved_blocks > 0)
      if (candidate) {
        const C* of_sequence = at.at_state(candidate, at.sequence(r), p.hidden) + unit;
        const cell_t<S> mask = load(of_sequence, min(p.hidden - unit, kLane));
        drop_candidate<kCell>(mask, blocks, h_before, c_before, h, c);
      }
    if constexpr (kMasked && !Traits::saved_blocks) blocks[0] = h;
    if constexpr (kHasC) {
      if (kMasked && zoneout_c) c = zoned(zoneout_c, r, unit, p.hidden, load(c_of), c);
      store(c_of, c);
      blocks[K - 1] = c;
    }
    if constexpr (waits)
      o_and_c[0] = blocks[3], o_and_c[1] = c;
    else
      put_unprojected(r, unit, h);
    if constexpr (K > 0) save(r, unit, blocks);
  }

  // An LSTM's h waits for two activations, one after the other. So rows that are multiplied together get their c first:
  // while one waits, another is computed.
  static constexpr bool kWaits = kCell == Cell::lstm && !kMasked;
  SEQKERNELS_INLINE void finish_waiting(int64_t r, int64_t unit, const V* o_and_c) const {
    if constexpr (kWaits) put_unprojected(r, unit, cell_t<S>(o_and_c[0]) * tanh(cell_t<S>(o_and_c[1])));
  }

  SEQKERNELS_INLINE void put_unprojected(int64_t r, int64_t unit, V h) const {
    if (Traits::can_project && p.has_projection)
      memory.parts_of(memory.hr).store(mine.unprojected + r * memory.ldu, unit, p.hidden, h);
    else
      put_h(r, unit, h);
  }

  SEQKERNELS_INLINE void put_h(int64_t r, int64_t unit, V h) const {
    const int64_t P = p.projected, lanes = min(P - unit, kLane);
    if (kMasked && zoneout_h) h = zoned(zoneout_h, r, unit, P, load(mine.h + r * memory.ldp + unit), h);
    S* y = at.at_row(static_cast<S*>(p.y), row0 + r * at.task.stride, P) + unit;
    prefetch_store(y + ahead * P);
    store_result<F>(y, h, lanes);
    store(mine.h_next + r * memory.ldp + unit, h);
    put_factors(mine.factors_next, r, unit, h);
  }

  // h of sequence r as products read it.
  SEQKERNELS_INLINE void put_factors(F* factors, int64_t r, int64_t unit, V h) const {
    const int64_t P = p.projected;
    if (kMasked && recurrent) h *= load(at.at_state(recurrent, at.sequence(r), P) + unit, min(P - unit, kLane));
    if (kPairs || (kMasked && recurrent)) memory.parts_of(memory.hh).store(factors + r * memory.ldf, unit, P, h);
  }

  // The new state of one vector of n units, of which `stays` [N, D, n] keeps the old one.
  SEQKERNELS_INLINE V zoned(const C* stays, int64_t r, int64_t unit, int64_t n, V before, V now) const {
    const C* of_row = at.at_row(stays, row0 + r * at.task.stride, n) + unit;
    return now + load(of_row, min(n - unit, kLane)) * (before - now);
  }

  SEQKERNELS_INLINE void save(int64_t r, int64_t unit, const cell_t<S>* blocks) const {
    if (!p.saved) return;
    const int64_t H = p.hidden, lanes = min(H - unit, kLane);
    S* to = at.at_row(static_cast<S*>(p.saved), row0 + r * at.task.stride, K * H) + unit;
#pragma GCC unroll 8
    for (int block = 0; block < K; block++) {
      prefetch_store(to + block * H + ahead * K * H);
      store_result<F>(to + block * H, V(blocks[block]), lanes);
    }
  }

  const LayerForward& p;
  const Layout at;
  const Memory& memory;
  typename Memory::PerTask mine;
  const WorkRange work;
  Tiles* const tiles;  // null where products are not by tiles
  const typename Memory::PerDirection& weights;
  const WeightsOf<const void*>& source;
  const Units units, outputs;  // this range's, of H and of P
  const C *const recurrent, *const candidate, *const zoneout_h, *const zoneout_c;
  int64_t* const rows;  // of the chunk
  F* const turned;
  // Of the step that runs.
  const C* gates;
  int64_t row0, ahead;
};

// The biases of direction d: what is added to the projection, and what stays apart.
template <class S, class F>
void sum_biases(const LayerForward& p, int d, const ForwardMemory<S, F>& memory) {
  const S* b_ih = static_cast<const S*>(p.weights[d].b_ih);
  const S* b_hh = static_cast<const S*>(p.weights[d].b_hh);
  const int64_t columns = gates_of(p.cell) * p.hidden, added = columns - apart_of(p.cell) * p.hidden;
  acc_t<S>* sum = memory.direction[d].bias;
  load_state(b_ih, sum, {0, columns});
  load_state(b_hh ? b_hh + added : b_hh, memory.direction[d].bias_apart, {0, columns - added});
  for (int64_t i = 0; b_hh && i < added; i++) sum[i] += scalar(b_hh[i]);
}

template <class S, class F>
void prepare_forward(const LayerForward& p, const ForwardMemory<S, F>& memory, const WorkRange& work) {
  const auto pack = [&](const Panels<F>& shape, const void* source, int64_t n, F* packed, const KeptPanels<S>& kept) {
    for (int64_t j = work.first(shape.count()); j < work.last(shape.count()); j++)
      kept.renew(shape, j, static_cast<const S*>(source), n, packed);
  };
  for (int d = 0; d < p.directions; d++) {
    if (memory.used == WeightsUsed::packed) {
      const auto& weights = memory.direction[d];
      pack(memory.ih, p.weights[d].w_ih, p.input, weights.w_ih, weights.kept_ih);
      pack(memory.hh, p.weights[d].w_hh, p.projected, weights.w_hh, weights.kept_hh);
      if (p.has_projection) pack(memory.hr, p.weights[d].w_hr, p.hidden, weights.w_hr, weights.kept_hr);
    }
    if (work.begin == 0) sum_biases(p, d, memory);
  }
  if (!memory.x) return;
  for (int64_t row = work.first(p.rows); row < work.last(p.rows); row++)
    for (int64_t i = 0; i < p.input; i += kLanes<Sum<F>>)
      memory.parts_of(memory.ih).store(memory.x + row * memory.ldi, i, p.input,
                                       load(static_cast<const S*>(p.x) + row * p.input + i, p.input - i));
}

template <Cell kCell, class S, class F, bool kMasked = false>
void forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* base) {
  const ForwardMemory<S, F> memory(p, schedule, base);
  const WorkRange all = whole_range(schedule, begin, end);
  prepare_forward(p, memory, all);
  all.wait();
  Tiles tiles;
  run_tasks(schedule, begin, end, [&](int64_t i, const WorkRange& work) {
    const auto& mine = memory.task(p, schedule, i);
    ForwardSweep<kCell, S, F, kMasked>(p, memory, mine, schedule.task[i], work, memory.by_tiles ? &tiles : nullptr)
        .run();
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
