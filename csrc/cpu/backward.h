// The backward sweep over time, then the gradients of input and weights as products over many rows at once. Both
// happen chunk by chunk of steps, so that what the sweep leaves is still in the caches when the products read it.
//
// The sweep leaves a row of gradients per row of the layer and direction:
//   RNN, LSTM  [gates (torch's order), with a projection that of the projected h]
//   GRU        [n for x, r, z, n for h]: the first three belong to W_ih (n r z), the last three to W_hh (r z n)
#pragma once
#include "layout.h"
// cells.h needs sigmoid and tanh, which vec.h has declared.
#include "../cells.h"

namespace seqkernels::SEQKERNELS_ISA {

// Rows of a chunk at most, bytes of its gradients at most (but one step at least).
constexpr int64_t kGradientRows = 512;
constexpr int64_t kGradientBytes = 4 << 20;

// How the columns of a gradient row belong to the weights.
struct Columns {
  int64_t gates;      // G*H
  int64_t recurrent;  // where those for W_hh begin
  int64_t projected;  // where those for W_hr begin
  int64_t width;

  explicit Columns(const Layer& p)
      : gates(gates_of(p.cell) * p.hidden),
        recurrent(p.cell == Cell::gru ? p.hidden : 0),
        projected(gates),
        width(gates + (p.cell == Cell::gru ? p.hidden
                       : p.has_projection  ? p.projected
                                           : 0)) {}

  // The row of W_ih that a column belongs to.
  int64_t gate_of_input(int64_t column) const {
    return recurrent == 0 ? column : column < recurrent ? column + 2 * recurrent : column - recurrent;
  }
};

template <class S>
struct BackwardMemory {
  using C = Compute<S>;
  static constexpr bool kWide = !std::is_same<S, C>::value;
  struct PerDirection {
    C *w_hh, *w_hr;
    C *grad_w_ih, *grad_w_hh, *grad_w_hr;  // sums in the making; the user's own memory where it is wide enough
    C* column_sums;                        // [ldg]
  };
  struct PerTask {
    C* grad_h;            // [count, ldp]: what later steps say of each sequence's h
    C* grad_c;            // [count, ldh]
    C* grad_unprojected;  // [count, ldh]
  };

  const Columns columns;
  const Panels<C> ih, hh, hr;
  const int64_t ldh, ldp, ldg;
  const int64_t chunk_steps;
  bool wants_weights;
  PerDirection direction[2] = {};
  C* w_ih;             // of all directions, one below the other
  C* grads;            // [rows of a chunk, D, ldg]
  int64_t* before[2];  // [N] per direction: row of y that a row started from, or -1 - sequence for h_0
  C* panels;           // [members, kDepth, 4 vectors]: right factors of a weight gradient
  Arena tasks;
  int64_t task_bytes;

  BackwardMemory(const LayerBackward& p, const Schedule& schedule, void* base)
      : columns(p),
        ih(p.directions * columns.gates, p.grad_x ? p.input : 0, 1),
        hh(columns.gates, p.projected, 1),
        hr(p.projected, p.has_projection ? p.hidden : 0, 1),
        ldh(leading<C>(p.hidden)),
        ldp(leading<C>(p.projected)),
        ldg(leading<C>(columns.width)),
        chunk_steps(steps_of_chunk(p)),
        wants_weights(p.grad_weights[0].w_ih) {
    Arena arena{static_cast<char*>(base)};
    w_ih = arena.take<C>(ih.size());
    for (int d = 0; d < p.directions; d++) {
      PerDirection& one = direction[d];
      one.w_hh = arena.take<C>(hh.size());
      one.w_hr = arena.take<C>(hr.size());
      const auto sums = [&](void* user, int64_t size) {
        return kWide && wants_weights ? arena.take<C>(size) : static_cast<C*>(user);
      };
      one.grad_w_ih = sums(p.grad_weights[d].w_ih, columns.gates * p.input);
      one.grad_w_hh = sums(p.grad_weights[d].w_hh, columns.gates * p.projected);
      one.grad_w_hr = sums(p.grad_weights[d].w_hr, p.has_projection ? p.projected * p.hidden : 0);
      one.column_sums = arena.take<C>(ldg);
      before[d] = arena.take<int64_t>(wants_weights ? p.rows : 0);
    }
    grads = arena.take<C>(least(p.rows, chunk_steps * p.sequences) * p.directions * ldg);
    panels = arena.take<C>(wants_weights ? schedule.members * panel_size() : 0);
    tasks = arena;
    Arena one{nullptr};
    take_task(p, schedule, one);
    task_bytes = one.used;
  }

