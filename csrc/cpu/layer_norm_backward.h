// The backward sweep of a layer with layer norm, which writes the gradients of what is normalized and of the gates of x
// of every row. Gates are computed again, from what was normalized. The gradients of scales and shifts are sums over
// rows, of each step by themselves; those of weights are left to the caller.
#pragma once
#include "gemm_once.h"
#include "layer_norm_memory.h"
#include "row_means.h"

namespace seqkernels::SEQKERNELS_ISA {

template <Cell kCell, class C>
class LayerNormBackwardSweep {
  using Memory = LayerNormBackwardMemory<C>;
  using V = Vec<C>;
  using Traits = CellTraits<kCell>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int G = Traits::gates, A = Traits::apart;
  static constexpr bool kHasC = Traits::states == 2;

 public:
  LayerNormBackwardSweep(const LayerNormBackward& p, const Memory& memory, const typename Memory::PerTask& mine,
                         const Task& task, const WorkRange& work)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        work(work),
        of(memory.direction[task.direction]),
        units(Units::of<C>(work, p.hidden)),
        columns(Units::of<C>(work, memory.columns)) {}

  void run() {
    load_state<C>(nullptr, mine.scale.all, columns);
    load_state<C>(nullptr, mine.shift.all, columns);
    load_state<C>(nullptr, mine.scale_c.all, units);
    load_state<C>(nullptr, mine.shift_c.all, units);
    change_states(-1, at.task.direction ? 0 : p.steps - 1);
    for (int64_t i = 0; i < p.steps; i++) run_step(at.task.direction ? i : p.steps - 1 - i);
  }

 private:
  // One vector of units of sequence r in the step that runs, as it was in the forward pass.
  struct Step {
    V blocks[kMaxBlocks];
    V h_before, c_before{}, h, c{}, mask;
  };

  int64_t saved_row() const { return memory.columns + (kHasC ? p.hidden : 0); }
  int64_t lanes_at(int64_t unit) const { return min(p.hidden - unit, kLane); }

  // Between step t and the one that it started from.
  void change_states(int64_t t, int64_t before) const {
    const int64_t H = p.hidden;
    at.change_states(
        t, before,
        [&](int64_t r, int64_t state) {
          store_state(mine.grad_h + r * memory.ldh, at.at_state(static_cast<C*>(p.grad_h_0), state, H), units);
          if (kHasC)
            store_state(mine.grad_c + r * memory.ldh, at.at_state(static_cast<C*>(p.grad_c_0), state, H), units);
        },
        [&](int64_t r, int64_t state) {
          load_state(at.at_state(static_cast<const C*>(p.grad_h_n), state, H), mine.grad_h + r * memory.ldh, units);
          if (kHasC)
            load_state(at.at_state(static_cast<const C*>(p.grad_c_n), state, H), mine.grad_c + r * memory.ldh, units);
        });
  }

  void run_step(int64_t t) {
    before = at.task.direction ? t + 1 : t - 1;
    const int64_t running = at.running(t);
    had_before = at.running(before);
    row0 = at.row(t, 0);
    row0_before = had_before ? at.row(before, 0) : 0;
    if (!running) return change_states(t, before);
    if (kHasC && p.norms.scale_c) {
      for (int64_t r = 0; r < running; r++) read_c_backward(r);
      work.wait();
      add_step(mine.scale_c, mine.shift_c, units);
    }
    for (int64_t r = 0; r < running; r++) cell_backward_of(r);
    work.wait();
    for (int64_t r = 0; r < running; r++) normalize_backward(r);
    add_step(mine.scale, mine.shift, columns);
    work.wait();
    if (p.norms.blocks == 1) {
      multiply_gradients(running, t % 2);
    } else {
      for (int64_t k = work.first(p.norms.blocks); k < work.last(p.norms.blocks); k++) multiply_block(k, running);
      work.wait();
    }
    change_states(t, before);
  }

  Step step_of(int64_t r, int64_t unit) const {
    Step step = states_before(r, unit);
    const C* const saved = at.of_row<C>(p.saved, row0, r, saved_row());
    const C* const gates_x = p.norms.of_sum ? nullptr : at.of_row<C>(p.norms.gates_x, row0, r, memory.columns);
    V x[G], recurrent[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const int64_t column = g * p.hidden + unit;
      recurrent[g] = load(saved + column, lanes_at(unit)) * load(of.scale + column) + load(of.shift + column);
      x[g] = gates_x ? load(gates_x + column, lanes_at(unit)) : V{};
    }
    cell_forward<kCell>(x, recurrent, step.h, step.c, step.blocks);
    if constexpr (Traits::saved_blocks > 0)
      if (p.candidate) drop_candidate<kCell>(step.mask, step.blocks, step.h_before, step.c_before, step.h, step.c);
    return step;
  }

