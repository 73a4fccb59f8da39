// The forward sweep over time. A task runs its steps in chunks: the input projection of the chunk's rows, whose result
// stays in the caches, then step after step. State is carried in the type of computation.
#pragma once
#include "layout.h"
// cells.h needs sigmoid and tanh, which vec.h has declared.
#include "../cells.h"

namespace seqkernels::SEQKERNELS_ISA {

// Gates of a chunk, in bytes at most, and rows at least: enough to use each panel of W_ih often.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kChunkRows = 48;
// Rows of a layer from which on packing its weights pays.
constexpr int64_t kFewRows = 8;

// F: what products take of S; the type of computation, or pairs of bfloat16 as they are.
template <class S, class F>
struct ForwardMemory {
  using C = Compute<S>;
  struct PerDirection {
    F *w_ih, *w_hh, *w_hr;
    C* bias;    // [G*H]: what is added to the projection
    C* bias_n;  // [H]: the GRU's b_hn, which its reset gate scales
  };
  struct PerTask {
    C *h, *h_next;              // [count, ldp]
    F *factors, *factors_next;  // the same for products; the same memory where the type is the same
    C* c;                       // [count, ldh]
    F* unprojected;             // [count, ldh]: h before its projection
    C* gates;                   // [chunk, ldg]: the gates' share of the input
    int64_t* rows;              // [members of the team, chunk]: which rows of the layer they are
  };

  const Panels<F> ih, hh, hr;
  const bool packed;
  const int64_t ldh, ldp, ldi, ldg, chunk;
  PerDirection direction[2] = {};
  F* x;  // [N, ldi] where the user's x cannot be taken as it is, else null
  Arena tasks;
  int64_t task_bytes;

  ForwardMemory(const LayerForward& p, const Schedule& schedule, void* base)
      : ih(factors_of<F>(p.input), gates_of(p.cell) * p.hidden, 1),
        hh(factors_of<F>(p.projected), p.hidden, gates_of(p.cell)),
        hr(factors_of<F>(p.hidden), p.has_projection ? p.projected : 0, 1),
        packed(p.rows > kFewRows),
        ldh(leading<C>(p.hidden)),
        ldp(leading<C>(p.projected)),
        ldi(leading<C>(p.input)),
        ldg(leading<C>(ih.units)),
        chunk(chunk_rows(p, schedule)) {
    Arena arena{static_cast<char*>(base)};
    for (int d = 0; d < p.directions; d++) {
      if (packed) {
        direction[d].w_ih = arena.take<F>(ih.size());
        direction[d].w_hh = arena.take<F>(hh.size());
        direction[d].w_hr = arena.take<F>(hr.size());
      }
      direction[d].bias = arena.take<C>(ldg);
      direction[d].bias_n = arena.take<C>(ldh);
    }
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % sizeof(F) == 0 && p.input % kPerFactor<F> == 0;
    const bool as_it_is = sizeof(S) * kPerFactor<F> == sizeof(F) && aligned;
    x = as_it_is ? nullptr : arena.take<F>(p.rows * ldi);
    tasks = arena;
    Arena one{nullptr};
    take_task(p, schedule, one);
    task_bytes = one.used;
  }

  int64_t bytes(const Schedule& schedule) const { return tasks.used + schedule.tasks * task_bytes; }

  PerTask task(const LayerForward& p, const Schedule& schedule, int64_t i) const {
    Arena arena{tasks.base, tasks.used + i * task_bytes};
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerForward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.most_sequences;
    PerTask task;
    task.h = arena.take<C>(count * ldp);
    task.h_next = arena.take<C>(count * ldp);
    const bool same = std::is_same<C, F>::value;
    task.factors = same ? reinterpret_cast<F*>(task.h) : arena.take<F>(count * ldp);
    task.factors_next = same ? reinterpret_cast<F*>(task.h_next) : arena.take<F>(count * ldp);
    task.c = arena.take<C>(p.c_0 ? count * ldh : 0);
    task.unprojected = arena.take<F>(p.has_projection ? count * ldh : 0);
    task.gates = arena.take<C>(chunk * ldg);
    task.rows = arena.take<int64_t>(schedule.team_size * chunk);
    return task;
  }