  static constexpr int64_t panel_size() { return kDepth * 4 * kLanes<C>; }
  int64_t bytes(const Schedule& schedule) const { return tasks.used + schedule.tasks * task_bytes; }

  PerTask task(const LayerBackward& p, const Schedule& schedule, int64_t i) const {
    Arena arena{tasks.base, tasks.used + i * task_bytes};
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerBackward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.most_sequences;
    PerTask task;
    task.grad_h = arena.take<C>(count * ldp);
    task.grad_c = arena.take<C>(p.c_0 ? count * ldh : 0);
    task.grad_unprojected = arena.take<C>(p.has_projection ? count * ldh : 0);
    return task;
  }

  int64_t steps_of_chunk(const LayerBackward& p) const {
    // The two directions reach a step at different times, but its grad_x is one sum: all steps are one chunk.
    if (p.directions == 2) return p.steps;
    const int64_t rows = least(kGradientRows, kGradientBytes / (ldg * static_cast<int64_t>(sizeof(C))));
    return least(p.steps, most(1, rows / most(1, p.sequences)));
  }
};

// Steps [first, last) of one chunk, and its rows.
struct Chunk {
  int64_t first, last, row, rows;
};

template <Cell kCell, class S>
class BackwardSweep {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int G = gates_of(kCell), K = saved_blocks_of(kCell);

 public:
  BackwardSweep(const LayerBackward& p, const BackwardMemory<S>& memory, const typename BackwardMemory<S>::PerTask& mine,
                const Task& task, const Share& share)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        share(share),
        weights(memory.direction[task.direction]),
        units(Units::of<C>(share, p.hidden)),
        outputs(Units::of<C>(share, p.projected)) {}

  void load_states() const {
    const S* h_n = static_cast<const S*>(p.grad_h_n);
    const S* c_n = static_cast<const S*>(p.grad_c_n);
    for (int64_t r = 0; r < at.task.count; r++) {
      load_state(h_n ? at.at_sequence(h_n, r, p.projected) : h_n, mine.grad_h + r * memory.ldp, outputs);
      if (kCell == Cell::lstm)
        load_state(c_n ? at.at_sequence(c_n, r, p.hidden) : c_n, mine.grad_c + r * memory.ldh, units);
    }
  }

  void store_states() const {
    S* h_0 = static_cast<S*>(p.grad_h_0);
    S* c_0 = static_cast<S*>(p.grad_c_0);
    for (int64_t r = 0; r < at.task.count; r++) {
      store_state(mine.grad_h + r * memory.ldp, at.at_sequence(h_0, r, p.projected), outputs);
      if (kCell == Cell::lstm) store_state(mine.grad_c + r * memory.ldh, at.at_sequence(c_0, r, p.hidden), units);
    }
  }

  void run(const Chunk& chunk) {
    for (int64_t i = chunk.first; i < chunk.last; i++)
      run_step(at.task.direction ? i : chunk.first + chunk.last - 1 - i, chunk.row);
  }

 private:
  C* grad_row(int64_t r) const { return grads + r * at.task.stride * p.directions * memory.ldg; }

  void run_step(int64_t t, int64_t chunk_row) {
    before = at.task.direction ? t + 1 : t - 1;  // the step this one started from
    const int64_t running = at.running(t);
    had_before = at.running(before);
    ahead = at.rows_to(t, before) * p.directions;
    row0 = at.row(t, 0);
    row0_before = had_before ? at.row(before, 0) : 0;
    grads = at.at_row(memory.grads, row0 - chunk_row, memory.ldg);

    if (p.grad_y) add_grad_y(running);
    if (p.has_projection) undo_projection(running);
    for (int64_t r = 0; r < running; r++)
      for (int64_t unit = units.first; unit < units.last; unit += kLane) gates(r, unit);
    share.wait();
    const auto row = [&](int64_t r) { return grad_row(r) + memory.columns.recurrent; };
    product(
        memory.hh, weights.w_hh, outputs.first / kLane, vectors_of<C>(outputs.last), running, {memory.columns.gates},
        row,
        [&](int64_t r, int64_t unit, int64_t, V x) {
          C* h = mine.grad_h + r * memory.ldp + unit;
          // The GRU's h also goes past the gates; that part is there already.
          store(h, kCell == Cell::gru ? load(h) + x : x);
        },
        t % 2);
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
    const auto row = [&](int64_t r) { return grad_row(r) + memory.columns.projected; };
    for (int64_t r = 0; r < running; r++) store_state(mine.grad_h + r * memory.ldp, row(r), outputs);
    share.wait();
    product(memory.hr, weights.w_hr, units.first / kLane, vectors_of<C>(units.last), running, {p.projected}, row,
            [&](int64_t r, int64_t unit, int64_t, V x) { store(mine.grad_unprojected + r * memory.ldh + unit, x); });
  }

