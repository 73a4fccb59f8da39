// All that crosses from the host (library.cpp) to the kernels of a sweep: a pass over all steps of a layer, between the
// input projection and the products over all rows. Letters as in params.h; F is the number of blocks of grad_gates: 1
// for an RNN, i f g o for an LSTM, and for a GRU r, z, W_hn h + b_hn, n, of which the first three are those of h, and
// all but the third those of x.
#pragma once
#include "../params.h"

namespace seqkernels {

constexpr int gradient_blocks_of(Cell cell) { return gates_of(cell) == 1 ? 1 : 4; }

struct Sweep {
  Cell cell;
  Scalar scalar;
  bool tf32;  // float32 factors may be rounded to TF32
  int directions;
  int64_t steps, sequences, rows, hidden, projected;
  const int64_t *starts, *sizes;  // [T] first row and running sequences of each step, on the GPU; null: never fewer
};

struct ForwardSweep : Sweep {
  const void* gates_x;   // [D, N, G*H], with all biases but b_hn
  const void* w_hh[2];   // [G*H, H]
  const void* b_hn[2];   // [H] or null: GRU's, which r multiplies
  const void* h_0;       // [D, B, H]
  const void* c_0;       // [D, B, H] or null
  void* y;               // [N, D*H]
  void* h_n;             // [D, B, H]
  void* c_n;             // [D, B, H] or null
  void* saved;           // [N, D, K*H] or null
};

struct BackwardSweep : Sweep {
  const void* grad_y;    // [N, D*H] or null
  const void* grad_h_n;  // [D, B, H] or null
  const void* grad_c_n;  // [D, B, H] or null
  const void* w_hh[2];
  const void* h_0;
  const void* c_0;
  const void* y;
  const void* saved;
  void* grad_gates;      // [D, N, F*H]
  void* grad_h_0;        // [D, B, H]
  void* grad_c_0;        // [D, B, H] or null
};

}  // namespace seqkernels
