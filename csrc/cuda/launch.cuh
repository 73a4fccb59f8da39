// From what a layer is when the program runs to the types that its kernels are made of. Each calls with values that
// stand for types or constants, and returns what the call does: the text of an error, or null.
#pragma once
#include "mma.cuh"

namespace seqkernels::device {

// Call with a number of the scalar's type.
template <class Call>
const char* by_scalar(Scalar scalar, Call call) {
  switch (scalar) {
    case Scalar::float64: return call(double{});
    case Scalar::float32: return call(float{});
    case Scalar::bfloat16: return call(bfloat16{});
    default: return call(float16{});
  }
}

template <Cell CELL>
using OfCell = std::integral_constant<Cell, CELL>;

// Call with the cell as a constant.
template <class Call>
const char* by_cell(Cell cell, Call call) {
  switch (cell) {
    case Cell::rnn_tanh: return call(OfCell<Cell::rnn_tanh>{});
    case Cell::rnn_relu: return call(OfCell<Cell::rnn_relu>{});
    case Cell::gru: return call(OfCell<Cell::gru>{});
    case Cell::lstm: return call(OfCell<Cell::lstm>{});
    default: return "there is no CUDA kernel for this cell";
  }
}

// Call with how blocks that keep the weights multiply by them; none do in float64, which callers refuse before.
template <class Call>
const char* by_product(const SweepArgs& s, Call call) {
  switch (s.scalar) {
    case Scalar::bfloat16: return call(MatrixCores<bfloat16>{});
    case Scalar::float16: return call(MatrixCores<float16>{});
    default: return s.tf32 ? call(Tf32{}) : call(Exact{});
  }
}

}  // namespace seqkernels::device
