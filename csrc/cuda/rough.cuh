// Numbers of layers in 16 bits, within a step of the forward pass.
#pragma once
#include "layer.cuh"

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

// cell_forward() of one unit in a layer of T.
template <Cell kCell, class T, int G>
DEVICE void forward_cell(const float (&x)[G], const float (&of_h)[G], float& h, float& c, float (&saved)[kMaxBlocks]) {
  if constexpr (sizeof(T) != 2) {
    cell_forward<kCell>(x, of_h, h, c, saved);
  } else {
    Rough of_x[G], recurrent[G], h_new = h, c_new = c, of_unit[kMaxBlocks];
#pragma unroll
    for (int gate = 0; gate < G; gate++) of_x[gate] = x[gate], recurrent[gate] = of_h[gate];
    cell_forward<kCell>(of_x, recurrent, h_new, c_new, of_unit);
    h = h_new.x, c = c_new.x;
#pragma unroll
    for (int block = 0; block < kSavedGates<kCell>; block++) saved[block] = of_unit[block].x;
  }
}

}  // namespace seqkernels::device
