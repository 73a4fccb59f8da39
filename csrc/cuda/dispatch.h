// From what a layer is at run time to constants that templates take. Each calls with values whose types hold a constant,
// and returns what the call does: the text of an error, or null.
#pragma once
#include <type_traits>

#include "../layer.h"

namespace seqkernels {

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

template <class Call>
const char* by_cell(Cell cell, Call call) {
  switch (cell) {
    case Cell::rnn_tanh: return call(Constant<Cell::rnn_tanh>{});
    case Cell::rnn_relu: return call(Constant<Cell::rnn_relu>{});
    case Cell::gru: return call(Constant<Cell::gru>{});
    case Cell::lstm: return call(Constant<Cell::lstm>{});
  }
  return "no kernel for this cell";
}

template <class Call>
const char* by_scalar(Scalar scalar, Call call) {
  switch (scalar) {
    case Scalar::float64: return call(Constant<Scalar::float64>{});
    case Scalar::float32: return call(Constant<Scalar::float32>{});
    case Scalar::bfloat16: return call(Constant<Scalar::bfloat16>{});
    case Scalar::float16: return call(Constant<Scalar::float16>{});
  }
  return "no kernel for this dtype";
}

}  // namespace seqkernels
