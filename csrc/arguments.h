// The arguments of the operators as native backends name them, and how a layer's part of them is found.
#pragma once
#include <iterator>
#include <string_view>

#include "layer.h"
#include "tensors.h"

// The schemas of the pair of operators, which seqkernels/ops.py explains. `masks`: nothing, or SEQKERNELS_MASKS.
// `launch`: how a backend launches a pass, and, of stacks of layers, SEQKERNELS_OF_STACK.
#define SEQKERNELS_STACK "Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, "
#define SEQKERNELS_OF_STACK ", int layers=1, Tensor? pieces=None"
#define SEQKERNELS_FORWARD_SCHEMA(masks, launch) \
  "(str cell, " SEQKERNELS_STACK masks "bool save, " launch ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)"
#define SEQKERNELS_BACKWARD_SCHEMA(masks, launch)                                          \
  "(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, " SEQKERNELS_STACK masks \
  "Tensor y, Tensor saved, bool wants_x, bool wants_weights, " launch                      \
  ") -> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, Tensor grad_c_0)"

namespace seqkernels {

inline Cell cell_of(std::string_view name) {
  for (const Cell cell : kCells)
    if (name == name_of(cell)) return cell;
  std::string known;
  const Cell last = *(std::end(kCells) - 1);
  for (const Cell cell : kCells)
    known += (cell == kCells[0] ? "" : cell == last ? " and " : ", ") + std::string(name_of(cell));
  fail("unknown cell '", name, "'; the cells are ", known);
}

// The cell that an operator is given by name, whose string is freed. Not as std::string: the conversion to that, in
// torch's headers before pytorch PR 190493, leaks the string of each call.
inline Cell take_cell(StringHandle name) {
  size_t length = 0;
  const char* text = nullptr;
  check_call(torch_string_length(name, &length));
  check_call(torch_string_c_str(name, &text));
  const std::string copied(text, length);
  check_call(torch_delete_string(name));
  return cell_of(copied);
}

inline Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Double: return Scalar::float64;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: throw std::runtime_error("the kernels take float32, float64, bfloat16 and float16");
  }
}

// What both operators take. Of an ensemble every tensor but batch_sizes has its members in front: [M, ...].
struct StackArguments {
  Cell cell;
  const Tensor& x;
  const Tensors& weights;
  const Tensor& h_0;
  const Optional& c_0;
  const Optional& batch_sizes;
  int64_t layers;
  bool ensemble = false;
};

// As an operator gets them. Before any check, so that none leaves the string behind.
inline StackArguments take_stack(StringHandle cell, const Tensor& x, const Tensors& weights, const Tensor& h_0,
                                 const Optional& c_0, const Optional& batch_sizes, int64_t layers,
                                 bool ensemble = false) {
  return {.cell = take_cell(cell),
          .x = x,
          .weights = weights,
          .h_0 = h_0,
          .c_0 = c_0,
          .batch_sizes = batch_sizes,
          .layers = layers,
          .ensemble = ensemble};
}

// What the operator of the backward pass takes besides.
struct BackwardArguments {
  const Optional& grad_y;
  const Optional& grad_h_n;
  const Optional& grad_c_n;
  const Tensor& y;
  const Tensor& saved;
};

// Where `saved` has what a layer leaves there: its blocks [N, D, K*H], and, of all layers but the last, behind them its
// y [N, D*P]. Each begins at a multiple of kAligned elements, as kernels read pairs and products are fastest so.
class SavedLayout {
 public:
  static constexpr int64_t kAligned = 64;
  static int64_t aligned(int64_t size) { return (size + kAligned - 1) / kAligned * kAligned; }
  const int64_t blocks, y;  // elements of a layer

  SavedLayout(const Layer& p, int64_t rows)
      : blocks(rows * p.directions * p.saved_blocks * p.hidden),
        y(rows * p.directions * p.projected),
        one_layer_{rows, p.directions, p.saved_blocks * p.hidden} {}

  int64_t blocks_of(int64_t layer) const { return layer * (aligned(blocks) + aligned(y)); }
  int64_t y_of(int64_t layer) const { return blocks_of(layer) + aligned(blocks); }
  Shape shape(int64_t layers) const { return layers == 1 ? one_layer_ : Shape{blocks_of(layers - 1) + blocks}; }

  // Calls gap(begin, end) for what lies between the parts, which is zeros.
  template <class Gap>
  void each_gap(int64_t layers, const Gap& gap) const {
    for (int64_t layer = 0; layer < layers - 1; layer++) {
      if (blocks % kAligned) gap(blocks_of(layer) + blocks, y_of(layer));
      if (y % kAligned) gap(y_of(layer) + y, blocks_of(layer + 1));
    }
  }

 private:
  Shape one_layer_;
};

// One direction of `count` flat weights of a stack: w_ih, w_hh, then with bias b_ih, b_hh, then with projection w_hr.
// `directions`: of all layers.
template <class T>  // Tensor or const Tensor
WeightsOf<T*> weights_of_direction(T* weights, size_t count, int directions, int direction) {
  const size_t each = count / directions;
  T* of = weights + direction * each;
  const bool bias = each >= 4, projection = each % 2;
  WeightsOf<T*> named{};
  named.w_ih = &of[0];
  named.w_hh = &of[1];
  if (bias) named.b_ih = &of[2], named.b_hh = &of[3];
  if (projection) named.w_hr = &of[each - 1];
  return named;
}

// Without, there is nothing to compute, and no gradient.
inline bool has_states(const Layer& p) { return p.sequences && (p.hidden || p.projected); }

}  // namespace seqkernels