  int64_t chunk_rows(const LayerForward& p, const Schedule& schedule) const {
    const int64_t fitting = kChunkBytes / (ldg * static_cast<int64_t>(sizeof(C)));
    const int64_t all = p.steps * schedule.most_sequences;
    return least(most(most(fitting, kChunkRows), schedule.most_sequences), all);
  }
};

template <Cell kCell, class S, class F>
class ForwardSweep {
  using C = Compute<S>;
  using Memory = ForwardMemory<S, F>;
  using V = Vec<C>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int G = gates_of(kCell), K = saved_blocks_of(kCell);
  static constexpr bool kPairs = !std::is_same<C, F>::value;

 public:
  ForwardSweep(const LayerForward& p, const Memory& memory, const typename Memory::PerTask& mine, const Task& task,
               const Share& share)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        share(share),
        weights(memory.direction[task.direction]),
        source(p.weights[task.direction]),
        units(Units::of<C>(share, p.hidden)),
        outputs(Units::of<C>(share, p.projected)),
        rows(mine.rows + share.begin * memory.chunk) {}

  void run() {
    load_states();
    for (int64_t i = 0; i < p.steps;) {
      int64_t count = 0, end = i;
      do {
        const int64_t t = step(end++), running = at.running(t);
        for (int64_t r = 0; r < running; r++) rows[count++] = at.row(t, r);
      } while (end < p.steps && count + at.running(step(end)) <= memory.chunk);
      project(count);
      for (int64_t first = 0; i < end; first += at.running(step(i++))) run_step(step(i), first);
    }
  }

 private:
  int64_t step(int64_t i) const { return at.task.direction ? p.steps - 1 - i : i; }

  void load_states() const {
    const int64_t H = p.hidden, P = p.projected, ran = at.running(0);
    const S* h_0 = static_cast<const S*>(p.h_0);
    const S* c_0 = static_cast<const S*>(p.c_0);
    for (int64_t r = 0; r < at.task.count; r++) {
      C* h = mine.h + r * memory.ldp;
      load_state(at.at_sequence(h_0, r, P), h, outputs);
      // Both buffers: a sequence that a reverse sweep has not reached keeps its state in either.
      load_state(at.at_sequence(h_0, r, P), mine.h_next + r * memory.ldp, outputs);
      for (int64_t unit = outputs.first; kPairs && unit < outputs.last; unit += kLane) {
        store_factors(mine.factors + r * memory.ldp, unit, P, load(h + unit));
        store_factors(mine.factors_next + r * memory.ldp, unit, P, load(h + unit));
      }
      if (kCell == Cell::lstm) load_state(at.at_sequence(c_0, r, H), mine.c + r * memory.ldh, units);
      if (r < ran) continue;
      store_state(h, at.at_sequence(static_cast<S*>(p.h_n), r, P), outputs);  // never runs
      if (kCell == Cell::lstm)
        store_state(mine.c + r * memory.ldh, at.at_sequence(static_cast<S*>(p.c_n), r, H), units);
    }
  }

  const F* input(int64_t i) const {
    if (memory.x) return memory.x + rows[i] * memory.ldi;
    return reinterpret_cast<const F*>(static_cast<const S*>(p.x) + rows[i] * p.input);
  }

  // gates = W_ih x + biases of the chunk's `count` rows: this share's columns.
  void project(int64_t count) const {
    const int64_t columns = memory.ih.units, first = share.first(memory.ih.vectors());
    const int64_t last = share.last(memory.ih.vectors());
    const auto row = [&](int64_t i) { return input(i); };
    const auto put = [&](int64_t i, int64_t column, int64_t, V x) {
      store(mine.gates + i * memory.ldg + column, x + load(weights.bias + column));
    };
    if (memory.packed) {
      product(memory.ih, weights.w_ih, first, last, count, {memory.ih.k}, row, put);
    } else {
      for (int64_t column = first * kLane; column < least(last * kLane, columns); column += kLane)
        for (int64_t i = 0; i < count; i++) {
          const S* w_ih = static_cast<const S*>(source.w_ih) + column * p.input;
          put(i, column, 0, dots(w_ih, columns - column, p.input, row(i)));
        }
    }
    share.wait();
  }

  void dots_of_gates(const S* w, int64_t unit, int64_t k, const F* a, V* out) const {
    for (int g = 0; g < G; g++) out[g] = dots(w + (g * p.hidden + unit) * k, p.hidden - unit, k, a);
  }

