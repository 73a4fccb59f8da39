// The backward sweep over time, which writes the gradients of gates, chunk by chunk of steps. After each chunk the
// gradients of input and weights follow, so that what the sweep wrote is still in the caches.
#pragma once
#include "weight_grads.h"

namespace seqkernels::SEQKERNELS_ISA {

// The gradients of h(t-1) of the rows that run, from those of the gates, `units` of it; added to what there is if some
// of it goes past the gates. `mask` multiplied h in the products. No inline: the same for all cells.
template <bool kMasked, class S, class F>
__attribute__((noinline)) void multiply_gates(const BackwardMemory<S, F>& memory, const S* w_hh, int direction,
                                              const Units& units, int64_t rows, const number_t<F>* grads,
                                              int64_t stride, bool added, acc_t<S>* grad_h, bool backwards,
                                              acc_t<S>* slice, Tiles* tiles, const acc_t<S>* mask,
                                              int64_t mask_stride) {
  using C = acc_t<S>;
  using V = Vec<C>;
  const int64_t first = units.first / kLanes<C>, last = vectors_of<C>(units.last);
  const auto row = [&](int64_t r) { return reinterpret_cast<const F*>(grads + r * stride + memory.columns.recurrent); };
  const auto put = [&](int64_t r, int64_t unit, int64_t, V x) {
    C* h = grad_h + r * memory.ldp + unit;
    if (kMasked && mask) x *= load(mask + r * mask_stride + unit, min(memory.hh.units - unit, kLanes<C>));
    store(h, added ? load(h) + x : x);
  };
  if constexpr (!BackwardMemory<S, F>::kPairs) {
    const auto source = [&](int64_t k) { return w_hh + k * memory.hh.units; };
    if (memory.once)
      return product_once<S>(memory.hh, source, first, last, rows, row, put, slice, memory.sums_behind(slice));
  }
  product(memory.hh, memory.direction[direction].w_hh, first, last, rows,
          Depth::of(memory.hh.k, tiles, memory.grad_parts()), row, put, backwards);
}

template <Cell kCell, class S, class F, bool kMasked>
class BackwardSweep {
  using C = acc_t<S>;
  using Memory = BackwardMemory<S, F>;
  using V = Vec<C>;
  using Traits = CellTraits<kCell>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int G = Traits::gates, K = Traits::saved_blocks, A = Traits::apart;
  static constexpr bool kHasC = Traits::states == 2;

 public:
  BackwardSweep(const LayerBackward& p, const Memory& memory, const typename Memory::PerTask& mine, const Task& task,
                const WorkRange& work, Tiles* tiles)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        work(work),
        tiles(tiles),
        weights(memory.direction[task.direction]),
        source(p.weights[task.direction]),
        slice(mine.slices + work.begin * memory.once_size),
        units(Units::of<C>(work, p.hidden)),
        outputs(Units::of<C>(work, p.projected)),
        recurrent(static_cast<const C*>(p.recurrent)),
        candidate(static_cast<const C*>(p.candidate)),
        zoneout_h(static_cast<const C*>(p.zoneout_h)),
        zoneout_c(static_cast<const C*>(p.zoneout_c)) {}

  void run(const Chunk& chunk) {
    if (chunk.last == p.steps) change_states(-1, at.task.direction ? 0 : p.steps - 1);
    for (int64_t i = chunk.first; i < chunk.last; i++)
      run_step(at.task.direction ? i : chunk.first + chunk.last - 1 - i, chunk.row);
  }

 private:
  // Between step t and the one that it started from.
  void change_states(int64_t t, int64_t before) const {
    const int64_t H = p.hidden, P = p.projected;
    at.change_states(
        t, before,
        [&](int64_t r, int64_t state) {
          store_state(mine.grad_h + r * memory.ldp, at.at_state(static_cast<S*>(p.grad_h_0), state, P), outputs);
          if (kHasC)
            store_state(mine.grad_c + r * memory.ldh, at.at_state(static_cast<S*>(p.grad_c_0), state, H), units);
        },
        [&](int64_t r, int64_t state) {
          load_state(at.at_state(static_cast<const S*>(p.grad_h_n), state, P), mine.grad_h + r * memory.ldp, outputs);
          if (kHasC)
            load_state(at.at_state(static_cast<const S*>(p.grad_c_n), state, H), mine.grad_c + r * memory.ldh, units);
        });
  }

