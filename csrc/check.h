// The arguments of the operators, checked: what the operators of every native backend do first.
#pragma once
#include <type_traits>

#include "arguments.h"

namespace seqkernels {

struct CheckOptions {
  int alignment = 1;       // of every address: a multiple of so many elements
  bool read_sizes = true;  // into batch_sizes that are on the CPU
  int64_t sequences = -1;  // of pieces [T, B]; -1: as many as states, or what batch_sizes say

  CheckOptions with(const Optional& pieces, const Optional& batch_sizes) const {
    CheckOptions options = *this;
    if (!pieces || batch_sizes) return options;
    check(pieces->dim() == 2, "pieces go with batch_sizes, or are [steps, sequences]");
    options.sequences = pieces->size(1);
    return options;
  }
};

// An argument of every member of an ensemble, `stride` bytes from one to the next: 0 where they share it.
struct MemberArray {
  const void* data = nullptr;
  int64_t stride = 0;

  const void* of(int64_t member) const { return data ? static_cast<const char*>(data) + member * stride : nullptr; }
};

// A storage can be freed or shrunk below its tensors, as FSDP does with weights that other processes hold. That of
// torch's own zeros, a tangent say, has no memory at all.
inline void check_storage(const Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t reached = tensor.storage_offset() + 1, available = 0;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (!sizes[i]) return;
    reached += (sizes[i] - 1) * strides[i];
  }
  check_call(aoti_torch_get_storage_size(tensor.get(), &available));
  const int64_t needed = reached * static_cast<int64_t>(tensor.element_size());
  if (needed > available)  // no check(): its sentence would cost every call more than all checks
    fail(name, ": sizes ", text_of(sizes.data(), sizes.size()), " and strides ",
         text_of(strides.data(), strides.size()), " requiring a storage size of ", needed,
         " are out of bounds for storage of size ", available);
  check(tensor.const_data_ptr(), name, " has no memory");
}

// Checks the arguments of a stack, or of all stacks of an ensemble; fills one layer after another with pointers to
// them, and keeps contiguous copies alive as long as these are used.
class CheckedArguments {
 public:
  // `p` has what all layers have in common, and the arguments of the first one, of the first member.
  CheckedArguments(Layer& p, const StackArguments& arguments, CheckOptions options = {})
      : type_(arguments.x.scalar_type()),
        element_size_(arguments.x.element_size()),
        device_(arguments.x.device()),
        layers_(arguments.layers),
        ensemble_(arguments.ensemble),
        alignment_(options.alignment * element_size_),
        has_c_(arguments.c_0.has_value()) {
    p.cell = arguments.cell;
    p.scalar = scalar_of(type_);
    p.saved_blocks = saved_blocks_of(p.cell);
    set_sizes(p, arguments);
    set_arrays(p, arguments);
    if (options.sequences >= 0) p.sequences = options.sequences;
    set_steps(p, rows_, arguments.batch_sizes, options.read_sizes);
  }

  void set_backward(LayerBackward& p, const BackwardArguments& arguments) {
    const int64_t D = p.directions, N = rows_, C = p.states, H = p.hidden, P = p.projected, L = layers_;
    const auto optional = [&](const Optional& tensor, const char* name, const Shape& shape) {
      return tensor ? check_contiguous(*tensor, name, shape) : MemberArray{};
    };
    grad_y_ = optional(arguments.grad_y, "grad_y", {N, D * P});
    grad_h_n_ = optional(arguments.grad_h_n, "grad_h_n", {L * D, C, P});
    check(has_c_ || !arguments.grad_c_n || !arguments.grad_c_n->numel(), "grad_c_n goes with an LSTM only");
    grad_c_n_ = has_c_ ? optional(arguments.grad_c_n, "grad_c_n", {L * D, C, H}) : MemberArray{};
    y_ = check_contiguous(arguments.y, "y", {N, D * P});
    saved_ = check_contiguous(arguments.saved, "saved", SavedLayout(p, N).shape(L));
    p.grad_y = grad_y_.of(0);
    set_layer_backward(p, 0);
  }

  // Sequences that consist of pieces, of which the states in h_0 are. None comes twice, so that no two threads write
  // the same one. Members of an ensemble share them.
  void set_pieces(Layer& p, const Optional& pieces) {
    if (!pieces) return;
    check(pieces->is_cpu() && pieces->scalar_type() == ScalarType::Long && pieces->numel() == rows_,
          "pieces is [rows], int64, on the CPU, one for each of the ", rows_, " rows of x");
    take_pieces(p, *pieces);
    std::vector<char> begun(p.states);
    states_used_ = 0;
    for (int64_t t = 0; t < p.steps; t++)
      for (int64_t b = 0; b < p.batch_sizes[t]; b++) {
        const int64_t piece = p.pieces[p.offsets[t] + b];
        if (t && piece == p.pieces[p.offsets[t - 1] + b]) continue;
        check(piece >= 0 && piece < p.states, "pieces are numbers of the ", p.states, " states of h_0, got ", piece);
        check(!begun[piece], "the rows of piece ", piece, " do not follow each other in one sequence");
        begun[piece] = true;
        states_used_++;
      }
  }