  // One step; the gates of its first row are row `first` of the chunk.
  void run_step(int64_t t, int64_t first) {
    const int64_t running = at.running(t);
    const int64_t later = at.task.direction ? t - 1 : t + 1;
    ahead = at.rows_to(t, later) * p.directions;
    row0 = at.row(t, 0);
    gates = mine.gates + first * memory.ldg;
    // Sequences from here on end with this step; those of a reverse sweep all end with its last.
    lasting = at.task.direction ? (later < 0 ? 0 : running) : at.running(later);
    const auto row = [&](int64_t r) { return mine.factors + r * memory.ldp; };
    if (!memory.packed) {
      for (int64_t unit = units.first; unit < units.last; unit += kLane)
        for (int64_t r = 0; r < running; r++) {
          V out[G];
          dots_of_gates(static_cast<const S*>(source.w_hh), unit, p.projected, row(r), out);
          finish(r, unit, out);
        }
    } else if constexpr (G == 1) {
      product(
          memory.hh, weights.w_hh, units.first / kLane, vectors_of<C>(units.last), running, {memory.hh.k}, row,
          [&](int64_t r, int64_t unit, int64_t, V x) { finish(r, unit, &x); }, t % 2);
    } else {
      for_panels(units.first / kLane, vectors_of<C>(units.last), t % 2, [&](int64_t j) {
        const F* panel = weights.w_hh + memory.hh.offset(j);
        const int64_t lanes = memory.hh.lanes_of_group(j);
        if (lanes == kLane)
          return for_rows<G>(running, {memory.hh.k}, row, panel, G * kLane,
                             [&](int64_t r, const V* out) { finish(r, j * kLane, out); });
        with_width(memory.hh.vectors_in(j), [&](auto width) {
          constexpr int N = least(decltype(width)::value, G);
          for_rows<N>(running, {memory.hh.k}, row, panel, N * kLane, [&](int64_t r, const V* out) {
            V recurrent[G];
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) recurrent[g] = load(reinterpret_cast<const C*>(out) + g * lanes);
            finish(r, j * kLane, recurrent);
          });
        });
      });
    }
    if (p.has_projection) {
      share.wait();
      project_outputs(running);
    }
    swap(mine.h, mine.h_next);
    swap(mine.factors, mine.factors_next);
    if (later >= 0 && later < p.steps) share.wait();
  }

  void project_outputs(int64_t running) const {
    const auto row = [&](int64_t r) { return mine.unprojected + r * memory.ldh; };
    const auto put = [&](int64_t r, int64_t unit, int64_t, V x) { put_h(r, unit, x); };
    if (memory.packed) {
      product(memory.hr, weights.w_hr, outputs.first / kLane, vectors_of<C>(outputs.last), running, {memory.hr.k}, row,
              put);
    } else {
      for (int64_t unit = outputs.first; unit < outputs.last; unit += kLane)
        for (int64_t r = 0; r < running; r++) {
          const S* w_hr = static_cast<const S*>(source.w_hr) + unit * p.hidden;
          put(r, unit, 0, dots(w_hr, p.projected - unit, p.hidden, row(r)));
        }
    }
  }

  // The gates of one vector of units of sequence r, given their share of W_hh h.
  SEQKERNELS_INLINE void finish(int64_t r, int64_t unit, const V* recurrent) const {
    V x[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) x[g] = load(gates + r * memory.ldg + g * p.hidden + unit);
    if constexpr (kCell == Cell::gru) {
      GruGates<V> now;
      const V h_n = recurrent[2] + load(weights.bias_n + unit);
      put_h(r, unit,
            gru_forward(x[0], x[1], x[2], recurrent[0], recurrent[1], h_n, load(mine.h + r * memory.ldp + unit), now));
      const V blocks[] = {now.r, now.z, now.n, now.hn};
      save(r, unit, blocks);
    } else if constexpr (kCell == Cell::lstm) {
      LstmGates<V> now;
      C* c = mine.c + r * memory.ldh + unit;
      V state = load(c);
      const V h =
          lstm_forward(x[0] + recurrent[0], x[1] + recurrent[1], x[2] + recurrent[2], x[3] + recurrent[3], state, now);
      store(c, state);
      if (r >= lasting)
        store(at.at_sequence(static_cast<S*>(p.c_n), r, p.hidden) + unit, state, least(p.hidden - unit, kLane));
      if (p.has_projection)
        store_factors(mine.unprojected + r * memory.ldh, unit, p.hidden, h);
      else
        put_h(r, unit, h);
      const V blocks[] = {now.i, now.f, now.g, now.o, state};
      save(r, unit, blocks);
    } else {
      const V sum = x[0] + recurrent[0];
      put_h(r, unit, kCell == Cell::rnn_tanh ? tanh(sum) : relu(sum));
    }
  }