  number_t<F>* grad_row(int64_t r) const { return grads + r * at.task.stride * p.directions * memory.grad_row; }

  void run_step(int64_t t, int64_t chunk_row) {
    before = at.task.direction ? t + 1 : t - 1;  // the step this one started from
    const int64_t running = at.running(t);
    had_before = at.running(before);
    ahead = at.rows_to(t, before) * p.directions;
    row0 = at.row(t, 0);
    row0_before = had_before ? at.row(before, 0) : 0;
    grads = at.at_row(memory.grads, row0 - chunk_row, memory.grad_row);

    if (p.grad_y) add_grad_y(running);
    if constexpr (Traits::can_project) {
      if (p.has_projection) undo_projection(running);
    }
    for (int64_t r = 0; r < running; r++) {
      const int64_t state = at.state(t, r);
      const bool first = r >= had_before || at.state(before, r) != state;  // this step started from the initial state
      for (int64_t unit = units.first; unit < units.last; unit += kLane) gates(r, unit, first, state);
    }
    work.wait();
    multiply_gates<kMasked, S>(memory, static_cast<const S*>(source.w_hh), at.task.direction, outputs, running, grads,
                               grad_row(1) - grads, Traits::needs_h_prev || (kMasked && zoneout_h), mine.grad_h, t % 2,
                               slice, tiles, recurrent ? at.at_state(recurrent, at.sequence(0), p.projected) : nullptr,
                               at.task.stride * p.projected);
    change_states(t, before);
  }

  void add_grad_y(int64_t running) const {
    const int64_t P = p.projected;
    for (int64_t r = 0; r < running; r++) {
      const S* from = at.at_row(static_cast<const S*>(p.grad_y), row0 + r * at.task.stride, P);
      C* to = mine.grad_h + r * memory.ldp;
      for (int64_t u = outputs.first; u < outputs.last; u += kLane) {
        prefetch_load(from + u + ahead * P);
        store(to + u, load(to + u) + load(from + u, P - u));
      }
    }
  }

  void undo_projection(int64_t running) const {
    const auto row = [&](int64_t r) { return reinterpret_cast<const F*>(grad_row(r) + memory.columns.projected); };
    for (int64_t r = 0; r < running; r++)
      for (int64_t u = outputs.first; u < outputs.last; u += kLane) {
        C* const grad_h = mine.grad_h + r * memory.ldp + u;
        V grad = load(grad_h);
        if (kMasked && zoneout_h) {
          const V stayed =
              grad * load(at.at_row(zoneout_h, row0 + r * at.task.stride, p.projected) + u, outputs.last - u);
          grad -= stayed;
          store(grad_h, stayed);
        }
        memory.store_gradient(grad_row(r) + memory.columns.projected + u, grad, outputs.last - u);
      }
    work.wait();
    const int64_t first = units.first / kLane, last = vectors_of<C>(units.last);
    const auto put = [&](int64_t r, int64_t unit, int64_t, V x) {
      store(mine.grad_unprojected + r * memory.ldh + unit, x);
    };
    if constexpr (!Memory::kPairs) {
      const auto w_hr = [&](int64_t k) { return static_cast<const S*>(source.w_hr) + k * p.hidden; };
      if (memory.once)
        return product_once<S>(memory.hr, w_hr, first, last, running, row, put, slice, memory.sums_behind(slice));
    }
    product(memory.hr, weights.w_hr, first, last, running, Depth::of(memory.hr.k, tiles, memory.grad_parts()), row,
            put);
  }

