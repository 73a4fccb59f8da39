// From values at run time to constants that templates take (for a cell: with_cell() in cells.h). All call with values
// whose types hold a constant, and return what the call does: the text of an error, or null.
#pragma once
#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "config.h"

namespace seqkernels {

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

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

template <class Call>
const char* by_arch(Arch arch, Call call) {
  switch (arch) {
    case Arch::sm_80: return call(Constant<Arch::sm_80>{});
    case Arch::sm_90: return call(Constant<Arch::sm_90>{});
  }
  return "no kernel for this architecture";
}

// Whether a layer has an even number of units.
template <class Call>
const char* by_even(int64_t hidden, Call call) {
  return hidden % 2 ? call(Constant<false>{}) : call(Constant<true>{});
}

// By a value that may be one of VALUES, or else returns `otherwise`.
template <const auto& VALUES, class Call, std::size_t... I>
const char* by_value(int value, const char* otherwise, Call call, std::index_sequence<I...>) {
  const char* result = otherwise;
  (void)((value == VALUES[I] && (result = call(Constant<VALUES[I]>{}), true)) || ...);
  return result;
}
template <const auto& VALUES, class Call>
const char* by_value(int value, const char* otherwise, Call call) {
  return by_value<VALUES>(value, otherwise, call, std::make_index_sequence<std::size(VALUES)>{});
}

}  // namespace seqkernels
