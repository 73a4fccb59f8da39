// What the backward pass of a layer works in: packed weights, the gradients of a chunk's gates, sums of the gradients
// of weights, and each task's gradients of states.
#pragma once
#include "forward_memory.h"

namespace seqkernels::SEQKERNELS_ISA {

// A chunk has at most so many rows and bytes of gradients, but at least one step.
constexpr int64_t kGradientRows = 512;
constexpr int64_t kGradientBytes = 4 << 20;

// How the columns of a gradient row belong to the weights. A row has, of width H each, the gradients for W_ih x of the
// gates that stay apart (CellTraits::apart), those of the gates that add both products, and the gradients for W_hh h of
// the gates that stay apart. So both those for W_ih and those for W_hh lie together: a GRU's row is n for x, r, z, n
// for h, of which the first three belong to W_ih (as n r z) and the last three to W_hh (r z n). With a projection the
// gradient of the projected h follows.
struct Columns {
  int64_t gates;      // G*H
  int64_t recurrent;  // where those for W_hh begin
  int64_t projected;  // where those for W_hr begin
  int64_t width;

  explicit Columns(const Layer& p)
      : gates(gates_of(p.cell) * p.hidden),
        recurrent(apart_of(p.cell) * p.hidden),
        projected(recurrent + gates),
        width(projected + (p.has_projection ? p.projected : 0)) {}

  // The row of W_ih that a column belongs to.
  int64_t gate_of_input(int64_t column) const {
    return column < recurrent ? column + gates - recurrent : column - recurrent;
  }
};

// A single step of few rows: weights are packed slice by slice where they are used (product_once).
inline bool uses_weights_once(const LayerBackward& p) {
  return p.steps == 1 && p.rows <= kRowsOnce && p.directions == 1 && p.hidden && p.projected;
}

// Whether products take gradients of gates as pairs of bfloat16, by tiles. A pair has to belong to one matrix.
inline bool multiplies_gradients_by_tiles(const LayerBackward& p) {
  const bool rounded = (p.bfloat16_tiles && p.scalar == Scalar::bfloat16) || splits_for_tiles(p);
  return rounded && p.hidden % 2 == 0 && p.projected % 2 == 0 && !uses_weights_once(p);
}

// The memory of one backward call. S is the type of the layer's numbers, F what products take of them: the type of
// computation, or pairs of bfloat16.
template <class S, class F>
struct BackwardMemory {
  using C = acc_t<S>;
  static constexpr bool kPairs = !std::is_same<F, C>::value;
  static constexpr bool kSplits = kPairs && std::is_same<S, float>::value;
  // Of a weight gradient, in BLIS's words: rows that are multiplied at once, columns of the microkernel (of which it is
  // rows), and the memory of right factors.
  static constexpr int64_t kWeightKc = kPairs ? 512 : kKc;
  static constexpr int64_t kWeightMr = kPairs ? 2 * kTileRows : kMr<kMaxVectors>;
  static constexpr int64_t kPanelSize = (kPairs ? 16 * kWeightKc / kPerFactor<F> : kKc) * kMaxVectors * kLanes<C>;
  static constexpr bool kSumsApart = !std::is_same<S, C>::value;
  struct PerDirection {
    F *w_hh, *w_hr;
    C *grad_w_ih, *grad_w_hh, *grad_w_hr;  // sums so far; in the results themselves where these have the type of sums
    C* column_sums;                        // [ldg]
  };
  struct PerTask {
    C* grad_h;            // [count, ldp]: of each sequence's h, what comes back from later steps
    C* grad_c;            // [count, ldh]
    C* grad_unprojected;  // [count, ldh]
    C* slices;            // [members of the team, once_size]: of weights that are used once
  };

  const Columns columns;
  const int parts;        // of a number, as which it is multiplied
  const int64_t segment;  // factors of a direction's part of W_ih
  const Panels<F> ih, hh, hr;
  const int64_t ldh, ldp, ldg;
  const int64_t grad_row;  // numbers of a row of gradients in all its parts, ldg apart
  const int64_t chunk_steps;
  const bool once;
  const int64_t once_size;                // of a member's memory for that: a slice, and the sums
  const int64_t panel_size;               // of a member's memory for gradients of input and weights
  const int64_t turned_part, turned_row;  // factors of a part of a row of `turned`, and of the row
  bool wants_weights;
  PerDirection direction[2] = {};
  F* w_ih;             // of all directions, one below the other
  number_t<F>* grads;  // [rows of a chunk, D, grad_row]
  int64_t* before[2];  // [N] per direction: row of y that a row started from, or -1 - state for h_0
  int64_t* sequence;   // [N] of each row, whose masks weight gradients may need, or null
  F* panels;           // [members, panel_size]: right factors of a weight gradient; as slices
  F* turned;           // [members, kWeightMr, turned_row]: left factors of the microkernel, by tiles
  TaskArenas tasks;

