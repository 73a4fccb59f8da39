// The gate algebra of every cell, forward and backward: the only C++ copy of these formulas.
// T is a SIMD vector on the CPU, a float in device code; `sigmoid` and `tanh` of T are declared by whoever includes
// this. Source: the torch.nn documentation of RNN, GRU and LSTM.
#pragma once

#ifdef __CUDACC__
#define SEQKERNELS_CELL __device__ inline
#else
#define SEQKERNELS_CELL inline
#endif

namespace seqkernels::SEQKERNELS_ISA {

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

// grad_c enters as the gradient of c and leaves as that of c_prev.
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

// Comparisons are written so that NaN passes through.
template <class T>
SEQKERNELS_CELL T relu(T x) {
  return x < 0 ? T{} : x;
}

template <class T>
SEQKERNELS_CELL T tanh_backward(T grad_h, T h) {
  return grad_h * (1 - h * h);
}

template <class T>
SEQKERNELS_CELL T relu_backward(T grad_h, T h) {
  return h <= 0 ? T{} : grad_h;
}

}  // namespace seqkernels::SEQKERNELS_ISA
