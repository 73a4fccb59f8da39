// What the sweeps of a layer with layer norm work in.
#pragma once
#include "forward_memory.h"

namespace seqkernels::SEQKERNELS_ISA {

// The parameters of one direction, with room behind them to read a vector.
template <class C>
struct NormsOfDirection {
  C *scale, *shift;      // [G*H], zeros where there is no shift
  C *scale_c, *shift_c;  // [H]

  void take(const Layer& p, Arena& arena) {
    const int64_t gates = leading<C>(gates_of(p.cell) * p.hidden + kLanes<C>), units = leading<C>(p.hidden);
    scale = arena.take<C>(gates);
    shift = arena.take<C>(gates);
    scale_c = arena.take<C>(units);
    shift_c = arena.take<C>(units);
  }
  void load(const Layer& p, const Norms& norms, int direction) const {
    const auto load_one = [&](const void* from, C* to, int64_t n) {
      load_state(from ? static_cast<const C*>(from) + direction * n : nullptr, to, {0, n});
    };
    const int64_t gates = gates_of(p.cell) * p.hidden;
    load_one(norms.scale, scale, gates);
    load_one(norms.shift, shift, gates);
    load_one(norms.scale_c, scale_c, p.hidden);
    load_one(norms.shift_c, shift_c, p.hidden);
  }
};

template <class C>
struct LayerNormForwardMemory {
  struct PerDirection : NormsOfDirection<C> {
    C* w_hh;
  };
  struct PerTask {
    C *h, *h_next;              // [count, ldh]
    C *factors, *factors_next;  // [count, ldh]: h as products have it; the same memory without a mask
    C* c;                       // [count, ldh]
    C *c_new, *o;               // [count, ldh]: c before zoneout, and the gate that reads it, where c is normalized
    C* sums;                    // [count, lds]: what is normalized
  };

  const bool packed;       // W_hh is; few rows are multiplied with it where it lies
  const int64_t columns;   // G*H
  const int64_t matrices;  // one below the other in W_hh: with blocks each gate's of each block
  const Panels<C> hh;      // of one of them
  const int64_t ldh, lds;
  PerDirection direction[2] = {};
  TaskArenas tasks;

  LayerNormForwardMemory(const LayerNormForward& p, const Schedule& schedule, void* base)
      : packed(p.rows > kFewRows),
        columns(gates_of(p.cell) * p.hidden),
        matrices(p.norms.blocks > 1 ? gates_of(p.cell) * p.norms.blocks : 1),
        hh(p.hidden / p.norms.blocks, columns / matrices, 1),
        ldh(leading<C>(p.hidden)),
        lds(leading<C>(columns + kLanes<C>)) {
    Arena arena{static_cast<char*>(base)};
    for (int d = 0; d < p.directions; d++) {
      direction[d].w_hh = arena.take<C>(packed ? matrices * hh.size() : 0);
      direction[d].take(p, arena);
    }
    tasks = TaskArenas(arena, [&](Arena& task) { take_task(p, schedule, task); });
  }

  int64_t bytes(const Schedule& schedule) const { return tasks.end(schedule.tasks); }

  PerTask task(const LayerNormForward& p, const Schedule& schedule, int64_t i) const {
    Arena arena = tasks.of(i);
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerNormForward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t size = schedule.max_sequences * ldh;
    PerTask task;
    task.h = arena.take<C>(size);
    task.h_next = arena.take<C>(size);
    task.factors = p.recurrent ? arena.take<C>(size) : task.h;
    task.factors_next = p.recurrent ? arena.take<C>(size) : task.h_next;
    task.c = arena.take<C>(p.c_0 ? size : 0);
    task.c_new = arena.take<C>(p.norms.scale_c ? size : 0);
    task.o = arena.take<C>(p.norms.scale_c ? size : 0);
    task.sums = arena.take<C>(schedule.max_sequences * lds);
    return task;
  }
};

template <class C>
struct LayerNormBackwardMemory {
  struct PerDirection : NormsOfDirection<C> {
    C* w_hh;
  };
  // Sums over rows, of a step and of all so far.
  struct Sums {
    C *of_step, *all;
  };
  struct PerTask {
    C *grad_h, *grad_c;        // [count, ldh]
    C* grad_gates;             // [count, lds]: of W_hh h behind its norm
    C *c, *grad_c_normalized;  // [count, ldh]: c normalized, and the gradient of it with its scale and shift
    Sums scale, shift;         // [lds]
    Sums scale_c, shift_c;     // [ldh]
    C* slices;                 // [members of the team, once_size]: of W_hh where it is used once
  };
  static constexpr int64_t kSliceSize = kKc * kMaxVectors * kLanes<C>;

  const int64_t columns, blocks;  // columns: G*H
  const Panels<C> hh;             // of a block, whose gates lie one below the other
  const int64_t ldh, lds;
  const bool once;          // a single step of few rows: W_hh is packed slice by slice where it is used (product_once)
  const int64_t once_size;  // of a member's memory for that: a slice, and sums behind it
  PerDirection direction[2] = {};
  TaskArenas tasks;

  LayerNormBackwardMemory(const LayerNormBackward& p, const Schedule& schedule, void* base)
      : columns(gates_of(p.cell) * p.hidden),
        blocks(p.norms.blocks),
        hh(columns / p.norms.blocks, p.hidden / p.norms.blocks, 1),
        ldh(leading<C>(p.hidden)),
        lds(leading<C>(columns + kLanes<C>)),
        once(p.steps == 1 && p.rows <= kRowsOnce && p.norms.blocks == 1),
        once_size(once ? kSliceSize + p.rows * ldh : 0) {
    Arena arena{static_cast<char*>(base)};
    for (int d = 0; d < p.directions; d++) {
      direction[d].w_hh = arena.take<C>(once ? 0 : p.norms.blocks * hh.size());
      direction[d].take(p, arena);
    }
    tasks = TaskArenas(arena, [&](Arena& task) { take_task(p, schedule, task); });
  }

  int64_t bytes(const Schedule& schedule) const { return tasks.end(schedule.tasks); }

  PerTask task(const LayerNormBackward& p, const Schedule& schedule, int64_t i) const {
    Arena arena = tasks.of(i);
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerNormBackward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.max_sequences, of_c = p.norms.scale_c ? count * ldh : 0;
    const auto sums = [&](int64_t n) {
      C* of_step = arena.take<C>(n);
      return Sums{of_step, arena.take<C>(n)};
    };
    PerTask task;
    task.grad_h = arena.take<C>(count * ldh);
    task.grad_c = arena.take<C>(p.c_0 ? count * ldh : 0);
    task.grad_gates = arena.take<C>(count * lds);
    task.c = arena.take<C>(of_c);
    task.grad_c_normalized = arena.take<C>(of_c);
    task.scale = sums(lds);
    task.shift = sums(lds);
    task.scale_c = sums(ldh);
    task.shift_c = sums(ldh);
    task.slices = arena.take<C>(schedule.team_size * once_size);
    return task;
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