  // Gradients of the gates of one vector of units of sequence r, whose state began with this step if `first`.
  void gates(int64_t r, int64_t unit, bool first, int64_t state) const {
    const int64_t H = p.hidden, P = p.projected, lanes = min(H - unit, kLane), row = row0 + r * at.task.stride;
    const int64_t row_before = row0_before + r * at.task.stride;
    const S* y = static_cast<const S*>(p.y);
    const S* saved = static_cast<const S*>(p.saved);
    [[maybe_unused]] const auto saved_block = [&](int block) {
      const S* from = at.at_row(saved, row, K * H) + block * H + unit;
      prefetch_load(from + ahead * K * H);
      return load(from, lanes);
    };
    V blocks[K + 1], state_now{}, state_before{}, grad_c{}, grad[G + A];
#pragma GCC unroll 4
    for (int block = 0; block < K - kHasC; block++) blocks[block] = saved_block(block);
    if constexpr (kHasC) {
      const S* c_0 = static_cast<const S*>(p.c_0);
      const S* c_prev = first ? at.at_state(c_0, state, H) : at.at_row(saved, row_before, K * H) + (K - 1) * H;
      state_now = saved_block(K - 1);
      state_before = load(c_prev + unit, lanes);
      grad_c = load(mine.grad_c + r * memory.ldh + unit);
    } else if constexpr (Traits::needs_h_prev) {
      const S* h_prev = first ? at.at_state(static_cast<const S*>(p.h_0), state, P) : at.at_row(y, row_before, P);
      state_before = load(h_prev + unit, lanes);
    } else {
      state_now = load((kMasked && zoneout_h ? at.at_row(saved, row, H) : at.at_row(y, row, P)) + unit, lanes);
    }
    C* grad_h = mine.grad_h + r * memory.ldp + unit;
    const bool projected = Traits::can_project && p.has_projection;
    V of_h = load(projected ? mine.grad_unprojected + r * memory.ldh + unit : grad_h);
    // What zoneout passes on to the states before.
    [[maybe_unused]] V stayed_h{}, stayed_c{};
    if (kMasked && zoneout_h && !projected) {
      stayed_h = of_h * load(at.at_row(zoneout_h, row, P) + unit, lanes);
      of_h -= stayed_h;
    }
    const V mask = kMasked && candidate ? load(at.at_state(candidate, at.sequence(r), H) + unit, lanes) : V{} + 1;
    if constexpr (kHasC)
      if (kMasked && zoneout_c) {
        stayed_c = grad_c * load(at.at_row(zoneout_c, row, H) + unit, lanes);
        grad_c -= stayed_c;
        state_now = lstm_c(blocks, state_before, mask);  // that h came from
      }
    [[maybe_unused]] V past;
    if constexpr (kMasked && K > 0)
      past = dropped_backward<kCell>(mask, of_h, grad_c, blocks, state_now, state_before, grad);
    else
      past = cell_backward<kCell>(of_h, grad_c, blocks, state_now, state_before, grad);
    if constexpr (kHasC) store(mine.grad_c + r * memory.ldh + unit, kMasked && zoneout_c ? grad_c + stayed_c : grad_c);
    if constexpr (Traits::needs_h_prev)
      store(grad_h, kMasked && zoneout_h ? past + stayed_h : past);
    else if (kMasked && zoneout_h && !projected)
      store(grad_h, stayed_h);
    number_t<F>* grad_gates = grad_row(r) + unit;
#pragma GCC unroll 8
    for (int g = 0; g < G + A; g++) memory.store_gradient(grad_gates + (g < G ? A + g : g - G) * H, grad[g], lanes);
  }

