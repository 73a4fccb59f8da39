// The cells: the one entry of each in C++. First the facts, which host and kernels read, then the algebra, which only
// kernels need. Sources: the torch.nn documentation of RNN, GRU and LSTM; for LiGRU, speechbrain.nnet.RNN.LiGRU.
#pragma once

namespace seqkernels {

enum class Cell { rnn_tanh, rnn_relu, gru, lstm, ligru };

// Defaults; the entry of a cell says what differs.
struct CellDefaults {
  static constexpr int states = 1;        // h, and an LSTM's c
  static constexpr int saved_blocks = 0;  // K: numbers per unit that the forward pass saves for the backward pass
  // So many gates, the last ones, have W_hh h + b_hh apart from W_ih x + b_ih: the cell does not simply add them.
  static constexpr int apart = 0;
  static constexpr bool can_project = false;  // whether w_hr may make a smaller h of the cell's own
  // The backward pass reads the new h, or the one before. In the second case the gradient of h has a part that goes
  // past the gates.
  static constexpr bool needs_h = false, needs_h_prev = false;
};

template <Cell>
struct CellTraits;

template <>
struct CellTraits<Cell::rnn_tanh> : CellDefaults {
  static constexpr const char* name = "rnn_tanh";
  static constexpr Cell cell = Cell::rnn_tanh;
  static constexpr int gates = 1;
  static constexpr bool needs_h = true;
};

template <>
struct CellTraits<Cell::rnn_relu> : CellDefaults {
  static constexpr const char* name = "rnn_relu";
  static constexpr Cell cell = Cell::rnn_relu;
  static constexpr int gates = 1;
  static constexpr bool needs_h = true;
};

template <>
struct CellTraits<Cell::gru> : CellDefaults {
  static constexpr const char* name = "gru";
  static constexpr Cell cell = Cell::gru;
  static constexpr int gates = 3;         // r z n
  static constexpr int saved_blocks = 4;  // r z n, W_hn h + b_hn
  static constexpr int apart = 1;         // n: r multiplies W_hn h + b_hn
  static constexpr bool needs_h_prev = true;
};

template <>
struct CellTraits<Cell::lstm> : CellDefaults {
  static constexpr const char* name = "lstm";
  static constexpr Cell cell = Cell::lstm;
  static constexpr int gates = 4;  // i f g o
  static constexpr int states = 2;
  static constexpr int saved_blocks = 5;  // i f g o c
  static constexpr bool can_project = true;
};

template <>
struct CellTraits<Cell::ligru> : CellDefaults {
  static constexpr const char* name = "ligru";
  static constexpr Cell cell = Cell::ligru;
  static constexpr int gates = 2;         // a z
  static constexpr int saved_blocks = 2;  // a z
  static constexpr bool needs_h_prev = true;
};

constexpr Cell kCells[] = {Cell::rnn_tanh, Cell::rnn_relu, Cell::gru, Cell::lstm, Cell::ligru};

// From a cell that is known at run time to its traits: call(CellTraits<cell>{}).
template <class Call>
constexpr auto with_cell(Cell cell, const Call& call) {
  switch (cell) {
    case Cell::rnn_tanh: return call(CellTraits<Cell::rnn_tanh>{});
    case Cell::rnn_relu: return call(CellTraits<Cell::rnn_relu>{});
    case Cell::gru: return call(CellTraits<Cell::gru>{});
    case Cell::lstm: return call(CellTraits<Cell::lstm>{});
    case Cell::ligru: return call(CellTraits<Cell::ligru>{});
  }
  __builtin_unreachable();  // a Cell comes from cell_of, which knows no other
}

constexpr const char* name_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.name; });
}
constexpr int gates_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.gates; });
}
constexpr int states_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.states; });
}
constexpr int saved_blocks_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.saved_blocks; });
}
constexpr bool can_project(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.can_project; });
}
constexpr int apart_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.apart; });
}
// F: a gate whose products stay apart has two gradients, one for W_hh h and one for W_ih x.
constexpr int gradient_blocks_of(Cell cell) {
  return with_cell(cell, [](auto traits) { return traits.gates + traits.apart; });
}

// How many numbers of a unit cell_forward() or cell_backward() below writes at most, in any cell: what is saved but for
// c, or gradients.
constexpr int max_blocks() {
  int max = 0;
  for (const Cell cell : kCells) {
    const int saved = saved_blocks_of(cell) - (states_of(cell) - 1), gradients = gradient_blocks_of(cell);
    max = saved > max ? saved : max;
    max = gradients > max ? gradients : max;
  }
  return max;
}
constexpr int kMaxBlocks = max_blocks();

}  // namespace seqkernels

// ---- algebra