  Step states_before(int64_t r, int64_t unit) const {
    const int64_t H = p.hidden, lanes = lanes_at(unit), state = at.sequence(r);
    const bool first = r >= had_before;  // this step started from the initial state
    const int64_t row_before = row0_before + r * at.task.stride;
    const C* const h_before = first ? at.at_state(static_cast<const C*>(p.h_0), state, H)
                                    : at.at_row(static_cast<const C*>(p.y), row_before, H);
    Step step;
    step.h = step.h_before = load(h_before + unit, lanes);
    if constexpr (kHasC) {
      const C* const c_before = first ? at.at_state(static_cast<const C*>(p.c_0), state, H)
                                      : at.at_row(static_cast<const C*>(p.saved), row_before, saved_row()) + G * H;
      step.c = step.c_before = load(c_before + unit, lanes);
    }
    if (p.candidate) step.mask = load(at.at_state(static_cast<const C*>(p.candidate), state, H) + unit, lanes);
    return step;
  }

  // With gates as read_c_backward leaves them, which are all that the gradient of c needs.
  Step step_left(int64_t r, int64_t unit) const {
    Step step = states_before(r, unit);
    for (int g = 0; g < G; g++) step.blocks[g] = load(mine.grad_gates + r * memory.lds + g * p.hidden + unit);
    return step;
  }

  // The gradient of the h that the cell gives; `stayed`: what zoneout passes on to the h before.
  V grad_of_h(int64_t r, int64_t unit, V& stayed) const {
    V grad = load(mine.grad_h + r * memory.ldh + unit);
    if (p.grad_y) grad += load(at.of_row<C>(p.grad_y, row0, r, p.hidden) + unit, lanes_at(unit));
    stayed = p.zoneout_h ? grad * load(at.of_row<C>(p.zoneout_h, row0, r, p.hidden) + unit, lanes_at(unit)) : V{};
    return grad - stayed;
  }

  // Of an LSTM whose c is normalized, the gradients of o and of what h is read from. The other gates stay where their
  // gradients will be.
  void read_c_backward(int64_t r) const {
    const C* const statistics = at.of_row<C>(p.statistics, row0, r, p.norms.statistics_of_row);
    const Moments<C> moments(statistics[1], statistics[2]);
    const int64_t lds = memory.lds;
    for (int64_t unit = units.first; unit < units.last; unit += kLane) {
      const Step step = step_of(r, unit);
      V stayed;
      const V grad_h = grad_of_h(r, unit, stayed), o = step.blocks[3], normalized = moments.of(step.c);
      const V read = tanh(normalized * load(of.scale_c + unit) + load(of.shift_c + unit));
      const V grad = grad_h * o * (1 - read * read);
      C* const gates = mine.grad_gates + r * lds + unit;
#pragma GCC unroll 4
      for (int g = 0; g < 3; g++) store(gates + g * p.hidden, step.blocks[g], lanes_at(unit));
      store(gates + 3 * p.hidden, grad_h * read * o * (1 - o), lanes_at(unit));
      store(mine.c + r * memory.ldh + unit, normalized);
      store(mine.grad_c_normalized + r * memory.ldh + unit, grad * load(of.scale_c + unit));
      add(mine.scale_c, mine.shift_c, unit, r, grad, normalized);
    }
  }

  // The gradients of the gates of sequence r, and of the states before as far as they go past W_hh.
  void cell_backward_of(int64_t r) const {
    const int64_t H = p.hidden, ldh = memory.ldh;
    const bool normalizes_c = kHasC && p.norms.scale_c;
    const C *const grads = mine.grad_c_normalized + r * ldh, *const c = mine.c + r * ldh;
    C means[2] = {}, inverse_c = 0;
    if (normalizes_c) {
      inverse_c = at.of_row<C>(p.statistics, row0, r, p.norms.statistics_of_row)[2];
      means_of_gradient(H, grads, c, means);
    }
    for (int64_t unit = units.first; unit < units.last; unit += kLane) {
      const int64_t lanes = lanes_at(unit);
      const Step step = normalizes_c ? step_left(r, unit) : step_of(r, unit);
      V stayed_h, stayed_c{}, grad_c{}, grad[G + A];
      V grad_h = grad_of_h(r, unit, stayed_h);
      if constexpr (kHasC) {
        grad_c = load(mine.grad_c + r * ldh + unit);
        if (p.zoneout_c) stayed_c = grad_c * load(at.of_row<C>(p.zoneout_c, row0, r, H) + unit, lanes);
        grad_c -= stayed_c;
      }
      if (normalizes_c) {
        grad_c += normalized_backward<C>(load(grads + unit), load(c + unit), means, inverse_c);
        grad_h = V{};  // all that comes through it is there already
      }
      const V past = gradients_of(step, grad_h, grad_c, grad);
      store(mine.grad_h + r * ldh + unit, past + stayed_h);
      if constexpr (kHasC) store(mine.grad_c + r * ldh + unit, grad_c + stayed_c);
      store_gradients(r, unit, grad, normalizes_c);
      put_factors(r, unit, step.h_before);
    }
  }

