// The operators of the CPU backend: checks, allocation, sharing the work among threads. The only file that knows torch,
// and of torch only the stable ABI, so that one binary serves every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/schedule.h"

namespace {

using seqkernels::Backward;
using seqkernels::Cell;
using seqkernels::Forward;
using seqkernels::OwnSchedule;
using seqkernels::Problem;
using seqkernels::Scalar;
using seqkernels::Schedule;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

template <class... Args>
[[noreturn]] void refuse(const Args&... sentence) {
  std::ostringstream text;
  (text << ... << sentence);
  throw std::runtime_error(text.str());
}

template <class... Args>
void check(bool holds, const Args&... sentence) {
  if (!holds) refuse(sentence...);
}

std::string text_of(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  for (size_t i = 0; i < count; i++) text << (i ? ", " : "[") << sizes[i];
  return text.str() + (count ? "]" : "[]");
}

Cell cell_of(const std::string& name) {
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  if (name == "gru") return Cell::gru;
  check(name == "lstm", "unknown cell '", name, "'; the cells are rnn_tanh, rnn_relu, gru and lstm");
  return Cell::lstm;
}

Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Double: return Scalar::float64;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: throw std::runtime_error("the CPU kernels take float32, float64, bfloat16 and float16");
  }
}

// The arguments that both operators share: checked, contiguous, and kept alive as long as their pointers are used.
class Arguments {
 public:
  Arguments(Problem& p, const std::string& cell, const Tensor& x, const Tensors& weights, const Tensor& h_0,
            const Optional& c_0, const Optional& batch_sizes)
      : type_(x.scalar_type()) {
    p.cell = cell_of(cell);
    p.scalar = scalar_of(type_);
    p.bfloat16_products = seqkernels::bfloat16_products();
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
    const int64_t D = p.directions, N = x.size(0), I = p.input = x.size(1), G = seqkernels::gates_of(p.cell);
    const int64_t B = p.sequences = h_0.size(1), P = p.projected = h_0.size(2), GH = weights[0].size(0);
    const int64_t H = p.hidden = GH / G;
    check(H * G == GH, "w_ih has ", GH, " rows, no multiple of ", G, " gates");
    check(p.has_projection || P == H, "h_0 has ", P, " features, but the hidden size is ", H);
    p.x = keep(x, "x", {N, I});
    for (int d = 0; d < D; d++) {
      const Tensor* of = &weights[d * each];
      const bool bias = each >= 4;
      p.weights[d].w_ih = keep(of[0], "w_ih", {GH, I});
      p.weights[d].w_hh = keep(of[1], "w_hh", {GH, P});
      p.weights[d].b_ih = bias ? keep(of[2], "b_ih", {GH}) : nullptr;
      p.weights[d].b_hh = bias ? keep(of[3], "b_hh", {GH}) : nullptr;
      p.weights[d].w_hr = p.has_projection ? keep(of[each - 1], "w_hr", {P, H}) : nullptr;
    }
    p.h_0 = keep(h_0, "h_0", {D, B, P});
    p.c_0 = c_0 ? keep(*c_0, "c_0", {D, B, H}) : nullptr;
    set_steps(p, N, batch_sizes);
  }

