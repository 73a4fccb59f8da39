// The sweeps of the recurrence over time, forward and backward. Compiled once per instruction set with its own value of
// SEQKERNELS_ISA; everything lies in that namespace, and no std:: function is called, so that the linker can never take
// code of one instruction set for another.
//
// A task owns some sequences of one direction and runs all their steps without meeting another task. State carried from
// step to step stays in its scratch, in the type of computation.
#include "kernels.h"

#include "gemm.h"
// cells.h needs sigmoid and tanh, which vec.h has declared.
#include "../cells.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of `x` are padded to whole vectors, so that carried state is loaded and stored without masks.
template <class C>
inline int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// How many of a task's sequences run when `running` of the batch do.
inline int64_t running_of(const Task& task, int64_t running) {
  const int64_t count = running > task.first ? (running - task.first + task.stride - 1) / task.stride : 0;
  return least(count, task.count);
}

template <class C>
inline void copy_row(C* to, const C* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// Fetch early what the next step loads, or stores to: the core that wrote it last, or reads it next, is often another,
// and the rows of a step are no stream that the hardware would follow. An address beyond the array does no harm.
template <class T>
inline void prefetch_load(const T* p) {
  __builtin_prefetch(p, 0);
}
template <class T>
inline void prefetch_store(const T* p) {
  __builtin_prefetch(p, 1);
}

// Where one direction's rows and states lie.
template <class S>
struct Layout {
  const Problem& p;
  const Task& task;

  int64_t sequence(int64_t r) const { return task.first + r * task.stride; }
  int64_t row(int64_t t, int64_t r) const { return p.offsets[t] + sequence(r); }
  // x is [N, D, blocks * width] or [N, D * width]; n is blocks * width
  template <class T>
  T* at_row(T* x, int64_t row, int64_t n) const {
    return x + (row * p.directions + task.direction) * n;
  }
  // x is [D, B, n]
  template <class T>
  T* at_sequence(T* x, int64_t r, int64_t n) const {
    return x + (task.direction * p.sequences + sequence(r)) * n;
  }
  int64_t running(int64_t t) const { return t < 0 || t >= p.steps ? 0 : running_of(task, p.batch_sizes[t]); }
  // From a row of step t to that of the same sequence in step u; 0 if there is no such step.
  int64_t rows_to(int64_t t, int64_t u) const { return u < 0 || u >= p.steps ? 0 : p.offsets[u] - p.offsets[t]; }
};

template <class S>
inline void load_state(const S* from, Compute<S>* to, int64_t n) {
  constexpr int V = kLanes<Compute<S>>;
  for (int64_t i = 0; i < n; i += V) store(to + i, from ? load(from + i, n - i) : Vec<Compute<S>>{});
}

template <class S>
inline void store_state(const Compute<S>* from, S* to, int64_t n) {
  constexpr int V = kLanes<Compute<S>>;
  for (int64_t i = 0; i < n; i += V) store(to + i, load(from + i), n - i);
}

// ---- forward

template <class C>
struct ForwardShapes {
  Packed recurrent, projection;

  explicit ForwardShapes(const Problem& p)
      : recurrent(packed_shape<C>(p.projected, p.hidden, gates_of(p.cell))),
        projection(packed_shape<C>(p.hidden, p.has_projection ? p.projected : 0, 1)) {}
};

template <class S>
int64_t forward_packed_bytes(const Problem& p) {
  using C = Compute<S>;
  const ForwardShapes<C> shapes(p);
  return (packed_size<C>(shapes.recurrent) + packed_size<C>(shapes.projection)) * sizeof(C);
}

template <class S>
int64_t forward_scratch_bytes(const Problem& p, int64_t count) {
  using C = Compute<S>;
  const int64_t c = p.c_0 ? padded<C>(p.hidden) : 0, unprojected = p.has_projection ? padded<C>(p.hidden) : 0;
  return count * (2 * padded<C>(p.projected) + c + unprojected) * sizeof(C);
}

template <class S>
void forward_pack(const Problem& p, int d, void* packed) {
  using C = Compute<S>;
  const ForwardShapes<C> shapes(p);
  const int64_t H = p.hidden, P = p.projected, G = gates_of(p.cell);
  const S* w_hh = static_cast<const S*>(p.w_hh) + d * G * H * P;
  for (int64_t j = 0; j < panels<C>(shapes.recurrent); j++)
    pack_panel(shapes.recurrent, j, w_hh, H * P, P, 1, static_cast<C*>(packed));
  if (!p.has_projection) return;
  C* packed_projection = static_cast<C*>(packed) + packed_size<C>(shapes.recurrent);
  for (int64_t j = 0; j < panels<C>(shapes.projection); j++)
    pack_panel(shapes.projection, j, static_cast<const S*>(p.w_hr) + d * P * H, 0, H, 1, packed_projection);
}

// One sequence's row of one step: loads its share of gates_x, stores y and saved, and fetches the next step's row.
template <class S, int G, int K>
struct StepRow {
  const S* gates_x;  // [G*H]
  S* y;              // [P]
  S* saved;          // [K*H] or null
  int64_t hidden, projected;
  int64_t ahead;  // from this row to the next step's, in rows of one direction

  Vec<Compute<S>> gate(int g, int64_t unit, int64_t lanes) const {
    const S* from = gates_x + g * hidden + unit;
    prefetch_load(from + ahead * G * hidden);
    return load(from, lanes);
  }
  void save(int block, int64_t unit, int64_t lanes, Vec<Compute<S>> x) const {
    if (!saved) return;
    S* to = saved + block * hidden + unit;
    prefetch_store(to + ahead * K * hidden);
    store(to, x, lanes);
  }
  void put(int64_t unit, int64_t lanes, Vec<Compute<S>> h) const {
    prefetch_store(y + unit + ahead * projected);
    store(y + unit, h, lanes);
  }
};

template <Cell kCell, class S>
void forward(const Forward& p, const Task& task, const void* packed, void* scratch) {
  using C = Compute<S>;
  using V = Vec<C>;
  const ForwardShapes<C> shapes(p);
  const Layout<S> at{p, task};
  const int64_t H = p.hidden, P = p.projected, ldh = padded<C>(P), ldc = padded<C>(H);
  constexpr int G = kCell == Cell::gru ? 3 : kCell == Cell::lstm ? 4 : 1;
  constexpr int K = kCell == Cell::gru ? 4 : kCell == Cell::lstm ? 5 : 0;
  const S* gates_x = static_cast<const S*>(p.gates_x);
  const S* b_hh = p.b_hh ? static_cast<const S*>(p.b_hh) + task.direction * G * H : nullptr;
  S* y = static_cast<S*>(p.y);
  S* saved = static_cast<S*>(p.saved);
  S* h_n = static_cast<S*>(p.h_n);
  const C* packed_hh = static_cast<const C*>(packed);
  const C* packed_hr = packed_hh + packed_size<C>(shapes.recurrent);

  // The next h must not overwrite the one all gates still read, so h has two buffers.
  C* h = static_cast<C*>(scratch);
  C* h_next = h + task.count * ldh;
  C* c = h_next + task.count * ldh;
  C* unprojected = c + (p.c_0 ? task.count * ldc : 0);
  for (int64_t r = 0; r < task.count; r++) {
    // Both buffers: a sequence that ended, or that a reverse sweep has not reached, keeps its state in either.
    load_state(at.at_sequence(static_cast<const S*>(p.h_0), r, P), h + r * ldh, P);
    copy_row(h_next + r * ldh, h + r * ldh, ldh);
    if (kCell == Cell::lstm) load_state(at.at_sequence(static_cast<const S*>(p.c_0), r, H), c + r * ldc, H);
  }

  for (int64_t i = 0; i < p.steps; i++) {
    const int64_t t = task.direction ? p.steps - 1 - i : i;
    const int64_t running = at.running(t);
    const int64_t ahead = at.rows_to(t, task.direction ? t - 1 : t + 1) * p.directions;
    const auto row_of = [&](int64_t r) {
      const int64_t row = at.row(t, r);
      return StepRow<S, G, K>{at.at_row(gates_x, row, G * H),
                              at.at_row(y, row, P),
                              saved ? at.at_row(saved, row, K * H) : nullptr,
                              H,
                              P,
                              ahead};
    };

    if constexpr (G == 1) {
      product(shapes.recurrent, running, h, ldh, packed_hh, [&](int64_t r, int64_t unit, int64_t lanes, V x) {
        const auto row = row_of(r);
        x += row.gate(0, unit, lanes);
        x = kCell == Cell::rnn_tanh ? tanh(x) : relu(x);
        store(h_next + r * ldh + unit, x);
        row.put(unit, lanes, x);
      });
    } else {
      for (int64_t unit = 0; unit < H; unit += kLanes<C>) {
        const int64_t lanes = least(H - unit, kLanes<C>);
        const C* panel = packed_hh + panel_offset<C>(shapes.recurrent, unit / kLanes<C>);
        V bias[G] = {};
        if (b_hh)
          for (int g = 0; g < G; g++) bias[g] = load(b_hh + g * H + unit, lanes);
        for_rows<G>(running, P, h, ldh, panel, [&](int64_t r, const V* out) {
          const auto row = row_of(r);
          V x[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) x[g] = row.gate(g, unit, lanes);
          if constexpr (kCell == Cell::gru) {
            GruGates<V> gates;
            const V next = gru_forward(x[0], x[1], x[2], out[0] + bias[0], out[1] + bias[1], out[2] + bias[2],
                                       load(h + r * ldh + unit), gates);
            store(h_next + r * ldh + unit, next);
            row.put(unit, lanes, next);
            row.save(0, unit, lanes, gates.r);
            row.save(1, unit, lanes, gates.z);
            row.save(2, unit, lanes, gates.n);
            row.save(3, unit, lanes, gates.hn);
          } else {
            LstmGates<V> gates;
            V state = load(c + r * ldc + unit);
            const V next = lstm_forward(x[0] + out[0], x[1] + out[1], x[2] + out[2], x[3] + out[3], state, gates);
            store(c + r * ldc + unit, state);
            if (p.has_projection) {
              store(unprojected + r * ldc + unit, next);
            } else {
              store(h_next + r * ldh + unit, next);
              row.put(unit, lanes, next);
            }
            row.save(0, unit, lanes, gates.i);
            row.save(1, unit, lanes, gates.f);
            row.save(2, unit, lanes, gates.g);
            row.save(3, unit, lanes, gates.o);
            row.save(4, unit, lanes, state);
          }
        });
      }
      if (p.has_projection)
        product(shapes.projection, running, unprojected, ldc, packed_hr,
                [&](int64_t r, int64_t unit, int64_t lanes, V x) {
                  store(h_next + r * ldh + unit, x);
                  row_of(r).put(unit, lanes, x);
                });
    }

    C* const before = h;
    h = h_next;
    h_next = before;
    // Sequences that end here leave their final state; in a reverse sweep all end with the last step.
    if (!task.direction)
      for (int64_t r = at.running(t + 1); r < running; r++) store_state(h + r * ldh, at.at_sequence(h_n, r, P), P);
  }

  const int64_t ran = at.running(0);
  for (int64_t r = 0; r < task.count; r++) {
    if (task.direction || r >= ran) store_state(h + r * ldh, at.at_sequence(h_n, r, P), P);
    if (kCell == Cell::lstm) store_state(c + r * ldc, at.at_sequence(static_cast<S*>(p.c_n), r, H), H);
  }
}

// ---- backward

template <class C>
struct BackwardShapes {
  Packed recurrent, projection;

  explicit BackwardShapes(const Problem& p)
      : recurrent(packed_shape<C>(gates_of(p.cell) * p.hidden, p.projected, 1)),
        projection(packed_shape<C>(p.projected, p.has_projection ? p.hidden : 0, 1)) {}
};

template <class S>
int64_t backward_packed_bytes(const Problem& p) {
  using C = Compute<S>;
  const BackwardShapes<C> shapes(p);
  return (packed_size<C>(shapes.recurrent) + packed_size<C>(shapes.projection)) * sizeof(C);
}

template <class S>
int64_t backward_scratch_bytes(const Problem& p, int64_t count) {
  using C = Compute<S>;
  const int64_t c = p.c_0 ? padded<C>(p.hidden) : 0, unprojected = p.has_projection ? padded<C>(p.hidden) : 0;
  return count * (padded<C>(p.projected) + padded<C>(gates_of(p.cell) * p.hidden) + c + unprojected) * sizeof(C);
}

template <class S>
void backward_pack(const Problem& p, int d, void* packed) {
  using C = Compute<S>;
  const BackwardShapes<C> shapes(p);
  const int64_t H = p.hidden, P = p.projected, G = gates_of(p.cell);
  const S* w_hh = static_cast<const S*>(p.w_hh) + d * G * H * P;
  for (int64_t j = 0; j < panels<C>(shapes.recurrent); j++)
    pack_panel(shapes.recurrent, j, w_hh, 0, 1, P, static_cast<C*>(packed));
  if (!p.has_projection) return;
  C* packed_projection = static_cast<C*>(packed) + packed_size<C>(shapes.recurrent);
  for (int64_t j = 0; j < panels<C>(shapes.projection); j++)
    pack_panel(shapes.projection, j, static_cast<const S*>(p.w_hr) + d * P * H, 0, 1, H, packed_projection);
}

template <Cell kCell, class S>
void backward(const Backward& p, const Task& task, const void* packed, void* scratch) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int kLane = kLanes<C>;
  const BackwardShapes<C> shapes(p);
  const Layout<S> at{p, task};
  const int64_t H = p.hidden, P = p.projected, ldh = padded<C>(P), ldc = padded<C>(H);
  constexpr int G = kCell == Cell::gru ? 3 : kCell == Cell::lstm ? 4 : 1;
  constexpr int K = kCell == Cell::gru ? 4 : kCell == Cell::lstm ? 5 : 0;
  const int64_t ldg = padded<C>(G * H);
  const S* y = static_cast<const S*>(p.y);
  const S* saved = static_cast<const S*>(p.saved);
  const S* grad_y = static_cast<const S*>(p.grad_y);
  S* grad_gates_x = static_cast<S*>(p.grad_gates_x);
  S* grad_hidden = static_cast<S*>(p.grad_hidden);
  const C* packed_hh = static_cast<const C*>(packed);
  const C* packed_hr = packed_hh + packed_size<C>(shapes.recurrent);

  C* grad_h = static_cast<C*>(scratch);       // what later steps say of each sequence's h
  C* grad_gates = grad_h + task.count * ldh;  // of W_hh h, the left factor of the product
  C* grad_c = grad_gates + task.count * ldg;
  C* grad_unprojected = grad_c + (p.c_0 ? task.count * ldc : 0);
  for (int64_t r = 0; r < task.count; r++) {
    const S* h_n = static_cast<const S*>(p.grad_h_n);
    const S* c_n = static_cast<const S*>(p.grad_c_n);
    load_state(h_n ? at.at_sequence(h_n, r, P) : h_n, grad_h + r * ldh, P);
    if (kCell == Cell::lstm) load_state(c_n ? at.at_sequence(c_n, r, H) : c_n, grad_c + r * ldc, H);
  }

  for (int64_t i = 0; i < p.steps; i++) {
    const int64_t t = task.direction ? i : p.steps - 1 - i;
    const int64_t before = task.direction ? t + 1 : t - 1;  // the step this one started from
    const int64_t running = at.running(t), had_before = at.running(before);
    const int64_t ahead = at.rows_to(t, before) * p.directions;

    if (grad_y)
      for (int64_t r = 0; r < running; r++) {
        const S* from = at.at_row(grad_y, at.row(t, r), P);
        C* to = grad_h + r * ldh;
        for (int64_t u = 0; u < P; u += kLane) {
          prefetch_load(from + u + ahead * P);
          store(to + u, load(to + u) + load(from + u, P - u));
        }
      }
    if (p.has_projection) {
      for (int64_t r = 0; r < running; r++) store_state(grad_h + r * ldh, at.at_row(grad_hidden, at.row(t, r), P), P);
      product(shapes.projection, running, grad_h, ldh, packed_hr,
              [&](int64_t r, int64_t unit, int64_t, V x) { store(grad_unprojected + r * ldc + unit, x); });
    }

    for (int64_t r = 0; r < running; r++) {
      const int64_t row = at.row(t, r);
      const int64_t row_before = r < had_before ? at.row(before, r) : -1;
      S* grad_x = at.at_row(grad_gates_x, row, G * H);
      C* gates_h = grad_gates + r * ldg;
      const S* kept = at.at_row(saved, row, K * H);
      [[maybe_unused]] const S* h_prev =
          row_before < 0 ? at.at_sequence(static_cast<const S*>(p.h_0), r, P) : at.at_row(y, row_before, P);
      for (int64_t u = 0; u < H; u += kLane) {
        const int64_t lanes = least(H - u, kLane);
        const auto saved_block = [&](int block) {
          const S* from = kept + block * H + u;
          prefetch_load(from + ahead * K * H);
          return load(from, lanes);
        };
        // A gate's gradient goes to the user's rows, and to the scratch that is multiplied by the weights.
        const auto put = [&](int g, V x, V h) {
          prefetch_store(grad_x + g * H + u + ahead * G * H);
          store(grad_x + g * H + u, x, lanes);
          store(gates_h + g * H + u, h, lanes);
        };
        if constexpr (kCell == Cell::gru) {
          const GruGates<V> gates{saved_block(0), saved_block(1), saved_block(2), saved_block(3)};
          GruGates<V> grad;
          C* h = grad_h + r * ldh + u;
          store(h, gru_backward(load(h), load(h_prev + u, lanes), gates, grad));
          put(0, grad.r, grad.r);
          put(1, grad.z, grad.z);
          put(2, grad.n, grad.hn);
          store(at.at_row(grad_hidden, row, H) + u, grad.hn, lanes);
        } else if constexpr (kCell == Cell::lstm) {
          const LstmGates<V> gates{saved_block(0), saved_block(1), saved_block(2), saved_block(3)};
          LstmGates<V> grad;
          const S* c_prev = row_before < 0 ? at.at_sequence(static_cast<const S*>(p.c_0), r, H)
                                           : at.at_row(saved, row_before, K * H) + 4 * H;
          V state = load(grad_c + r * ldc + u);
          const V grad_o = load((p.has_projection ? grad_unprojected + r * ldc : grad_h + r * ldh) + u);
          lstm_backward(grad_o, state, saved_block(4), load(c_prev + u, lanes), gates, grad);
          store(grad_c + r * ldc + u, state);
          put(0, grad.i, grad.i);
          put(1, grad.f, grad.f);
          put(2, grad.g, grad.g);
          put(3, grad.o, grad.o);
        } else {
          const V h = load(at.at_row(y, row, P) + u, lanes), grad = load(grad_h + r * ldh + u);
          const V x = kCell == Cell::rnn_tanh ? tanh_backward(grad, h) : relu_backward(grad, h);
          put(0, x, x);
        }
      }
    }

    product(shapes.recurrent, running, grad_gates, ldg, packed_hh, [&](int64_t r, int64_t unit, int64_t, V x) {
      C* h = grad_h + r * ldh + unit;
      // The GRU's h also goes past the gates; that part is there already.
      store(h, kCell == Cell::gru ? load(h) + x : x);
    });
  }

  for (int64_t r = 0; r < task.count; r++) {
    store_state(grad_h + r * ldh, at.at_sequence(static_cast<S*>(p.grad_h_0), r, P), P);
    if (kCell == Cell::lstm) store_state(grad_c + r * ldc, at.at_sequence(static_cast<S*>(p.grad_c_0), r, H), H);
  }
}

