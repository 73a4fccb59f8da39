// Torch's tensors, of which native code takes the stable ABI only, so that one binary serves every torch from 2.10 on;
// and how errors are raised.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace seqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

template <class... Args>
[[noreturn]] void fail(const Args&... sentence) {
  std::ostringstream text;
  (text << ... << sentence);
  throw std::runtime_error(text.str());
}

template <class... Args>
void check(bool holds, const Args&... sentence) {
  if (!holds) fail(sentence...);
}

// A function of torch's C interface went well.
inline void check_call(AOTITorchError error) { check(error == AOTI_TORCH_SUCCESS, "an internal call of torch failed"); }

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  for (size_t i = 0; i < count; i++) text << (i ? ", " : "[") << sizes[i];
  return text.str() + (count ? "]" : "[]");
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return strides;
}

}  // namespace seqkernels