  const void* keep(const Tensor& tensor, const char* name, const Shape& shape) {
    const auto sizes = tensor.sizes();
    if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin()))
      refuse(name, " is ", text_of(shape.data(), shape.size()), ", got ", text_of(sizes.data(), sizes.size()));
    check(tensor.is_cpu(), name, " is not on the CPU, where this operator runs");
    check(tensor.scalar_type() == type_, name, " has another dtype than x");
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    try {
      kept_.push_back(torch::stable::contiguous(tensor));
    } catch (const std::exception&) {  // the stable ABI passes no reason on; torch has printed its own
      throw std::runtime_error(std::string("no memory for a contiguous copy of ") + name);
    }
    return kept_.back().const_data_ptr();
  }

 private:
  void set_steps(Problem& p, int64_t rows, const Optional& batch_sizes) {
    if (batch_sizes) {
      check(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
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
  std::vector<Tensor> kept_;
  std::vector<int64_t> batch_sizes_, offsets_;
};

// For tests: all memory starts as NaN.
bool poison = false;

Tensor allocate(ScalarType type, const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poison && tensor.numel()) memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

// Working memory of one call. The block of the last call is kept for the next, as the system would clear every page of
// a large new one; blocks of more than kKept bytes are not.
class Memory {
 public:
  explicit Memory(size_t size) : block_(kept_.exchange(nullptr)) {
    if (block_ && block_->size >= size) return;
    release(block_);
    void* data = ::operator new(sizeof(Block) + size, std::align_val_t(alignof(Block)));
    block_ = new (data) Block{size};
  }
  ~Memory() { release(block_->size <= kKept ? kept_.exchange(block_) : block_); }
  Memory(const Memory&) = delete;

  void* data() { return block_ + 1; }

  static void release_kept() { release(kept_.exchange(nullptr)); }

 private:
  struct alignas(64) Block {
    size_t size;
  };
  static constexpr size_t kKept = 256 << 20;
  static inline std::atomic<Block*> kept_{nullptr};

  static void release(Block* block) {
    if (block) ::operator delete(block, std::align_val_t(alignof(Block)));
  }

  Block* block_;
};

// Run a pass over a layer on as many threads as torch uses.
template <class P>
void run(const P& p, int64_t (*bytes)(const P&, const Schedule&),
         void (*pass)(const P&, const Schedule&, int begin, int end, void* memory)) {
  const OwnSchedule schedule(p, static_cast<int>(torch::stable::get_num_threads()));
  const size_t size = static_cast<size_t>(bytes(p, schedule));
  Memory memory(size);
  if (poison) memset(memory.data(), 0xff, size);
  if (schedule.members == 1) return pass(p, schedule, 0, 1, memory.data());
  torch::stable::parallel_for(0, schedule.members, 1, [&](int64_t begin, int64_t end) {
    pass(p, schedule, static_cast<int>(begin), static_cast<int>(end), memory.data());
  });
}

// Rows that no step uses are zeros.
void zero_rows(Tensor& tensor, int64_t from) {
  if (!tensor.numel() || tensor.size(0) == from) return;
  const int64_t bytes = tensor.numel() / tensor.size(0) * static_cast<int64_t>(tensor.element_size());
  memset(static_cast<char*>(tensor.mutable_data_ptr()) + from * bytes, 0, (tensor.size(0) - from) * bytes);
}

void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_forward(std::string cell, Tensor x, Tensors weights, Tensor h_0,
                                                              Optional c_0, Optional batch_sizes, bool save) {
  Forward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes);
  const int64_t D = p.directions, K = save ? seqkernels::saved_blocks_of(p.cell) : 0;
  Tensor y = allocate(x.scalar_type(), Shape{x.size(0), D * p.projected});
  Tensor h_n = allocate(x.scalar_type(), Shape{D, p.sequences, p.projected});
  Tensor c_n = allocate(x.scalar_type(), Shape{D, p.sequences, c_0 ? p.hidden : 0});
  Tensor saved = allocate(x.scalar_type(), Shape{x.size(0), D, K * p.hidden});
  zero_rows(y, p.rows);
  zero_rows(saved, p.rows);
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.saved = pointer(saved);
  const seqkernels::Kernels& kernels = seqkernels::kernels();
  if (h_n.numel()) run(p, kernels.forward_bytes, kernels.forward);
  return {y, h_n, c_n, saved};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> recurrence_backward(std::string cell, Optional grad_y, Optional grad_h_n,
                                                                Optional grad_c_n, Tensor x, Tensors weights,
                                                                Tensor h_0, Optional c_0, Optional batch_sizes,
                                                                Tensor y, Tensor saved, bool wants_x,
                                                                bool wants_weights) {
  Backward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes);
  const int64_t D = p.directions, N = x.size(0), B = p.sequences, H = p.hidden, P = p.projected;
  p.grad_y = grad_y ? arguments.keep(*grad_y, "grad_y", {N, D * P}) : nullptr;
  p.grad_h_n = grad_h_n ? arguments.keep(*grad_h_n, "grad_h_n", {D, B, P}) : nullptr;
  p.grad_c_n = grad_c_n && c_0 ? arguments.keep(*grad_c_n, "grad_c_n", {D, B, H}) : nullptr;
  p.y = arguments.keep(y, "y", {N, D * P});
  p.saved = arguments.keep(saved, "saved", {N, D, seqkernels::saved_blocks_of(p.cell) * H});
  Tensor grad_x = allocate(x.scalar_type(), wants_x ? Shape{N, p.input} : Shape{0});
  Tensor grad_h_0 = allocate(x.scalar_type(), Shape{D, B, P});
  Tensor grad_c_0 = allocate(x.scalar_type(), Shape{D, B, c_0 ? H : 0});
  Tensors grad_weights;
  for (const Tensor& weight : weights) {
    const auto sizes = weight.sizes();
    grad_weights.push_back(allocate(x.scalar_type(), wants_weights ? Shape(sizes.begin(), sizes.end()) : Shape{0}));
    if (!p.rows) zero_rows(grad_weights.back(), 0);  // and nothing more is asked of the kernel
  }
  if (wants_x) zero_rows(grad_x, p.rows);
  p.grad_x = pointer(grad_x);
  const size_t each = weights.size() / D;
  for (int d = 0; p.rows && d < D; d++) {
    Tensor* of = &grad_weights[d * each];
    const bool bias = each >= 4;
    p.grad_weights[d] = {pointer(of[0]), pointer(of[1]), bias ? pointer(of[2]) : nullptr,
                         bias ? pointer(of[3]) : nullptr, p.has_projection ? pointer(of[each - 1]) : nullptr};
  }
  p.grad_h_0 = pointer(grad_h_0);
  p.grad_c_0 = pointer(grad_c_0);
  const seqkernels::Kernels& kernels = seqkernels::kernels();
  if (grad_h_0.numel()) run(p, kernels.backward_bytes, kernels.backward);
  return {grad_x, grad_weights, grad_h_0, grad_c_0};
}

}  // namespace