  // Gradients of the gates of one vector of units of sequence r.
  void gates(int64_t r, int64_t unit) const {
    const int64_t H = p.hidden, P = p.projected, lanes = least(H - unit, kLane), row = row0 + r * at.task.stride;
    const bool first = r >= had_before;  // this step started from the initial state
    const int64_t row_before = row0_before + r * at.task.stride;
    const S* y = static_cast<const S*>(p.y);
    const S* saved = static_cast<const S*>(p.saved);
    [[maybe_unused]] const S* kept = at.at_row(saved, row, K * H) + unit;
    [[maybe_unused]] const auto saved_block = [&](int block) {
      prefetch_load(kept + block * H + ahead * K * H);
      return load(kept + block * H, lanes);
    };
    C* grad_gates = grad_row(r) + unit;
    const auto put = [&](int block, V x) { store(grad_gates + block * H, x, lanes); };
    C* grad_h = mine.grad_h + r * memory.ldp + unit;
    if constexpr (kCell == Cell::gru) {
      const S* h_prev = first ? at.at_sequence(static_cast<const S*>(p.h_0), r, P) : at.at_row(y, row_before, P);
      const GruGates<V> now{saved_block(0), saved_block(1), saved_block(2), saved_block(3)};
      GruGates<V> grad;
      store(grad_h, gru_backward(load(grad_h), load(h_prev + unit, lanes), now, grad));
      put(0, grad.n);
      put(1, grad.r);
      put(2, grad.z);
      put(3, grad.hn);
    } else if constexpr (kCell == Cell::lstm) {
      const LstmGates<V> now{saved_block(0), saved_block(1), saved_block(2), saved_block(3)};
      const S* c_prev =
          first ? at.at_sequence(static_cast<const S*>(p.c_0), r, H) : at.at_row(saved, row_before, K * H) + 4 * H;
      LstmGates<V> grad;
      C* grad_c = mine.grad_c + r * memory.ldh + unit;
      V state = load(grad_c);
      const V grad_o = p.has_projection ? load(mine.grad_unprojected + r * memory.ldh + unit) : load(grad_h);
      lstm_backward(grad_o, state, saved_block(4), load(c_prev + unit, lanes), now, grad);
      store(grad_c, state);
      put(0, grad.i);
      put(1, grad.f);
      put(2, grad.g);
      put(3, grad.o);
    } else {
      const V h = load(at.at_row(y, row, P) + unit, lanes);
      put(0, kCell == Cell::rnn_tanh ? tanh_backward(load(grad_h), h) : relu_backward(load(grad_h), h));
    }
  }