  V gradients_of(const Step& step, V grad_h, V& grad_c, V* grad) const {
    const V now = kHasC ? step.c : step.h, before = kHasC ? step.c_before : step.h_before;
    if constexpr (Traits::saved_blocks > 0)
      if (p.candidate) return dropped_backward<kCell>(step.mask, grad_h, grad_c, step.blocks, now, before, grad);
    return cell_backward<kCell>(grad_h, grad_c, step.blocks, now, before, grad);
  }

  void store_gradients(int64_t r, int64_t unit, const V* grad, bool has_o) const {
    const int64_t H = p.hidden, lanes = lanes_at(unit);
    C* const of_gates = mine.grad_gates + r * memory.lds + unit;
    C* const of_x = p.grad_gates_x ? at.of_row<C>(p.grad_gates_x, row0, r, memory.columns) + unit : nullptr;
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      V x = grad[g < G - A ? g : g + A];
      if (kHasC && g == 3 && has_o)
        x = load(of_gates + g * H);
      else
        store(of_gates + g * H, grad[g], lanes);
      if (of_x) store(of_x + g * H, x, lanes);
    }
  }

  // h before the step, as the products had it.
  void put_factors(int64_t r, int64_t unit, V h) const {
    const int64_t H = p.hidden, lanes = lanes_at(unit);
    if (p.recurrent) h *= load(at.at_state(static_cast<const C*>(p.recurrent), at.sequence(r), H) + unit, lanes);
    store(at.of_row<C>(p.factors, row0, r, H) + unit, h, lanes);
  }

  static void means_of_gradient(int64_t n, const C* grad, const C* normalized, C* means) {
    means_of<C, 2>(n, means, [&](int64_t i, V* sums) {
      const V x = load(grad + i);
      sums[0] += x;
      sums[1] += x * load(normalized + i);
    });
  }

  // The gradients of what was normalized, from those of the gates.
  void normalize_backward(int64_t r) const {
    const int64_t n = memory.columns;
    const C inverse = *at.of_row<C>(p.statistics, row0, r, p.norms.statistics_of_row);
    const C* const normalized = at.of_row<C>(p.saved, row0, r, saved_row());
    const C* const grads = mine.grad_gates + r * memory.lds;
    C* const result = at.of_row<C>(p.grad_sums, row0, r, n);
    C means[2];
    means_of<C, 2>(n, means, [&](int64_t i, V* sums) {
      const V grad = load(grads + i) * load(of.scale + i);
      sums[0] += grad;
      sums[1] += grad * load(normalized + i, n - i);
    });
    for (int64_t i = columns.first; i < columns.last; i += kLane) {
      const V grad = load(grads + i), x = load(normalized + i, n - i);
      store(result + i, normalized_backward<C>(grad * load(of.scale + i), x, means, inverse), n - i);
      add(mine.scale, mine.shift, i, r, grad, x);
    }
  }

  // One vector's part of the gradients of a scale and its shift, in the sums of a step; the first sequence begins them.
  SEQKERNELS_INLINE void add(const typename Memory::Sums& scale, const typename Memory::Sums& shift, int64_t i,
                             int64_t r, V grad, V normalized) const {
    store(scale.of_step + i, r ? load(scale.of_step + i) + grad * normalized : grad * normalized);
    store(shift.of_step + i, r ? load(shift.of_step + i) + grad : grad);
  }

  void add_step(const typename Memory::Sums& scale, const typename Memory::Sums& shift, const Units& range) const {
    for (int64_t i = range.first; i < range.last; i += kLane) {
      store(scale.all + i, load(scale.all + i) + load(scale.of_step + i));
      store(shift.all + i, load(shift.all + i) + load(shift.of_step + i));
    }
  }

  // What reaches h through its products.
  void multiply_gradients(int64_t running, bool backwards) const {
    const int64_t H = p.hidden, first = units.first / kLane, last = vectors_of<C>(units.last);
    const auto row = [&](int64_t r) -> const C* { return at.of_row<C>(p.grad_sums, row0, r, memory.columns); };
    const auto put = [&](int64_t r, int64_t unit, int64_t lanes, V x) { add_to_h(r, unit, lanes, x); };
    if (!memory.once) return product(memory.hh, of.w_hh, first, last, running, {memory.hh.k}, row, put, backwards);
    const C* const w_hh = static_cast<const C*>(p.weights[at.task.direction].w_hh);
    C* const slice = mine.slices + work.begin * memory.once_size;
    product_once<C>(
        memory.hh, [&](int64_t k) { return w_hh + k * H; }, first, last, running, row, put, slice,
        reinterpret_cast<V*>(slice + Memory::kSliceSize));
  }

