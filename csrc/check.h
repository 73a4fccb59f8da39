// The arguments of the operators, checked: what the operators of every native backend do first.
#pragma once
#include <iterator>
#include <type_traits>

#include "layer.h"
#include "tensors.h"

namespace seqkernels {

inline Cell cell_of(const std::string& name) {
  std::string known;
  const Cell last = *(std::end(kCells) - 1);
  for (const Cell cell : kCells) {
    if (name == name_of(cell)) return cell;
    known += (cell == kCells[0] ? "" : cell == last ? " and " : ", ") + std::string(name_of(cell));
  }
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

// What both operators take.
struct StackArguments {
  Cell cell;
  const Tensor& x;
  const Tensors& weights;
  const Tensor& h_0;
  const Optional& c_0;
  const Optional& batch_sizes;
  int64_t layers;
};

// What the operator of the backward pass takes besides.
struct BackwardArguments {
  const Optional& grad_y;
  const Optional& grad_h_n;
  const Optional& grad_c_n;
  const Tensor& y;
  const Tensor& saved;
};

struct CheckOptions {
  int alignment = 1;       // of every address: a multiple of so many elements
  bool read_sizes = true;  // into batch_sizes that are on the CPU
};

// Where `saved` has what a layer leaves there: its blocks [N, D, K*H], and, of all layers but the last, behind them its
// y [N, D*P]. Each begins at a multiple of kAligned elements, as kernels read pairs and products are fastest so.
class SavedLayout {
 public:
  static constexpr int64_t kAligned = 64;
  static int64_t aligned(int64_t size) { return (size + kAligned - 1) / kAligned * kAligned; }
  const int64_t blocks, y;  // elements of a layer

  SavedLayout(const Layer& p, int64_t rows)
      : blocks(rows * p.directions * saved_blocks_of(p.cell) * p.hidden),
        y(rows * p.directions * p.projected),
        one_layer_{rows, p.directions, saved_blocks_of(p.cell) * p.hidden} {}

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

// Checks the arguments of a stack, fills one layer after another with pointers to them, and keeps contiguous copies
// alive as long as these are used.
class CheckedArguments {
 public:
  // `p` has what all layers have in common, and the arguments of the first one.
  CheckedArguments(Layer& p, const StackArguments& arguments, CheckOptions options = {})
      : type_(arguments.x.scalar_type()),
        element_size_(arguments.x.element_size()),
        device_(arguments.x.device()),
        layers_(arguments.layers),
        alignment_(options.alignment * element_size_),
        has_c_(arguments.c_0.has_value()) {
    p.cell = arguments.cell;
    p.scalar = scalar_of(type_);
    set_sizes(p, arguments);
    set_arrays(p, arguments);
    set_steps(p, arguments.x.size(0), arguments.batch_sizes, options.read_sizes);
  }

  void set_backward(LayerBackward& p, const BackwardArguments& arguments) {
    const int64_t D = p.directions, N = rows_, B = p.sequences, H = p.hidden, P = p.projected, L = layers_;
    const auto optional = [&](const Optional& tensor, const char* name, const Shape& shape) {
      return tensor ? check_contiguous(*tensor, name, shape) : nullptr;
    };
    p.grad_y = optional(arguments.grad_y, "grad_y", {N, D * P});
    grad_h_n_ = optional(arguments.grad_h_n, "grad_h_n", {L * D, B, P});
    check(has_c_ || !arguments.grad_c_n || !arguments.grad_c_n->numel(), "grad_c_n goes with an LSTM only");
    grad_c_n_ = has_c_ ? optional(arguments.grad_c_n, "grad_c_n", {L * D, B, H}) : nullptr;
    y_ = check_contiguous(arguments.y, "y", {N, D * P});
    saved_ = check_contiguous(arguments.saved, "saved", SavedLayout(p, N).shape(L));
    set_layer_backward(p, 0);
  }

  int64_t layers() const { return layers_; }

  // Another layer, whose input is `x`.
  void set_layer(Layer& p, int64_t layer, const void* x) const {
    p.x = x;
    p.input = layer ? p.directions * p.projected : input_;
    std::copy_n(weights_.begin() + layer * p.directions, p.directions, p.weights);
    p.h_0 = at(h_0_, layer * p.directions * p.sequences * p.projected);
    p.c_0 = at(c_0_, layer * p.directions * p.sequences * p.hidden);
  }

  // Another layer on the way back, but for the gradient of its y.
  void set_layer_backward(LayerBackward& p, int64_t layer) const {
    const SavedLayout layout(p, rows_);
    set_layer(p, layer, layer ? at(saved_, layout.y_of(layer - 1)) : x_);
    p.grad_h_n = at(grad_h_n_, layer * p.directions * p.sequences * p.projected);
    p.grad_c_n = at(grad_c_n_, layer * p.directions * p.sequences * p.hidden);
    p.y = layer == layers_ - 1 ? y_ : at(saved_, layout.y_of(layer));
    p.saved = at(saved_, layout.blocks_of(layer));
  }

  // Element `i` of an array, if there is one.
  template <class Pointer>  // void* or const void*
  Pointer at(Pointer data, int64_t i) const {
    using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char*, const char*>;
    return data ? static_cast<Byte>(data) + i * element_size_ : nullptr;
  }

 private:
  void set_sizes(Layer& p, const StackArguments& arguments) {
    const auto& [cell, x, weights, h_0, c_0, batch_sizes, layers] = arguments;
    check(x.dim() == 2, "x is [rows, input size], got ", x.dim(), " dimensions");
    check(h_0.dim() == 3, "h_0 is [directions, sequences, hidden size], got ", h_0.dim(), " dimensions");
    const int64_t all = h_0.size(0), directions = layers > 0 ? all / layers : 0;  // all: directions of all layers
    check(layers > 0 && directions * layers == all, "h_0 has ", all, " states for ", layers, " layers");
    check(directions == 1 || directions == 2, "an RNN has one or two directions, got ", directions);
    p.directions = static_cast<int>(directions);
    const size_t each = weights.size() / all;
    check(each * all == weights.size() && each >= 2 && each <= 5,
          "a direction has w_ih, w_hh, (b_ih, b_hh), (w_hr), got ", weights.size(), " weights for ", all,
          " directions");
    p.has_projection = each % 2;
    check(!p.has_projection || can_project(p.cell), "w_hr goes with an LSTM only");
    check((states_of(p.cell) == 2) == c_0.has_value(), "c_0 goes with an LSTM and only with it");
    check(weights[0].dim() == 2, "w_ih is [gates * hidden size, input size], got ", weights[0].dim(), " dimensions");
    const int64_t gates = gates_of(p.cell), rows = weights[0].size(0);
    rows_ = x.size(0);
    p.input = input_ = x.size(1);
    p.sequences = h_0.size(1);
    p.projected = h_0.size(2);
    p.hidden = rows / gates;
    check(p.hidden * gates == rows, "w_ih has ", rows, " rows, no multiple of ", gates, " gates");
    check(p.has_projection || p.projected == p.hidden, "h_0 has ", p.projected, " features, but the hidden size is ",
          p.hidden);
  }

  void set_arrays(Layer& p, const StackArguments& arguments) {
    const int64_t B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
    const int all = static_cast<int>(layers_) * p.directions;
    x_ = check_contiguous(arguments.x, "x", {rows_, p.input});
    for (int d = 0; d < all; d++) {
      const auto of = weights_of_direction(arguments.weights.data(), arguments.weights.size(), all, d);
      WeightsOf<const void*> w{};
      w.w_ih = check_contiguous(*of.w_ih, "w_ih", {GH, d < p.directions ? p.input : p.directions * P});
      w.w_hh = check_contiguous(*of.w_hh, "w_hh", {GH, P});
      w.b_ih = of.b_ih ? check_contiguous(*of.b_ih, "b_ih", {GH}) : nullptr;
      w.b_hh = of.b_hh ? check_contiguous(*of.b_hh, "b_hh", {GH}) : nullptr;
      w.w_hr = of.w_hr ? check_contiguous(*of.w_hr, "w_hr", {P, H}) : nullptr;
      weights_.push_back(w);
    }
    h_0_ = check_contiguous(arguments.h_0, "h_0", {all, B, P});
    c_0_ = arguments.c_0 ? check_contiguous(*arguments.c_0, "c_0", {all, B, H}) : nullptr;
    set_layer(p, 0, x_);
  }

  const void* check_contiguous(const Tensor& tensor, const char* name, const Shape& shape) {
    const auto sizes = tensor.sizes();
    if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin()))
      fail(name, " is ", text_of(shape.data(), shape.size()), ", got ", text_of(sizes.data(), sizes.size()));
    check(tensor.device() == device_, name, " is on another device than x");
    check(tensor.scalar_type() == type_, name, " has another dtype than x");
    check_storage(tensor, name);
    const bool contiguous = tensor.is_contiguous();
    if (contiguous && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment_ == 0)
      return tensor.const_data_ptr();
    try {
      copies_.push_back(contiguous ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor));
    } catch (const std::exception&) {  // the stable ABI passes no reason on; torch has printed its own
      throw std::runtime_error(std::string("no memory for a contiguous copy of ") + name);
    }
    return copies_.back().const_data_ptr();
  }