// The schemas are those of seqkernels/ops.py, where every argument is explained.
STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def(
      "recurrence_forward.cpu(str cell, Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, "
      "bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "recurrence_backward.cpu(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, "
      "Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved, bool wants_x, "
      "bool wants_weights) -> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, Tensor grad_c_0)");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  m.impl("recurrence_forward.cpu", TORCH_BOX(&recurrence_forward));
  m.impl("recurrence_backward.cpu", TORCH_BOX(&recurrence_backward));
}

// The Python module seqkernels._C: importing it registers the operators above.

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(seqkernels::kernels_name()); }

static PyObject* force_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string wanted = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  if (!seqkernels::force_kernels(wanted.c_str()))
    return PyErr_Format(PyExc_ValueError, "'%s' does not run here; built: %s", wanted.c_str(),
                        seqkernels::built_kernels());
  Py_RETURN_NONE;
}

static PyObject* fill_memory(PyObject*, PyObject* with_nan) {
  poison = PyObject_IsTrue(with_nan);
  Py_RETURN_NONE;
}

static PyObject* release_memory(PyObject*, PyObject*) {
  Memory::release_kept();
  Py_RETURN_NONE;
}

static PyObject* peak_gflops(PyObject*, PyObject*) {
  const int64_t threads = torch::stable::get_num_threads();
  double best = 0;
  for (int run = 0; run < 10; run++) {
    std::vector<double> operations(threads);
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) operations[i] = seqkernels::kernels().multiply_and_add(1000000);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, std::accumulate(operations.begin(), operations.end(), 0.0) / seconds.count() / 1e9);
  }
  return PyFloat_FromDouble(best);
}

static PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  return PyUnicode_FromFormat("built for %s by Clang %s", seqkernels::built_kernels(), __clang_version__);
#else
  return PyUnicode_FromFormat("built for %s by GCC %s", seqkernels::built_kernels(), __VERSION__);
#endif
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"force_isa", force_isa, METH_O, "Use another instruction set (for tests). ValueError if it does not run here."},
    {"fill_memory", fill_memory, METH_O, "Fill outputs and working memory with NaN beforehand (for tests)."},
    {"release_memory", release_memory, METH_NOARGS, "Give the working memory kept for the next call back."},
    {"peak_gflops", peak_gflops, METH_NOARGS,
     "Float multiplications and additions a second at best, by torch's threads."},
    {"build_info", build_info, METH_NOARGS, "What was built, and by which compiler."},
    {nullptr, nullptr, 0, nullptr},
};

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