  // The same of block k, whose gates lie H columns apart.
  void multiply_block(int64_t k, int64_t running) const {
    const int64_t H = p.hidden, first = k * memory.hh.units;
    Depth depth{memory.hh.units};
    depth.segments = G, depth.gap = H;
    product(
        memory.hh, of.w_hh + k * memory.hh.size(), 0, memory.hh.vectors(), running, depth,
        [&](int64_t r) -> const C* { return at.of_row<C>(p.grad_sums, row0, r, memory.columns) + first; },
        [&](int64_t r, int64_t unit, int64_t lanes, V x) { add_to_h(r, first + unit, lanes, x); });
  }

  SEQKERNELS_INLINE void add_to_h(int64_t r, int64_t unit, int64_t lanes, V x) const {
    C* const grad_h = mine.grad_h + r * memory.ldh + unit;
    if (p.recurrent) x *= load(at.at_state(static_cast<const C*>(p.recurrent), at.sequence(r), p.hidden) + unit, lanes);
    store(grad_h, load(grad_h, lanes) + x, lanes);
  }

  const LayerNormBackward& p;
  const Layout at;
  const Memory& memory;
  const typename Memory::PerTask mine;
  const WorkRange work;
  const typename Memory::PerDirection& of;
  const Units units, columns;  // this range's
  // Of the step that runs.
  int64_t before, had_before, row0, row0_before;
};

// The sums of all tasks of a direction become results.
template <class C>
void finish_norms(const LayerNormBackward& p, const LayerNormBackwardMemory<C>& memory, const Schedule& schedule,
                  const WorkRange& work) {
  const auto finish = [&](void* to, int64_t n, const auto& sums_of) {
    for (int d = 0; to && d < p.directions; d++)
      for (int64_t i = work.first(n); i < work.last(n); i++) {
        C sum = 0;
        for (int64_t k = 0; k < schedule.tasks; k++)
          if (schedule.task[k].direction == d) sum += sums_of(memory.task(p, schedule, k)).all[i];
        static_cast<C*>(to)[d * n + i] = sum;
      }
  };
  using Task = typename LayerNormBackwardMemory<C>::PerTask;
  finish(p.grad_scale, memory.columns, [](const Task& task) { return task.scale; });
  finish(p.grad_shift, memory.columns, [](const Task& task) { return task.shift; });
  finish(p.grad_scale_c, p.hidden, [](const Task& task) { return task.scale_c; });
  finish(p.grad_shift_c, p.hidden, [](const Task& task) { return task.shift_c; });
}

// Panel j of all blocks' panels: of a block the rows of every gate, which lie H apart in w_hh.
template <class C>
void pack_block(const LayerNormBackwardMemory<C>& memory, const C* w_hh, int64_t j, C* packed) {
  const auto& hh = memory.hh;
  const int64_t k = j / hh.count(), H = hh.units * memory.blocks;
  for (int64_t gate = 0; gate < memory.columns / H; gate++)
    pack_rows(hh, j % hh.count(), w_hh + (gate * H + k * hh.units) * hh.units, hh.units, gate * hh.units,
              (gate + 1) * hh.units, packed + k * hh.size());
}

template <Cell kCell, class C>
void layer_norm_backward(const LayerNormBackward& p, const Schedule& schedule, int begin, int end, void* base) {
  const LayerNormBackwardMemory<C> memory(p, schedule, base);
  const WorkRange all = whole_range(schedule, begin, end);
  const int64_t panels = memory.once ? 0 : memory.blocks * memory.hh.count();
  for (int d = 0; d < p.directions; d++) {
    for (int64_t j = all.first(panels); j < all.last(panels); j++)
      pack_block(memory, static_cast<const C*>(p.weights[d].w_hh), j, memory.direction[d].w_hh);
    if (!all.begin) memory.direction[d].load(p, p.norms, d);
  }
  all.wait();
  run_tasks(schedule, begin, end, [&](int64_t i, const WorkRange& work) {
    LayerNormBackwardSweep<kCell, C>(p, memory, memory.task(p, schedule, i), schedule.task[i], work).run();
  });
  all.wait();
  finish_norms<C>(p, memory, schedule, all);
}

}  // namespace seqkernels::SEQKERNELS_ISA
