// What layers with layer norm compute in a step, on whatever path.
#pragma once
#include "masks.cuh"

namespace seqkernels::device {

// What a row is normalized by.
template <class T>
struct Moments {
  T mean, inverse;

  DEVICE T of(T x) const { return (x - mean) * inverse; }
};

// The gradient of x, from that of x normalized, and the means over the row of that gradient, and of it times x
// normalized.
template <class T>
DEVICE T normalized_backward(T grad, T normalized, const T (&means)[2], T inverse) {
  return inverse * (grad - means[0] - normalized * means[1]);
}

// A unit in a step: from its states before, and the gates of x and of h, those after it, but for zoneout.
template <Cell CELL, class T>
struct NormedUnit {
  T h_before, c_before, h, c, blocks[kMaxBlocks] = {};

  DEVICE NormedUnit(const MaskedStep<CELL, T>& masked, const T* x, const T* recurrent, T h_before, T c_before)
      : h_before(h_before), c_before(c_before), h(h_before), c(c_before) {
    cell_forward<CELL>(x, recurrent, h, c, blocks);
    masked.drop(0, blocks, h_before, c_before, h, c);
  }
};

// c normalized, what h is read from, and the gradient of that before its tanh.
template <class T>
struct ReadC {
  T normalized, value, grad;
};
template <Cell CELL, class T>
DEVICE ReadC<T> read_c(const NormedUnit<CELL, T>& u, T normalized, T scaled, T grad_h) {
  const T value = tanh(scaled);
  return {normalized, value, tanh_backward(grad_h * u.blocks[3], value)};
}

// The gradients of the h and c that the cell gave a unit, and what goes past it to those before.
template <Cell CELL, class T>
struct StateGradients {
  T h, c = 0, past_h, past_c = 0;

  DEVICE StateGradients(const MaskedStep<CELL, T>& masked, T grad_h, T grad_c) : past_h(masked.stays_h(0, grad_h)) {
    h = grad_h - past_h;
    if constexpr (kHasC<CELL>) past_c = masked.stays_c(0, grad_c), c = grad_c - past_c;
  }

  // Where c is normalized, all that comes through h is the gradient of o, and `of_c`, that of c through its norm.
  // Gives the gradients of the gates, and becomes those of the h and c before.
  DEVICE void run(const MaskedStep<CELL, T>& masked, const NormedUnit<CELL, T>& u, const ReadC<T>* read, T of_c,
                  T* grad) {
    T of_o = 0;
    if (read) of_o = h * read->value * u.blocks[3] * (1 - u.blocks[3]), c += of_c, h = 0;
    const T now = kHasC<CELL> ? u.c : u.h, before = kHasC<CELL> ? u.c_before : u.h_before;
    h = masked.cell_back(masked.candidate(0), h, c, u.blocks, now, before, grad) + past_h;
    c += past_c;
    if (read) grad[3] = of_o;
  }
};

}  // namespace seqkernels::device