// ---- from run-time values to instances

template <class Call>
auto with_scalar(Scalar scalar, const Call& call) {
  switch (scalar) {
    case Scalar::float64: return call(double{});
    case Scalar::bfloat16: return call(bfloat16{});
    case Scalar::float16: return call(float16{});
    default: return call(float{});
  }
}

#define SEQKERNELS_FOR_CELL(cell, function, ...)                                    \
  switch (cell) {                                                                   \
    case Cell::rnn_tanh: return function<Cell::rnn_tanh, decltype(s)>(__VA_ARGS__); \
    case Cell::rnn_relu: return function<Cell::rnn_relu, decltype(s)>(__VA_ARGS__); \
    case Cell::gru: return function<Cell::gru, decltype(s)>(__VA_ARGS__);           \
    case Cell::lstm: return function<Cell::lstm, decltype(s)>(__VA_ARGS__);         \
  }

void run_forward(const Forward& p, const Task& task, const void* packed, void* scratch) {
  with_scalar(p.scalar, [&](auto s) { SEQKERNELS_FOR_CELL(p.cell, forward, p, task, packed, scratch) });
}

void run_backward(const Backward& p, const Task& task, const void* packed, void* scratch) {
  with_scalar(p.scalar, [&](auto s) { SEQKERNELS_FOR_CELL(p.cell, backward, p, task, packed, scratch) });
}

