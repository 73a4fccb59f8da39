// Numbers of layers in 16 bits, within a step of the forward pass.
#pragma once
#include "device.cuh"

namespace seqkernels::device {

// A float whose tanh is the hardware's, and whose sigmoid is quick: what they err, a part of each result, is little
// beside the rounding of a state to 16 bits.
struct Rough {
  float x;

  DEVICE Rough(float x = 0) : x(x) {}
  friend DEVICE Rough operator+(Rough a, Rough b) { return a.x + b.x; }
  friend DEVICE Rough operator-(Rough a, Rough b) { return a.x - b.x; }
  friend DEVICE Rough operator*(Rough a, Rough b) { return a.x * b.x; }
  friend DEVICE bool operator<(Rough a, Rough b) { return a.x < b.x; }
};

DEVICE Rough tanh(Rough x) { return approximate_tanh(x.x); }
DEVICE Rough sigmoid(Rough x) { return approximate_sigmoid(x.x); }

DEVICE float value(float x) { return x; }
DEVICE float value(Rough x) { return x.x; }

// What the cell of a layer computes in, forward.
template <class T>
using cell_t = std::conditional_t<sizeof(T) == 2, Rough, T>;

}  // namespace seqkernels::device