  // A storage can be freed or shrunk below its tensors, as FSDP does with weights that other processes hold.
  void check_storage(const Tensor& tensor, const char* name) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t reached = tensor.storage_offset() + 1, available = 0;
    for (size_t i = 0; i < sizes.size(); i++) {
      if (!sizes[i]) return;
      reached += (sizes[i] - 1) * strides[i];
    }
    check_call(aoti_torch_get_storage_size(tensor.get(), &available));
    const int64_t needed = reached * static_cast<int64_t>(tensor.element_size());
    check(needed <= available, name, ": sizes ", text_of(sizes.data(), sizes.size()), " and strides ",
          text_of(strides.data(), strides.size()), " requiring a storage size of ", needed,
          " are out of bounds for storage of size ", available);
  }

  void set_steps(Layer& p, int64_t rows, const Optional& batch_sizes, bool read_sizes) {
    if (batch_sizes && !(read_sizes && batch_sizes->is_cpu())) {  // reading them would wait for the GPU
      check(
          batch_sizes->device() == device_ && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
          "batch_sizes is [steps], int64, on the CPU or where x is");
      check_storage(*batch_sizes, "batch_sizes");
      p.steps = batch_sizes->size(0);
      p.rows = rows;
      return;
    }
    if (batch_sizes) {
      check(batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
            "batch_sizes is [steps], int64, on the CPU");
      check_storage(*batch_sizes, "batch_sizes");
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
  int64_t element_size_;
  torch::stable::Device device_;
  int64_t layers_;
  uintptr_t alignment_;
  bool has_c_;
  int64_t rows_ = 0;  // of x; steps may use fewer
  int64_t input_ = 0;
  // Of all layers.
  std::vector<WeightsOf<const void*>> weights_;  // [L*D]
  const void *x_ = nullptr, *h_0_ = nullptr, *c_0_ = nullptr;
  const void *grad_h_n_ = nullptr, *grad_c_n_ = nullptr, *y_ = nullptr, *saved_ = nullptr;
  std::vector<Tensor> copies_;
  std::vector<int64_t> batch_sizes_, offsets_;
};

}  // namespace seqkernels
