// Plain structs: all that crosses from the host (library.cpp) to kernels.
#pragma once
#include <cstdint>

namespace seqkernels {

enum class Cell { rnn_tanh, rnn_relu, gru, lstm };
enum class Scalar { float32, float64, bfloat16, float16 };

inline int gates_of(Cell cell) { return cell == Cell::gru ? 3 : cell == Cell::lstm ? 4 : 1; }
inline int saved_blocks_of(Cell cell) { return cell == Cell::gru ? 4 : cell == Cell::lstm ? 5 : 0; }

// One layer with all its directions. Letters: T steps, B sequences, N rows, H hidden size, P projected size,
// G gates, D directions, K saved blocks. All arrays are contiguous; sizes count elements.
struct Problem {
  Cell cell;
  Scalar scalar;
  int64_t steps, sequences, rows, hidden, projected;
  int directions;
  bool has_projection;
  const int64_t* batch_sizes;  // [T] running sequences, never rising
  const int64_t* offsets;      // [T] first row of each step
  const void* w_hh;            // [D, G*H, P]
  const void* b_hh;            // [D, G*H] or null, GRU only
  const void* w_hr;            // [D, P, H] or null
  const void* h_0;             // [D, B, P]
  const void* c_0;             // [D, B, H] or null
};

struct Forward : Problem {
  const void* gates_x;  // [N, D, G*H]
  void* y;              // [N, D*P]
  void* h_n;            // [D, B, P]
  void* c_n;            // [D, B, H] or null
  void* saved;          // [N, D, K*H] or null
};

struct Backward : Problem {
  const void* grad_y;    // [N, D*P] or null
  const void* grad_h_n;  // [D, B, P] or null
  const void* grad_c_n;  // [D, B, H] or null
  const void* y;
  const void* saved;
  void* grad_gates_x;  // [N, D, G*H]
  void* grad_hidden;   // GRU [N, D, H], projected LSTM [N, D, P], else null
  void* grad_h_0;      // [D, B, P]
  void* grad_c_0;      // [D, B, H] or null
};

// A share of the work that needs no other: some sequences of one direction, through all steps.
// Sequence r of the task is number first + r * stride of the batch.
struct Task {
  int direction;
  int64_t first, stride, count;
};

}  // namespace seqkernels