// T is a SIMD vector on the CPU and a float or double in device code. Every kernel's translation unit has a namespace
// SEQKERNELS_ISA with `sigmoid` and `tanh` of T: vec.h defines those below, device.cuh declares its own beforehand.
#ifdef SEQKERNELS_ISA

#ifdef __CUDACC__
#define SEQKERNELS_CELL __device__ inline
#else  // a call would pass every vector through memory
#define SEQKERNELS_CELL inline __attribute__((always_inline))
#endif

namespace seqkernels::SEQKERNELS_ISA {

template <class T>
SEQKERNELS_CELL T sigmoid(T x);
template <class T>
SEQKERNELS_CELL T tanh(T x);

// Comparisons are written so that NaN passes through.
template <class T>
SEQKERNELS_CELL T relu(T x) {
  return x < 0 ? T{} : x;
}

template <class T>
SEQKERNELS_CELL T relu_backward(T grad, T result) {
  return result <= 0 ? T{} : grad;
}

template <class T>
SEQKERNELS_CELL T tanh_backward(T grad, T result) {
  return grad * (1 - result * result);
}

template <class T>
struct GruGates {
  T r, z, n, hn;  // reset, update and new gate, and W_hn h + b_hn
};

template <class T>
SEQKERNELS_CELL T gru_forward(T x_r, T x_z, T x_n, T h_r, T h_z, T h_n, T h, GruGates<T>& gates) {
  gates.r = sigmoid(x_r + h_r);
  gates.z = sigmoid(x_z + h_z);
  gates.n = tanh(x_n + gates.r * h_n);
  gates.hn = h_n;
  return gates.n + gates.z * (h - gates.n);
}

// Gradients of the gates before their activations; n counts for x, hn for h. Returns that of h past the gates.
template <class T>
SEQKERNELS_CELL T gru_backward(T grad_h, T h_prev, const GruGates<T>& gates, GruGates<T>& grad) {
  grad.n = grad_h * (1 - gates.z) * (1 - gates.n * gates.n);
  grad.hn = grad.n * gates.r;
  grad.r = grad.n * gates.hn * gates.r * (1 - gates.r);
  grad.z = grad_h * (h_prev - gates.n) * gates.z * (1 - gates.z);
  return grad_h * gates.z;
}

template <class T>
struct LstmGates {
  T i, f, g, o;
};

// Returns o * tanh(c), which is h unless it is projected.
template <class T>
SEQKERNELS_CELL T lstm_forward(T i, T f, T g, T o, T& c, LstmGates<T>& gates) {
  gates.i = sigmoid(i);
  gates.f = sigmoid(f);
  gates.g = tanh(g);
  gates.o = sigmoid(o);
  c = gates.f * c + gates.i * gates.g;
  return gates.o * tanh(c);
}

// grad_c is the gradient of c before the call, and that of c_prev after it.
template <class T>
SEQKERNELS_CELL void lstm_backward(T grad_h, T& grad_c, T c, T c_prev, const LstmGates<T>& gates, LstmGates<T>& grad) {
  const T tanh_c = tanh(c);
  grad_c += grad_h * gates.o * (1 - tanh_c * tanh_c);
  grad.i = grad_c * gates.g * gates.i * (1 - gates.i);
  grad.f = grad_c * c_prev * gates.f * (1 - gates.f);
  grad.g = grad_c * gates.i * (1 - gates.g * gates.g);
  grad.o = grad_h * tanh_c * gates.o * (1 - gates.o);
  grad_c *= gates.f;
}

// The new c from the saved gates i f g and the c before.
template <class T>
SEQKERNELS_CELL T lstm_c(const T* saved, T c_prev) {
  return saved[1] * c_prev + saved[0] * saved[2];
}
// And with dropout of g.
template <class T>
SEQKERNELS_CELL T lstm_c(const T* saved, T c_prev, T mask) {
  return saved[1] * c_prev + saved[0] * (mask * saved[2]);
}

template <class T>
struct LigruGates {
  T a, z;  // candidate and update gate
};

template <class T>
SEQKERNELS_CELL T ligru_forward(T a, T z, T h, LigruGates<T>& gates) {
  gates.a = relu(a);
  gates.z = sigmoid(z);
  return gates.z * h + (1 - gates.z) * gates.a;
}

// Returns the gradient of h past the gates.
template <class T>
SEQKERNELS_CELL T ligru_backward(T grad_h, T h_prev, const LigruGates<T>& gates, LigruGates<T>& grad) {
  grad.a = relu_backward(grad_h * (1 - gates.z), gates.a);
  grad.z = grad_h * (h_prev - gates.a) * gates.z * (1 - gates.z);
  return grad_h * gates.z;
}

// ---- one step of any cell, which kernels call

// x has the gates' W_ih x, with all biases but those that stay apart, and recurrent their W_hh h; there b_hh is part of
// what stays apart. h and c change in place; `saved` gets what is saved, but for an LSTM's c, which the caller has.
template <Cell kCell, class T>
SEQKERNELS_CELL void cell_forward(const T* x, const T* recurrent, T& h, T& c, T* saved) {
  if constexpr (kCell == Cell::rnn_tanh) {
    h = tanh(x[0] + recurrent[0]);
  } else if constexpr (kCell == Cell::rnn_relu) {
    h = relu(x[0] + recurrent[0]);
  } else if constexpr (kCell == Cell::gru) {
    GruGates<T> gates;
    h = gru_forward(x[0], x[1], x[2], recurrent[0], recurrent[1], recurrent[2], h, gates);
    saved[0] = gates.r, saved[1] = gates.z, saved[2] = gates.n, saved[3] = gates.hn;
  } else if constexpr (kCell == Cell::lstm) {
    LstmGates<T> gates;
    h = lstm_forward(x[0] + recurrent[0], x[1] + recurrent[1], x[2] + recurrent[2], x[3] + recurrent[3], c, gates);
    saved[0] = gates.i, saved[1] = gates.f, saved[2] = gates.g, saved[3] = gates.o;
  } else {
    static_assert(kCell == Cell::ligru);
    LigruGates<T> gates;
    h = ligru_forward(x[0] + recurrent[0], x[1] + recurrent[1], h, gates);
    saved[0] = gates.a, saved[1] = gates.z;
  }
}

// `now` is the new state and `before` the one before it, which the cell needs: c where there is one, else h. grad_c
// changes in place. `grad` gets the gradients of the gates before their activations: those for W_hh h, then of the
// gates that stay apart those for W_ih x. Returns the gradient of the previous h past the gates.
template <Cell kCell, class T>
SEQKERNELS_CELL T cell_backward(T grad_h, T& grad_c, const T* saved, T now, T before, T* grad) {
  if constexpr (kCell == Cell::rnn_tanh) {
    grad[0] = tanh_backward(grad_h, now);
    return T{};
  } else if constexpr (kCell == Cell::rnn_relu) {
    grad[0] = relu_backward(grad_h, now);
    return T{};
  } else if constexpr (kCell == Cell::gru) {
    GruGates<T> of;
    const T past = gru_backward(grad_h, before, {saved[0], saved[1], saved[2], saved[3]}, of);
    grad[0] = of.r, grad[1] = of.z, grad[2] = of.hn, grad[3] = of.n;
    return past;
  } else if constexpr (kCell == Cell::lstm) {
    LstmGates<T> of;
    lstm_backward(grad_h, grad_c, now, before, {saved[0], saved[1], saved[2], saved[3]}, of);
    grad[0] = of.i, grad[1] = of.f, grad[2] = of.g, grad[3] = of.o;
    return T{};
  } else {
    static_assert(kCell == Cell::ligru);
    LigruGates<T> of;
    const T past = ligru_backward(grad_h, before, {saved[0], saved[1]}, of);
    grad[0] = of.a, grad[1] = of.z;
    return past;
  }
}

// ---- the same with dropout of the candidate, which is what a step adds to the state: g of LSTM, n of GRU, a of LiGRU

template <Cell kCell>
constexpr int kCandidate = kCell == Cell::ligru ? 0 : 2;  // its block of what is saved; z is block 1 where there is one

// From the states before a step, and what cell_forward() has saved, the states after it.
template <Cell kCell, class T>
SEQKERNELS_CELL void drop_candidate(T mask, const T* saved, T h_before, T c_before, T& h, T& c) {
  if constexpr (kCell == Cell::lstm) {
    c = lstm_c(saved, c_before, mask);
    h = saved[3] * tanh(c);
  } else {
    h = saved[1] * h_before + (1 - saved[1]) * (mask * saved[kCandidate<kCell>]);
  }
}

// As cell_backward(), which lacks the mask in the gradients of all gates that come through the candidate, and in z's.
template <Cell kCell, class T>
SEQKERNELS_CELL T dropped_backward(T mask, T grad_h, T& grad_c, const T* saved, T now, T before, T* grad) {
  if constexpr (kCell != Cell::lstm) before += (1 - mask) * saved[kCandidate<kCell>];
  const T past = cell_backward<kCell>(grad_h, grad_c, saved, now, before, grad);
  grad[0] *= mask;  // of GRU r, of LSTM i, of LiGRU a
  if constexpr (kCell != Cell::ligru) grad[2] *= mask;
  if constexpr (kCell == Cell::gru) grad[3] *= mask;
  return past;
}

}  // namespace seqkernels::SEQKERNELS_ISA
#endif
