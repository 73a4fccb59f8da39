// Where the rows and states of a task lie in a layer's tensors, and how they are read and written.
#pragma once
#include "gemm.h"

namespace seqkernels::SEQKERNELS_ISA {

// How many of a task's sequences run when `running` of the batch do.
inline int64_t running_of(const Task& task, int64_t running) {
  const int64_t count = running > task.first ? (running - task.first + task.stride - 1) / task.stride : 0;
  return min(count, task.count);
}

// Another core often wrote what the next step loads, or reads what it stores, and the rows of a step are no stream that
// the hardware would follow. So both are fetched early. An address beyond the array does no harm. They have to be
// inlined: GCC finds that a function which only prefetches has no effect, and drops the calls of it that it still has.
template <class T>
SEQKERNELS_INLINE void prefetch_load(const T* p) {
  __builtin_prefetch(p, 0);
}
template <class T>
SEQKERNELS_INLINE void prefetch_store(const T* p) {
  __builtin_prefetch(p, 1);
}

// One task's rows and states in the tensors of a layer.
struct Layout {
  const Layer& p;
  const Task& task;

  int64_t sequence(int64_t r) const { return task.first + r * task.stride; }
  int64_t row(int64_t t, int64_t r) const { return p.offsets[t] + sequence(r); }
  // x is [N, D, n]
  template <class T>
  T* at_row(T* x, int64_t row, int64_t n) const {
    return x + (row * p.directions + task.direction) * n;
  }
  // The same of sequence r in the step whose first row is row0.
  template <class T>
  T* of_row(void* x, int64_t row0, int64_t r, int64_t n) const {
    return at_row(static_cast<T*>(x), row0 + r * task.stride, n);
  }
  template <class T>
  const T* of_row(const void* x, int64_t row0, int64_t r, int64_t n) const {
    return at_row(static_cast<const T*>(x), row0 + r * task.stride, n);
  }
  // x is [D, C, n], or null
  template <class T>
  T* at_state(T* x, int64_t state, int64_t n) const {
    return x ? x + (task.direction * p.states + state) * n : x;
  }
  // Which state is that of sequence r at step t.
  int64_t state(int64_t t, int64_t r) const { return p.pieces ? p.pieces[row(t, r)] : sequence(r); }
  int64_t running(int64_t t) const { return t < 0 || t >= p.steps ? 0 : running_of(task, p.batch_sizes[t]); }
  // From a row of step t to that of the same sequence in step u; 0 if there is no such step.
  int64_t rows_to(int64_t t, int64_t u) const { return u < 0 || u >= p.steps ? 0 : p.offsets[u] - p.offsets[t]; }

  // The i-th step of a sweep.
  int64_t step(int64_t i) const { return task.direction ? p.steps - 1 - i : i; }

  // A chunk of the sweep: from step i on at least one step, and as many as have up to `max_rows` rows, whose numbers
  // become rows[].
  struct ChunkOfSteps {
    int64_t rows, end;
  };
  ChunkOfSteps list_rows(int64_t i, int64_t max_rows, int64_t* rows) const {
    ChunkOfSteps chunk{0, i};
    do {
      const int64_t t = step(chunk.end++), count = running(t);
      for (int64_t r = 0; r < count; r++) rows[chunk.rows++] = row(t, r);
    } while (chunk.end < p.steps && chunk.rows + running(step(chunk.end)) <= max_rows);
    return chunk;
  }

  // Between step t and step u, which runs next, or beyond the steps: calls end(r, state) for what ends with t, and
  // begin(r, state) for what begins with u.
  template <class End, class Begin>
  void change_states(int64_t t, int64_t u, const End& end, const Begin& begin) const {
    const int64_t ran = running(t), run = running(u), both = min(ran, run);
    for (int64_t r = p.pieces ? 0 : both; r < max(ran, run); r++) {
      if (r < both && state(t, r) == state(u, r)) continue;
      if (r < ran) end(r, state(t, r));
      if (r < run) begin(r, state(u, r));
    }
  }
};

// Units [first, last) of a state, whole vectors but for the end of the state.
struct Units {
  int64_t first, last;

  template <class C>
  static Units of(const WorkRange& work, int64_t n) {
    const int64_t vectors = vectors_of<C>(n);
    return {work.first(vectors) * kLanes<C>, min(work.last(vectors) * kLanes<C>, n)};
  }
};

template <class S>
inline void load_state(const S* from, acc_t<S>* to, Units units) {
  constexpr int V = kLanes<acc_t<S>>;
  for (int64_t i = units.first; i < units.last; i += V)
    store(to + i, from ? load(from + i, units.last - i) : Vec<acc_t<S>>{});
}

template <class S>
inline void store_state(const acc_t<S>* from, S* to, Units units) {
  constexpr int V = kLanes<acc_t<S>>;
  for (int64_t i = units.first; i < units.last; i += V) store(to + i, load(from + i), units.last - i);
}

}  // namespace seqkernels::SEQKERNELS_ISA