  const LayerBackward& p;
  const Layout at;
  const BackwardMemory<S>& memory;
  const typename BackwardMemory<S>::PerTask mine;
  const Share share;
  const typename BackwardMemory<S>::PerDirection& weights;
  const Units units, outputs;  // this share's, of H and of P
  // Of the step that runs.
  int64_t before, had_before, ahead, row0, row0_before;
  C* grads;
};

// grad_x = gradients of the gates times W_ih, of this share's rows of a chunk.
template <class S>
void input_gradient(const LayerBackward& p, const BackwardMemory<S>& memory, const Share& share, const Chunk& chunk) {
  using C = Compute<S>;
  const int64_t first = share.first(chunk.rows), count = share.last(chunk.rows) - first;
  const auto row = [&](int64_t r) { return memory.grads + (first + r) * p.directions * memory.ldg; };
  S* grad_x = static_cast<S*>(p.grad_x) + (chunk.row + first) * p.input;
  product(memory.ih, memory.w_ih, 0, memory.ih.vectors(), count, {memory.columns.gates, p.directions, memory.ldg}, row,
          [&](int64_t r, int64_t unit, int64_t lanes, Vec<C> x) { store(grad_x + r * p.input + unit, x, lanes); });
}

// out[column][unit] (+)= sum over a chunk's rows of grads[row][column] * right(row)[unit], for this share's columns.
// pack(row, unit, lanes) is a vector of the right factor; out_row(column) says where a column's sums go.
template <class S, class Pack, class OutRow>
void add_products(const BackwardMemory<S>& memory, const Share& share, const Chunk& chunk, bool add,
                  const Compute<S>* grads, int64_t stride, int64_t columns, int64_t width, const Pack& pack,
                  const OutRow& out_row) {
  using C = Compute<S>;
  constexpr int V = kLanes<C>;
  constexpr int kTile = kRows<4>;  // columns of a tile
  const int64_t tiles = (columns + kTile - 1) / kTile, first = share.first(tiles), last = share.last(tiles);
  if (first == last) return;
  C* panel = memory.panels + share.begin * memory.panel_size();
  for (int64_t row0 = 0; row0 < chunk.rows; row0 += kDepth) {
    const int64_t depth = least(kDepth, chunk.rows - row0);
    for (int64_t unit0 = 0; unit0 < width; unit0 += 4 * V) {
      const int vectors = static_cast<int>(least(4, vectors_of<C>(width - unit0)));
      for (int64_t k = 0; k < depth; k++)
        for (int v = 0; v < vectors; v++) {
          const int64_t unit = unit0 + v * V;
          store(panel + (k * vectors + v) * V, pack(chunk.row + row0 + k, unit, least(width - unit, V)));
        }
      const auto tiles_of = [&](auto n) {
        constexpr int N = decltype(n)::value;
        for (int64_t tile = first; tile < last; tile++) {
          const int64_t column = tile * kTile;
          const int count = static_cast<int>(least(kTile, columns - column));
          const C* a[kTile];
          for (int r = 0; r < kTile; r++) a[r] = grads + row0 * stride + column + (r < count ? r : 0);
          Vec<C> out[kTile * N];
          multiply<kTile, N>(depth, a, stride, panel, N * V, false, out);
          for (int r = 0; r < count; r++)
            for (int v = 0; v < N; v++) {
              const int64_t lanes = least(width - unit0 - v * V, V);
              C* to = out_row(column + r) + unit0 + v * V;
              store(to, add || row0 ? load(to, lanes) + out[r * N + v] : out[r * N + v], lanes);
            }
        }
      };
      switch (vectors) {
        case 1: tiles_of(std::integral_constant<int, 1>{}); break;
        case 2: tiles_of(std::integral_constant<int, 2>{}); break;
        case 3: tiles_of(std::integral_constant<int, 3>{}); break;
        default: tiles_of(std::integral_constant<int, 4>{});
      }
    }
  }
}

// Adds a chunk's part of all gradients of direction d's weights.
template <class S>
void weight_gradients(const LayerBackward& p, const BackwardMemory<S>& memory, const Share& share, const Chunk& chunk, int d,
                      bool add) {
  using C = Compute<S>;
  constexpr int V = kLanes<C>;
  const auto& sums = memory.direction[d];
  const Columns& columns = memory.columns;
  const int64_t I = p.input, H = p.hidden, P = p.projected, D = p.directions, stride = D * memory.ldg;
  const C* grads = memory.grads + d * memory.ldg;
  const S* x = static_cast<const S*>(p.x);
  const S* y = static_cast<const S*>(p.y) + d * P;
  const S* h_0 = static_cast<const S*>(p.h_0) + d * p.sequences * P;

  add_products(
      memory, share, chunk, add, grads, stride, columns.gates, I,
      [&](int64_t row, int64_t unit, int64_t lanes) { return load(x + row * I + unit, lanes); },
      [&](int64_t column) { return sums.grad_w_ih + columns.gate_of_input(column) * I; });
  add_products(
      memory, share, chunk, add, grads + columns.recurrent, stride, columns.gates, P,
      [&](int64_t row, int64_t unit, int64_t lanes) {
        const int64_t before = memory.before[d][row];
        return load((before < 0 ? h_0 + (-1 - before) * P : y + before * D * P) + unit, lanes);
      },
      [&](int64_t column) { return sums.grad_w_hh + column * P; });
  if (p.has_projection) {
    const S* saved = static_cast<const S*>(p.saved) + d * 5 * H;
    add_products(
        memory, share, chunk, add, grads + columns.projected, stride, P, H,
        [&](int64_t row, int64_t unit, int64_t lanes) {
          const S* from = saved + row * D * 5 * H + unit;
          return load(from + 3 * H, lanes) * tanh(load(from + 4 * H, lanes));
        },
        [&](int64_t column) { return sums.grad_w_hr + column * H; });
  }
  // Biases: sums over the rows, in chains as the products have them.
  const int64_t vectors = vectors_of<C>(columns.width);
  for (int64_t u = share.first(vectors); u < share.last(vectors); u++) {
    const int64_t lanes = least(columns.width - u * V, V);
    Vec<C> total = add ? load(sums.column_sums + u * V) : Vec<C>{};
    for (int64_t row0 = 0; row0 < chunk.rows; row0 += kChain) {
      Vec<C> sum = {};
      for (int64_t row = row0; row < least(chunk.rows, row0 + kChain); row++)
        sum += load(grads + row * stride + u * V, lanes);
      total += sum;
    }
    store(sums.column_sums + u * V, total);
  }
}

// What all members prepare together.
template <class S>
void prepare_backward(const LayerBackward& p, const BackwardMemory<S>& memory, const Share& share) {
  using C = Compute<S>;
  const int64_t G = gates_of(p.cell), H = p.hidden;
  const auto pack = [&](const Panels<C>& shape, const void* source, C* packed) {
    for (int64_t j = share.first(shape.count()); j < share.last(shape.count()); j++)
      pack_rows(shape, j, static_cast<const S*>(source), 0, shape.k, 0, packed);
  };
  for (int d = 0; d < p.directions; d++) {
    pack(memory.hh, p.weights[d].w_hh, memory.direction[d].w_hh);
    if (p.has_projection) pack(memory.hr, p.weights[d].w_hr, memory.direction[d].w_hr);
    if (p.grad_x)
      for (int64_t j = share.first(memory.ih.count()); j < share.last(memory.ih.count()); j++)
        for (int64_t g = 0; g < G; g++) {
          const int64_t source = memory.columns.gate_of_input(g * H);
          pack_rows(memory.ih, j, static_cast<const S*>(p.weights[d].w_ih), source, H, (d * G + g) * H, memory.w_ih);
        }
    if (!memory.wants_weights) continue;
    for (int64_t t = share.first(p.steps); t < share.last(p.steps); t++) {
      const int64_t before = d ? t + 1 : t - 1;
      const int64_t had_before = before < 0 || before >= p.steps ? 0 : p.batch_sizes[before];
      for (int64_t b = 0; b < p.batch_sizes[t]; b++)
        memory.before[d][p.offsets[t] + b] = b < had_before ? p.offsets[before] + b : -1 - b;
    }
  }
}

// Sums in the making become the user's gradients.
template <class S>
void finish_weight_gradients(const LayerBackward& p, const BackwardMemory<S>& memory, const Share& share) {
  const Columns& columns = memory.columns;
  for (int d = 0; d < p.directions; d++) {
    const auto& sums = memory.direction[d];
    const WeightsOf<void*>& user = p.grad_weights[d];
    const auto narrow = [&](const Compute<S>* from, void* to, int64_t size) {
      if (memory.kWide && to) store_state(from, static_cast<S*>(to), Units::of<Compute<S>>(share, size));
    };
    narrow(sums.grad_w_ih, user.w_ih, columns.gates * p.input);
    narrow(sums.grad_w_hh, user.w_hh, columns.gates * p.projected);
    narrow(sums.grad_w_hr, user.w_hr, p.projected * p.hidden);
    if (share.begin != 0 || !user.b_ih) continue;
    S* b_ih = static_cast<S*>(user.b_ih);
    for (int64_t column = 0; column < columns.gates; column += p.hidden)
      store_state(sums.column_sums + column, b_ih + columns.gate_of_input(column), {0, p.hidden});
    store_state(sums.column_sums + columns.recurrent, static_cast<S*>(user.b_hh), {0, columns.gates});
  }
}

template <Cell kCell, class S>
void backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* base) {
  const BackwardMemory<S> memory(p, schedule, base);
  const Share all = share_of_all(schedule, begin, end);
  const auto sweep = [&](const auto& run) {
    run_tasks(schedule, begin, end, [&](int64_t i, const Share& share) {
      run(BackwardSweep<kCell, S>(p, memory, memory.task(p, schedule, i), schedule.task[i], share));
    });
  };
  prepare_backward(p, memory, all);
  sweep([](auto task) { task.load_states(); });
  all.wait();
  for (int64_t end_step = p.steps; end_step > 0; end_step -= memory.chunk_steps) {
    const int64_t first = most(0, end_step - memory.chunk_steps), last = end_step;
    const Chunk chunk{first, last, p.offsets[first], p.offsets[last - 1] + p.batch_sizes[last - 1] - p.offsets[first]};
    sweep([&](auto task) { task.run(chunk); });
    all.wait();
    if (p.grad_x) input_gradient(p, memory, all, chunk);
    if (memory.wants_weights)
      for (int d = 0; d < p.directions; d++) weight_gradients(p, memory, all, chunk, d, last < p.steps);
    all.wait();
  }
  sweep([](auto task) { task.store_states(); });
  if (memory.wants_weights) finish_weight_gradients(p, memory, all);
}

}  // namespace seqkernels::SEQKERNELS_ISA