  const LayerBackward& p;
  const Layout at;
  const Memory& memory;
  const typename Memory::PerTask mine;
  const WorkRange work;
  Tiles* const tiles;  // null where products are not by tiles
  const typename Memory::PerDirection& weights;
  const WeightsOf<const void*>& source;
  C* const slice;
  const Units units, outputs;  // this range's, of H and of P
  const C *const recurrent, *const candidate, *const zoneout_h, *const zoneout_c;
  // Of the step that runs.
  int64_t before, had_before, ahead, row0, row0_before;
  number_t<F>* grads;
};

// What all members prepare together.
template <class S, class F>
void prepare_backward(const LayerBackward& p, const BackwardMemory<S, F>& memory, const WorkRange& work) {
  const int64_t G = gates_of(p.cell), H = p.hidden;
  const auto pack = [&](const Panels<F>& shape, const void* source, int64_t rows, F* packed) {
    for (int64_t j = work.first(shape.count()); j < work.last(shape.count()); j++)
      pack_rows(shape, j, static_cast<const S*>(source), rows, 0, shape.depth, packed);
  };
  for (int d = 0; d < p.directions; d++) {
    if (!memory.once) {
      pack(memory.hh, p.weights[d].w_hh, memory.columns.gates, memory.direction[d].w_hh);
      if (p.has_projection) pack(memory.hr, p.weights[d].w_hr, p.projected, memory.direction[d].w_hr);
    }
    if (p.wants_x && !memory.once)
      for (int64_t j = work.first(memory.ih.count()); j < work.last(memory.ih.count()); j++)
        for (int64_t g = 0; g < G; g++) {
          const S* source = static_cast<const S*>(p.weights[d].w_ih) + memory.columns.gate_of_input(g * H) * p.input;
          const int64_t begin = d * memory.segment, factors = H / kPerFactor<F>;
          pack_rows(memory.ih, j, source, H, begin + g * factors,
                    begin + (g < G - 1 ? (g + 1) * factors : memory.segment), memory.w_ih);
        }
    if (!memory.wants_weights) continue;
    for (int64_t t = work.first(p.steps); t < work.last(p.steps); t++) {
      const int64_t before = d ? t + 1 : t - 1;
      const int64_t had_before = before < 0 || before >= p.steps ? 0 : p.batch_sizes[before];
      for (int64_t b = 0; b < p.batch_sizes[t]; b++) {
        const int64_t row = p.offsets[t] + b, row_before = b < had_before ? p.offsets[before] + b : row;
        const int64_t state = p.pieces ? p.pieces[row] : b;
        const bool first = row_before == row || (p.pieces && p.pieces[row_before] != state);
        memory.before[d][row] = first ? -1 - state : row_before;
      }
      for (int64_t b = 0; memory.sequence && b < p.batch_sizes[t]; b++) memory.sequence[p.offsets[t] + b] = b;
    }
  }
}

template <Cell kCell, class S, class F, bool kMasked = false>
void backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* base) {
  using Memory = BackwardMemory<S, F>;
  const Memory memory(p, schedule, base);
  const WorkRange all = whole_range(schedule, begin, end);
  Tiles own;
  Tiles* const tiles = Memory::kPairs ? &own : nullptr;
  const auto sweep = [&](const auto& run) {
    run_tasks(schedule, begin, end, [&](int64_t i, const WorkRange& work) {
      run(BackwardSweep<kCell, S, F, kMasked>(p, memory, memory.task(p, schedule, i), schedule.task[i], work, tiles));
    });
  };
  prepare_backward(p, memory, all);
  all.wait();
  for (int64_t end_step = p.steps; end_step > 0; end_step -= memory.chunk_steps) {
    const int64_t first = max(0, end_step - memory.chunk_steps), last = end_step;
    Chunk chunk;
    chunk.first = first;
    chunk.last = last;
    chunk.row = p.offsets[first];
    chunk.rows = p.offsets[last - 1] + p.batch_sizes[last - 1] - chunk.row;
    sweep([&](auto task) { task.run(chunk); });
    all.wait();
    if (p.wants_x) input_gradient(p, memory, all, chunk, tiles);
    if (memory.wants_weights)
      for (int d = 0; d < p.directions; d++) weight_gradients(p, memory, all, chunk, d, last < p.steps, tiles);
    all.wait();
  }
  if (memory.wants_weights) finish_weight_gradients(p, memory, all);
}

}  // namespace seqkernels::SEQKERNELS_ISA
