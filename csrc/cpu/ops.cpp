// The operators of the CPU backend: checks, allocation, sharing the work among threads.
#include <Python.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <numeric>
#include <tuple>

#include "../check.h"
#include "isa.h"
#include "schedule.h"

namespace {

using namespace seqkernels;

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
  LayerForward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes);
  check(p.cell != Cell::ligru, "there is no CPU kernel for this cell");
  p.bfloat16_products = bfloat16_products();
  const int64_t D = p.directions, K = save ? saved_blocks_of(p.cell) : 0;
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
  const Kernels& kernels = seqkernels::kernels();
  if (h_n.numel()) run(p, kernels.forward_bytes, kernels.forward);
  return {y, h_n, c_n, saved};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> recurrence_backward(std::string cell, Optional grad_y, Optional grad_h_n,
                                                                Optional grad_c_n, Tensor x, Tensors weights,
                                                                Tensor h_0, Optional c_0, Optional batch_sizes,
                                                                Tensor y, Tensor saved, bool wants_x,
                                                                bool wants_weights) {
  LayerBackward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes);
  check(p.cell != Cell::ligru, "there is no CPU kernel for this cell");
  p.bfloat16_products = bfloat16_products();
  const int64_t D = p.directions, N = x.size(0), B = p.sequences, H = p.hidden, P = p.projected;
  p.grad_y = grad_y ? arguments.check_contiguous(*grad_y, "grad_y", {N, D * P}) : nullptr;
  p.grad_h_n = grad_h_n ? arguments.check_contiguous(*grad_h_n, "grad_h_n", {D, B, P}) : nullptr;
  p.grad_c_n = grad_c_n && c_0 ? arguments.check_contiguous(*grad_c_n, "grad_c_n", {D, B, H}) : nullptr;
  p.y = arguments.check_contiguous(y, "y", {N, D * P});
  p.saved = arguments.check_contiguous(saved, "saved", {N, D, saved_blocks_of(p.cell) * H});
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
  const Kernels& kernels = seqkernels::kernels();
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