  SEQKERNELS_INLINE void put_h(int64_t r, int64_t unit, V h) const {
    const int64_t P = p.projected, lanes = least(P - unit, kLane);
    S* y = at.at_row(static_cast<S*>(p.y), row0 + r * at.task.stride, P) + unit;
    prefetch_store(y + ahead * P);
    store(y, h, lanes);
    store(mine.h_next + r * memory.ldp + unit, h);
    if (kPairs) store_factors(mine.factors_next + r * memory.ldp, unit, P, h);
    if (r >= lasting) store(at.at_sequence(static_cast<S*>(p.h_n), r, P) + unit, h, lanes);
  }

  template <int kBlocks>
  SEQKERNELS_INLINE void save(int64_t r, int64_t unit, const V (&blocks)[kBlocks]) const {
    static_assert(kBlocks == K, "what backward expects");
    if (!p.saved) return;
    const int64_t H = p.hidden, lanes = least(H - unit, kLane);
    S* to = at.at_row(static_cast<S*>(p.saved), row0 + r * at.task.stride, K * H) + unit;
#pragma GCC unroll 8
    for (int block = 0; block < K; block++) {
      prefetch_store(to + block * H + ahead * K * H);
      store(to + block * H, blocks[block], lanes);
    }
  }

  const LayerForward& p;
  const Layout at;
  const Memory& memory;
  typename Memory::PerTask mine;
  const Share share;
  const typename Memory::PerDirection& weights;
  const WeightsOf<const void*>& source;
  const Units units, outputs;  // this share's, of H and of P
  int64_t* const rows;         // of the chunk
  // Of the step that runs.
  const C* gates;
  int64_t row0, ahead, lasting;
};

// Biases of direction d: what the projection adds, and the GRU's b_hn apart.
template <class S, class F>
void sum_biases(const LayerForward& p, int d, const ForwardMemory<S, F>& memory) {
  const S* b_ih = static_cast<const S*>(p.weights[d].b_ih);
  const S* b_hh = static_cast<const S*>(p.weights[d].b_hh);
  const int64_t columns = gates_of(p.cell) * p.hidden, apart = p.cell == Cell::gru ? 2 * p.hidden : columns;
  Compute<S>* sum = memory.direction[d].bias;
  load_state(b_ih, sum, {0, columns});
  load_state(b_hh ? b_hh + apart : b_hh, memory.direction[d].bias_n, {0, columns - apart});
  for (int64_t i = 0; b_hh && i < apart; i++) sum[i] += scalar(b_hh[i]);
}

template <class S, class F>
void prepare_forward(const LayerForward& p, const ForwardMemory<S, F>& memory, const Share& share) {
  const auto pack = [&](const Panels<F>& shape, const void* source, int64_t n, F* packed) {
    for (int64_t j = share.first(shape.count()); j < share.last(shape.count()); j++)
      pack_transposed(shape, j, static_cast<const S*>(source), n, packed);
  };
  for (int d = 0; d < p.directions; d++) {
    if (memory.packed) {
      pack(memory.ih, p.weights[d].w_ih, p.input, memory.direction[d].w_ih);
      pack(memory.hh, p.weights[d].w_hh, p.projected, memory.direction[d].w_hh);
      if (p.has_projection) pack(memory.hr, p.weights[d].w_hr, p.hidden, memory.direction[d].w_hr);
    }
    if (share.begin == 0) sum_biases(p, d, memory);
  }
  if (!memory.x) return;
  for (int64_t row = share.first(p.rows); row < share.last(p.rows); row++)
    for (int64_t i = 0; i < p.input; i += kLanes<Sum<F>>)
      store_factors(memory.x + row * memory.ldi, i, p.input,
                    load(static_cast<const S*>(p.x) + row * p.input + i, p.input - i));
}

template <Cell kCell, class S, class F>
void forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* base) {
  const ForwardMemory<S, F> memory(p, schedule, base);
  const Share all = share_of_all(schedule, begin, end);
  prepare_forward(p, memory, all);
  all.wait();
  run_tasks(schedule, begin, end, [&](int64_t i, const Share& share) {
    ForwardSweep<kCell, S, F>(p, memory, memory.task(p, schedule, i), schedule.task[i], share).run();
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
