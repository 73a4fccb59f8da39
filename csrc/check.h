// The arguments of the operators, checked: what the operators of every native backend do first. Of torch only the
// stable ABI, so that one binary serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer.h"

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

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  for (size_t i = 0; i < count; i++) text << (i ? ", " : "[") << sizes[i];
  return text.str() + (count ? "]" : "[]");
}

inline Cell cell_of(const std::string& name) {
  std::string known;
  const Cell last = *(std::end(kCells) - 1);
  for (const Cell cell : kCells) {
    if (name == name_of(cell)) return cell;
    known += (cell == kCells[0] ? "" : cell == last ? " and " : ", ") + std::string(name_of(cell));
  }
  fail("unknown cell '", name, "'; the cells are ", known);
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

// The arguments that both operators share: checked, contiguous, and kept alive as long as their pointers are used.
// `alignment`: at a multiple of so many elements. `read_sizes`: into batch_sizes that are on the CPU.
class Arguments {
 public:
  Arguments(Layer& p, const std::string& cell, const Tensor& x, const Tensors& weights, const Tensor& h_0,
            const Optional& c_0, const Optional& batch_sizes, int alignment = 1, bool read_sizes = true)
      : type_(x.scalar_type()), device_(x.device()), alignment_(alignment * x.element_size()) {
    p.cell = cell_of(cell);
    p.scalar = scalar_of(type_);
    check(x.dim() == 2, "x is [rows, input size], got ", x.dim(), " dimensions");
    check(h_0.dim() == 3, "h_0 is [directions, sequences, hidden size], got ", h_0.dim(), " dimensions");
    check(h_0.size(0) == 1 || h_0.size(0) == 2, "an RNN has one or two directions, got ", h_0.size(0));
    p.directions = static_cast<int>(h_0.size(0));
    const size_t each = weights.size() / p.directions;
    check(each * p.directions == weights.size() && each >= 2 && each <= 5,
          "a direction has w_ih, w_hh, (b_ih, b_hh), (w_hr), got ", weights.size(), " weights for ", p.directions,
          " directions");
    p.has_projection = each % 2;
    check(!p.has_projection || p.cell == Cell::lstm, "w_hr goes with an LSTM only");
    check((p.cell == Cell::lstm) == c_0.has_value(), "c_0 goes with an LSTM and only with it");
    check(weights[0].dim() == 2, "w_ih is [gates * hidden size, input size], got ", weights[0].dim(), " dimensions");
    const int64_t D = p.directions, N = x.size(0), I = p.input = x.size(1), G = gates_of(p.cell);
    const int64_t B = p.sequences = h_0.size(1), P = p.projected = h_0.size(2), GH = weights[0].size(0);
    const int64_t H = p.hidden = GH / G;
    check(H * G == GH, "w_ih has ", GH, " rows, no multiple of ", G, " gates");
    check(p.has_projection || P == H, "h_0 has ", P, " features, but the hidden size is ", H);
    p.x = check_contiguous(x, "x", {N, I});
    for (int d = 0; d < D; d++) {
      const Tensor* of = &weights[d * each];
      const bool bias = each >= 4;
      p.weights[d].w_ih = check_contiguous(of[0], "w_ih", {GH, I});
      p.weights[d].w_hh = check_contiguous(of[1], "w_hh", {GH, P});
      p.weights[d].b_ih = bias ? check_contiguous(of[2], "b_ih", {GH}) : nullptr;
      p.weights[d].b_hh = bias ? check_contiguous(of[3], "b_hh", {GH}) : nullptr;
      p.weights[d].w_hr = p.has_projection ? check_contiguous(of[each - 1], "w_hr", {P, H}) : nullptr;
    }
    p.h_0 = check_contiguous(h_0, "h_0", {D, B, P});
    p.c_0 = c_0 ? check_contiguous(*c_0, "c_0", {D, B, H}) : nullptr;
    set_steps(p, N, batch_sizes, read_sizes);
  }

  const void* check_contiguous(const Tensor& tensor, const char* name, const Shape& shape) {
    const auto sizes = tensor.sizes();
    if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin()))
      fail(name, " is ", text_of(shape.data(), shape.size()), ", got ", text_of(sizes.data(), sizes.size()));
    check(tensor.device() == device_, name, " is on another device than x");
    check(tensor.scalar_type() == type_, name, " has another dtype than x");
    const bool contiguous = tensor.is_contiguous();
    if (contiguous && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment_ == 0)
      return tensor.const_data_ptr();
    try {
      kept_.push_back(contiguous ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor));
    } catch (const std::exception&) {  // the stable ABI passes no reason on; torch has printed its own
      throw std::runtime_error(std::string("no memory for a contiguous copy of ") + name);
    }
    return kept_.back().const_data_ptr();
  }

 private:
  void set_steps(Layer& p, int64_t rows, const Optional& batch_sizes, bool read_sizes) {
    if (batch_sizes && !(read_sizes && batch_sizes->is_cpu())) {  // nobody read_sizes into them, as that would wait for the GPU
      check(
          batch_sizes->device() == device_ && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
          "batch_sizes is [steps], int64, on the CPU or where x is");
      p.steps = batch_sizes->size(0);
      p.rows = rows;
      return;
    }
    if (batch_sizes) {
      check(batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
            "batch_sizes is [steps], int64, on the CPU");
      const Tensor contiguous = torch::stable::contiguous(*batch_sizes);
      const auto* sizes = static_cast<const int64_t*>(contiguous.const_data_ptr());
      batch_sizes_.assign(sizes, sizes + contiguous.numel());
    } else {
      const int64_t steps = p.sequences ? rows / p.sequences : 0;
      check(steps * p.sequences == rows, rows, " rows are no whole number of steps of ", p.sequences, " sequences");
      batch_sizes_.assign(steps, p.sequences);
    }
    int64_t before = p.sequences;
    for (const int64_t size : batch_sizes_) {
      check(size >= 0 && size <= before, "batch_sizes must not rise, be negative, or exceed the ", p.sequences,
            " sequences of h_0");
      offsets_.push_back(p.rows);
      p.rows += size;
      before = size;
    }
    check(p.rows <= rows, "batch_sizes add up to ", p.rows, " rows, but x has ", rows);
    // Steps in which nothing runs are at the end; the kernels need not see them.
    p.steps = std::find(batch_sizes_.begin(), batch_sizes_.end(), 0) - batch_sizes_.begin();
    p.batch_sizes = batch_sizes_.data();
    p.offsets = offsets_.data();
  }

  ScalarType type_;
  torch::stable::Device device_;
  uintptr_t alignment_;
  std::vector<Tensor> kept_;
  std::vector<int64_t> batch_sizes_, offsets_;
};

}  // namespace seqkernels