  // The same of pieces whose numbers fit, where nobody reads them.
  void set_pieces_unread(Layer& p, const Tensor& pieces) {
    check(p.batch_sizes || !p.steps, "pieces go with batch_sizes on the CPU");
    check(pieces.scalar_type() == ScalarType::Long && pieces.numel() == rows_ && pieces.device() == device_,
          "pieces is [rows], int64, where x is, one for each of the ", rows_, " rows of x");
    take_pieces(p, pieces);
  }

  int64_t layers() const { return layers_; }
  int64_t members() const { return members_; }  // 1 where there is no ensemble
  int64_t rows() const { return rows_; }        // of x; steps may use fewer
  // Of the states in h_0: those that a row has. The others stay as they are.
  int64_t states_used() const { return states_used_; }

  // A shape of each member as that of all.
  Shape of_all(Shape shape) const {
    if (ensemble_) shape.insert(shape.begin(), members_);
    return shape;
  }

  // Another layer, of a member. `x`: its input, but for the first, whose input is an argument.
  void set_layer(Layer& p, int64_t layer, const void* x, int64_t member = 0) const {
    p.x = layer ? x : x_.of(member);
    p.input = layer ? p.directions * p.projected : input_;
    for (int d = 0; d < p.directions; d++) {
      const WeightsOf<MemberArray>& w = weights_[layer * p.directions + d];
      p.weights[d] = {.w_ih = w.w_ih.of(member),
                      .w_hh = w.w_hh.of(member),
                      .b_ih = w.b_ih.of(member),
                      .b_hh = w.b_hh.of(member),
                      .w_hr = w.w_hr.of(member)};
    }
    p.h_0 = at(h_0_.of(member), layer * p.directions * p.states * p.projected);
    p.c_0 = at(c_0_.of(member), layer * p.directions * p.states * p.hidden);
  }

  // Another layer on the way back, of a member; but for the gradient of its y, which is an argument of the last alone.
  void set_layer_backward(LayerBackward& p, int64_t layer, int64_t member = 0) const {
    const SavedLayout layout(p, rows_);
    const void* saved = saved_.of(member);
    set_layer(p, layer, layer ? at(saved, layout.y_of(layer - 1)) : nullptr, member);
    if (layer == layers_ - 1) p.grad_y = grad_y_.of(member);
    p.grad_h_n = at(grad_h_n_.of(member), layer * p.directions * p.states * p.projected);
    p.grad_c_n = at(grad_c_n_.of(member), layer * p.directions * p.states * p.hidden);
    p.y = layer == layers_ - 1 ? y_.of(member) : at(saved, layout.y_of(layer));
    p.saved = at(saved, layout.blocks_of(layer));
  }

  // Element `i` of an array, if there is one.
  template <class Pointer>  // void* or const void*
  Pointer at(Pointer data, int64_t i) const {
    using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char*, const char*>;
    return data ? static_cast<Byte>(data) + i * element_size_ : nullptr;
  }

 protected:
  // For an operator of other arguments, which checks them with what stands below.
  explicit CheckedArguments(const Tensor& x)
      : type_(x.scalar_type()),
        element_size_(x.element_size()),
        device_(x.device()),
        layers_(1),
        ensemble_(false),
        alignment_(element_size_),
        has_c_(false) {}

 private:
  void take_pieces(Layer& p, const Tensor& pieces) {
    check_storage(pieces, "pieces");
    copies_.push_back(torch::stable::contiguous(pieces));
    p.pieces = static_cast<const int64_t*>(copies_.back().const_data_ptr());
    p.sequences = p.steps ? p.batch_sizes[0] : 0;
  }

  void set_sizes(Layer& p, const StackArguments& arguments) {
    const auto& [cell, x, weights, h_0, c_0, batch_sizes, layers, ensemble] = arguments;
    const int first = ensemble;  // dimension of a member
    const char* members = ensemble ? "members, " : "";
    check(x.dim() == first + 2, "x is [", members, "rows, input size], got ", x.dim(), " dimensions");
    check(h_0.dim() == first + 3, "h_0 is [", members, "directions, sequences, hidden size], got ", h_0.dim(),
          " dimensions");
    members_ = ensemble ? x.size(0) : 1;
    const int64_t all = h_0.size(first), directions = layers > 0 ? all / layers : 0;  // all: directions of all layers
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
    check(weights[0].dim() == first + 2, "w_ih is [", members, "gates * hidden size, input size], got ",
          weights[0].dim(), " dimensions");
    const int64_t gates = gates_of(p.cell), rows = weights[0].size(first);
    rows_ = x.size(first);
    p.input = input_ = x.size(first + 1);
    p.sequences = p.states = h_0.size(first + 1);
    p.projected = h_0.size(first + 2);
    p.hidden = rows / gates;
    check(p.hidden * gates == rows, "w_ih has ", rows, " rows, no multiple of ", gates, " gates");
    check(p.has_projection || p.projected == p.hidden, "h_0 has ", p.projected, " features, but the hidden size is ",
          p.hidden);
  }