  BackwardMemory(const LayerBackward& p, const Schedule& schedule, void* base)
      : columns(p),
        parts(kSplits ? p.bfloat16_parts : 1),
        segment(Panels<F>(factors_of<F>(columns.gates), 0, 1, kPairs).depth),
        ih(p.directions * segment, p.wants_x ? p.input : 0, 1, false, parts),
        hh(factors_of<F>(columns.gates), p.projected, 1, kPairs, parts),
        hr(factors_of<F>(p.projected), p.has_projection ? p.hidden : 0, 1, kPairs, parts),
        ldh(leading<C>(p.hidden)),
        ldp(leading<C>(p.projected)),
        ldg(leading<Sum<F>>(factors_of<F>(columns.width)) * kPerFactor<F>),
        grad_row(parts * ldg),
        chunk_steps(steps_of_chunk(p)),
        once(uses_weights_once(p)),
        once_size(once ? kPanelSize + p.rows * max(leading<C>(p.input), max(ldh, ldp)) : 0),
        panel_size(max(p.wants_weights ? kPanelSize : 0, once_size)),
        turned_part(kPairs && p.wants_weights ? leading<C>(kWeightKc / kPerFactor<F>) : 0),
        turned_row(parts * turned_part),
        wants_weights(p.wants_weights) {
    Arena arena{static_cast<char*>(base)};
    w_ih = arena.take<F>(once ? 0 : ih.size());
    for (int d = 0; d < p.directions; d++) {
      PerDirection& one = direction[d];
      one.w_hh = arena.take<F>(once ? 0 : hh.size());
      one.w_hr = arena.take<F>(once ? 0 : hr.size());
      const auto sums = [&](void* user, int64_t size) {
        return kSumsApart && wants_weights ? arena.take<C>(size) : static_cast<C*>(user);
      };
      one.grad_w_ih = sums(p.grad_weights[d].w_ih, columns.gates * p.input);
      one.grad_w_hh = sums(p.grad_weights[d].w_hh, columns.gates * p.projected);
      one.grad_w_hr = sums(p.grad_weights[d].w_hr, p.has_projection ? p.projected * p.hidden : 0);
      one.column_sums = arena.take<C>(ldg);
      before[d] = arena.take<int64_t>(wants_weights ? p.rows : 0);
    }
    sequence = wants_weights && (p.recurrent || p.candidate) ? arena.take<int64_t>(p.rows) : nullptr;
    grads = arena.take<number_t<F>>(min(p.rows, chunk_steps * p.sequences) * p.directions * grad_row);
    panels = arena.take<F>(schedule.members * panel_size);
    turned = arena.take<F>(schedule.members * kWeightMr * turned_row);
    tasks = TaskArenas(arena, [&](Arena& task) { take_task(p, schedule, task); });
  }

  // Where product_once keeps its sums, behind a slice.
  Vec<C>* sums_behind(C* slice) const { return reinterpret_cast<Vec<C>*>(slice + kPanelSize); }
  // Of rows of gradients.
  Parts grad_parts() const { return {kSplits ? parts : 1, ldg / kPerFactor<F>}; }
  // Stores a vector of a row of gradients.
  SEQKERNELS_INLINE void store_gradient(number_t<F>* to, Vec<C> x, int64_t lanes) const {
    if constexpr (kSplits)
      if (parts == 2) {
        store_result<F>(to, part_of(x, {0, 2}), lanes);
        return store_result<F>(to + ldg, part_of(x, {1, 2}), lanes);
      }
    store_result<F>(to, x, lanes);
  }
  int64_t bytes(const Schedule& schedule) const { return tasks.end(schedule.tasks); }

  PerTask task(const LayerBackward& p, const Schedule& schedule, int64_t i) const {
    Arena arena = tasks.of(i);
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerBackward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.max_sequences;
    PerTask task;
    task.grad_h = arena.take<C>(count * ldp);
    task.grad_c = arena.take<C>(p.c_0 ? count * ldh : 0);
    task.grad_unprojected = arena.take<C>(p.has_projection ? count * ldh : 0);
    task.slices = arena.take<C>(schedule.team_size * once_size);
    return task;
  }

  int64_t steps_of_chunk(const LayerBackward& p) const {
    // The two directions reach a step at different times, but its grad_x is one sum: all steps are one chunk.
    if (p.directions == 2) return p.steps;
    const int64_t rows = min(kGradientRows, kGradientBytes / (grad_row * static_cast<int64_t>(sizeof(number_t<F>))));
    return min(p.steps, max(1, rows / max(1, p.sequences)));
  }
};

// Steps [first, last) of one chunk, and its rows.
struct Chunk {
  int64_t first, last, row, rows;
};

}  // namespace seqkernels::SEQKERNELS_ISA
