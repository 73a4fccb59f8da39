// Plain structs: all that crosses from the host to kernels.
#pragma once
#include <cstdint>

#include "cells.h"

namespace seqkernels {

enum class Scalar { float32, float64, bfloat16, float16 };

// The weights of one direction, or their gradients. Null where there is none.
template <class Pointer>
struct WeightsOf {
  Pointer w_ih;  // [G*H, I]
  Pointer w_hh;  // [G*H, P]
  Pointer b_ih;  // [G*H] or null
  Pointer b_hh;  // [G*H] or null
  Pointer w_hr;  // [P, H] or null
};

// One layer with all its directions. Letters: T steps, B sequences, N rows, C states, I input size, H hidden size, P
// projected size, G gates, D directions, K saved blocks. All arrays are contiguous; sizes count elements.
//
// A sequence can consist of pieces, each with a first and a last state of its own. Without, C is B.
struct Layer {
  Cell cell;
  Scalar scalar;
  int64_t steps, sequences, rows, input, hidden, projected;  // rows: those that a step uses
  int directions;
  int saved_blocks;  // K: that of the cell, but 1 of an RNN with zoneout, which saves the h that may be replaced
  bool has_projection;
  bool bfloat16_products;      // the machine multiplies pairs of bfloat16
  bool bfloat16_tiles;         // and tiles of them
  int bfloat16_parts;          // of float32: factors may be sums of so many bfloat16, where that pays; 0: may not
  bool int8_products;          // fours of int8
  bool int8_tiles;             // and tiles of them
  bool as_among_others;        // few rows get the bits that they have in a call of more
  const int64_t* batch_sizes;  // [T] running sequences, never rising, none zero
  const int64_t* offsets;      // [T] first row of each step
  const int64_t* pieces;       // [N] the state that is each row's, or null: sequence b has state b
  int64_t states;              // C
  const void* x;               // [N, I]
  WeightsOf<const void*> weights[2];
  const void* h_0;  // [D, C, P]
  const void* c_0;  // [D, C, H] or null
  // Of cells with options (seqkernels/option_ops.py), in the type of computation; each null where there is none.
  const void* recurrent;  // [D, B, P] what multiplies h in its products
  const void* candidate;  // [D, B, H] what multiplies what a step adds to the state
  const void* zoneout_h;  // [N, D, P] how much of the state before stays
  const void* zoneout_c;  // [N, D, H]

  bool masked() const { return recurrent || candidate || zoneout_h || zoneout_c; }
};

// How packed weights lie that stay between calls: equal ones may take each other's memory.
struct PackedLayout {
  int64_t bytes;   // 0: they do not stay
  int64_t panels;  // of each, how often it was packed, stands first in the memory
  int64_t facts[10];
};

struct LayerForward : Layer {
  void* y;      // [N, D*P]
  void* h_n;    // [D, C, P]
  void* c_n;    // [D, C, H] or null
  void* saved;  // [N, D, K*H] or null
  void* kept;   // memory of the PackedLayout, for packed weights that stay between calls; null: they do not
};

struct LayerBackward : Layer {
  const void* grad_y;    // [N, D*P] or null
  const void* grad_h_n;  // [D, C, P] or null
  const void* grad_c_n;  // [D, C, H] or null
  const void* y;
  const void* saved;
  bool wants_x, wants_weights;
  void* grad_x;                      // [N, I] if wanted
  WeightsOf<void*> grad_weights[2];  // if wanted
  void* grad_h_0;                    // [D, C, P]
  void* grad_c_0;                    // [D, C, H] or null
};

constexpr double kNormEpsilon = 1e-5;  // that is added to a variance: torch_steps.EPS

// A layer with layer norm (seqkernels/layer_norm_ops.py, which says what is what). Of the weights it has w_hh, and a
// row of `saved` is [(G+S-1)*H]: the normalized sums, and c.
struct Norms {
  bool of_sum;            // of both products, else of W_hh h alone
  int64_t blocks;         // of units that W_hh does not connect; it is [D, G*H, H/blocks]
  int statistics_of_row;  // 1, of a layer that normalizes c 3
  const void* gates_x;    // [N, D, G*H]
  const void* scale;      // [D, G*H]
  const void* shift;      // [D, G*H] or null
  const void* scale_c;    // [D, H] or null: c is not normalized
  const void* shift_c;    // [D, H] or null
};

struct LayerNormForward : LayerForward {
  Norms norms;
  void* statistics;  // [N, D, 1 or 3] or null
};

struct LayerNormBackward : LayerBackward {
  Norms norms;
  const void* statistics;
  void* grad_gates_x;                 // [N, D, G*H], null of_sum
  void* grad_sums;                    // [N, D, G*H]: of what is normalized, of_sum the gradient of gates_x as well
  void* factors;                      // [N, D, H]: h before each step, as the products have it
  void *grad_scale, *grad_shift;      // [D, G*H]
  void *grad_scale_c, *grad_shift_c;  // [D, H] or null
};

}  // namespace seqkernels