int64_t forward_packed(const Problem& p) {
  return with_scalar(p.scalar, [&](auto s) { return forward_packed_bytes<decltype(s)>(p); });
}
int64_t forward_scratch(const Problem& p, int64_t count) {
  return with_scalar(p.scalar, [&](auto s) { return forward_scratch_bytes<decltype(s)>(p, count); });
}
int64_t backward_packed(const Problem& p) {
  return with_scalar(p.scalar, [&](auto s) { return backward_packed_bytes<decltype(s)>(p); });
}
int64_t backward_scratch(const Problem& p, int64_t count) {
  return with_scalar(p.scalar, [&](auto s) { return backward_scratch_bytes<decltype(s)>(p, count); });
}
void pack_forward(const Problem& p, int d, void* packed) {
  with_scalar(p.scalar, [&](auto s) { forward_pack<decltype(s)>(p, d, packed); });
}
void pack_backward(const Problem& p, int d, void* packed) {
  with_scalar(p.scalar, [&](auto s) { backward_pack<decltype(s)>(p, d, packed); });
}

#define SEQKERNELS_STRING_(x) #x
#define SEQKERNELS_STRING(x) SEQKERNELS_STRING_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    SEQKERNELS_STRING(SEQKERNELS_ISA),
    forward_packed,
    forward_scratch,
    backward_packed,
    backward_scratch,
    pack_forward,
    run_forward,
    pack_backward,
    run_backward,
};

}  // namespace seqkernels::SEQKERNELS_ISA