  void set_arrays(Layer& p, const StackArguments& arguments) {
    const int64_t C = p.states, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
    const int all = static_cast<int>(layers_) * p.directions;
    x_ = check_contiguous(arguments.x, "x", {rows_, p.input});
    for (int d = 0; d < all; d++) {
      const auto of = weights_of_direction(arguments.weights.data(), arguments.weights.size(), all, d);
      WeightsOf<MemberArray> w{};
      w.w_ih = check_contiguous(*of.w_ih, "w_ih", {GH, d < p.directions ? p.input : p.directions * P});
      w.w_hh = check_contiguous(*of.w_hh, "w_hh", {GH, P});
      if (of.b_ih) w.b_ih = check_contiguous(*of.b_ih, "b_ih", {GH});
      if (of.b_hh) w.b_hh = check_contiguous(*of.b_hh, "b_hh", {GH});
      if (of.w_hr) w.w_hr = check_contiguous(*of.w_hr, "w_hr", {P, H});
      weights_.push_back(w);
    }
    h_0_ = check_contiguous(arguments.h_0, "h_0", {all, C, P});
    if (arguments.c_0) c_0_ = check_contiguous(*arguments.c_0, "c_0", {all, C, H});
    set_layer(p, 0, nullptr);
  }

 protected:
  MemberArray check_contiguous(const Tensor& tensor, const char* name, const Shape& of_member) {
    return check_contiguous(tensor, name, of_member, type_);
  }

  // Of another type than x.
  MemberArray check_contiguous(const Tensor& tensor, const char* name, const Shape& of_member, ScalarType type) {
    const Shape shape = of_all(of_member);
    const auto sizes = tensor.sizes();
    if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin()))
      fail(name, " is ", text_of(shape.data(), shape.size()), ", got ", text_of(sizes.data(), sizes.size()));
    check(tensor.device() == device_, name, " is on another device than x");
    check(tensor.scalar_type() == type, name, type == type_ ? " has another dtype than x" : " has another dtype");
    check_storage(tensor, name);
    const int64_t stride = ensemble_ ? tensor.stride(0) * element_size_ : 0;
    const bool contiguous = ensemble_ ? members_are_contiguous(tensor, of_member) : tensor.is_contiguous();
    if (contiguous && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment_ == 0)
      return {tensor.const_data_ptr(), stride};
    const bool shared = ensemble_ && members_ && !stride;
    try {
      const Tensor from = shared ? torch::stable::select(tensor, 0, 0) : tensor;
      copies_.push_back(contiguous ? torch::stable::clone(from) : torch::stable::contiguous(from));
    } catch (const std::exception&) {  // the stable ABI passes no reason on; torch has printed its own
      throw std::runtime_error(std::string("no memory for a contiguous copy of ") + name);
    }
    const int64_t elements = shared || !members_ ? 0 : copies_.back().numel() / members_;
    return {copies_.back().const_data_ptr(), elements * element_size_};
  }

 private:
  // Whatever lies between the members.
  static bool members_are_contiguous(const Tensor& tensor, const Shape& of_member) {
    const Shape strides = contiguous_strides(of_member);
    for (size_t i = 0; i < strides.size(); i++)
      if (of_member[i] > 1 && tensor.stride(i + 1) != strides[i]) return !tensor.numel();
    return true;
  }

 protected:
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
    states_used_ = p.steps ? batch_sizes_[0] : 0;
    p.batch_sizes = batch_sizes_.data();
    p.offsets = offsets_.data();
  }

 private:
  ScalarType type_;
  int64_t element_size_;
  torch::stable::Device device_;
  int64_t layers_;
  bool ensemble_;
  uintptr_t alignment_;
  bool has_c_;
  int64_t members_ = 1;
  int64_t rows_ = 0;
  int64_t input_ = 0;
  int64_t states_used_ = 0;
  // Of all layers.
  std::vector<WeightsOf<MemberArray>> weights_;  // [L*D]
  MemberArray x_, h_0_, c_0_, grad_y_, grad_h_n_, grad_c_n_, y_, saved_;
  std::vector<Tensor> copies_;
  std::vector<int64_t> batch_sizes_, offsets_;
};

}  // namespace seqkernels
