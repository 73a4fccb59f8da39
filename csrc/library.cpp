// The operators of the CPU backend: checks, allocation, sharing the work among threads. The only file that knows torch,
// and of torch only the stable ABI, so that one binary serves every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace {

using seqkernels::Backward;
using seqkernels::Cell;
using seqkernels::Forward;
using seqkernels::Problem;
using seqkernels::Scalar;
using seqkernels::Task;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

template <class... Args>
void check(bool holds, const Args&... sentence) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << sentence);
  throw std::runtime_error(text.str());
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
  Arguments(Problem& p, const std::string& cell, const Tensor& gates_x, const Tensor& w_hh, const Optional& b_hh,
            const Optional& w_hr, const Tensor& h_0, const Optional& c_0, const Optional& batch_sizes)
      : type_(gates_x.scalar_type()) {
    p.cell = cell_of(cell);
    p.scalar = scalar_of(type_);
    const int64_t G = seqkernels::gates_of(p.cell);
    check(gates_x.dim() == 3 && gates_x.size(2) % G == 0, "gates_x is [rows, directions, gates * hidden size], got ",
          text_of(gates_x.sizes().data(), gates_x.sizes().size()));
    check(h_0.dim() == 3, "h_0 is [directions, sequences, hidden size], got ", h_0.dim(), " dimensions");
    check(gates_x.size(1) == 1 || gates_x.size(1) == 2, "an RNN has one or two directions, got ", gates_x.size(1));
    p.rows = gates_x.size(0);
    p.directions = static_cast<int>(gates_x.size(1));
    p.hidden = gates_x.size(2) / G;
    p.sequences = h_0.size(1);
    p.projected = h_0.size(2);
    p.has_projection = w_hr.has_value();
    const int64_t D = p.directions, H = p.hidden, P = p.projected, B = p.sequences;
    check((p.cell == Cell::lstm) == c_0.has_value(), "c_0 goes with an LSTM and only with it");
    check(!b_hh || p.cell == Cell::gru, "b_hh goes with a GRU only");
    check(!w_hr || p.cell == Cell::lstm, "w_hr goes with an LSTM only");
    check(w_hr || P == H, "h_0 has ", P, " features, but the hidden size is ", H);
    check_one(gates_x, "gates_x", {p.rows, D, G * H});
    p.w_hh = keep(w_hh, "w_hh", {D, G * H, P});
    p.b_hh = b_hh ? keep(*b_hh, "b_hh", {D, G * H}) : nullptr;
    p.w_hr = w_hr ? keep(*w_hr, "w_hr", {D, P, H}) : nullptr;
    p.h_0 = keep(h_0, "h_0", {D, B, P});
    p.c_0 = c_0 ? keep(*c_0, "c_0", {D, B, H}) : nullptr;
    set_steps(p, batch_sizes);
  }

  const void* keep(const Tensor& tensor, const char* name, const Shape& shape) {
    check_one(tensor, name, shape);
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  // Rows that a step uses; those behind them are zeros in every result.
  int64_t used_rows() const { return used_rows_; }

 private:
  void check_one(const Tensor& tensor, const char* name, const Shape& shape) {
    check(tensor.is_cpu(), name, " is not on the CPU, where this operator runs");
    check(tensor.scalar_type() == type_, name, " has another dtype than gates_x");
    const auto sizes = tensor.sizes();
    check(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name, " is ",
          text_of(shape.data(), shape.size()), ", got ", text_of(sizes.data(), sizes.size()));
  }

  void set_steps(Problem& p, const Optional& batch_sizes) {
    if (batch_sizes) {
      check(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
            "batch_sizes is [steps], int64, on the CPU");
      const Tensor contiguous = torch::stable::contiguous(*batch_sizes);
      const auto* sizes = static_cast<const int64_t*>(contiguous.const_data_ptr());
      batch_sizes_.assign(sizes, sizes + contiguous.numel());
    } else {
      const int64_t steps = p.sequences ? p.rows / p.sequences : 0;
      check(steps * p.sequences == p.rows, p.rows, " rows are no whole number of steps of ", p.sequences, " sequences");
      batch_sizes_.assign(steps, p.sequences);
    }
    int64_t before = p.sequences;
    for (const int64_t size : batch_sizes_) {
      check(size >= 0 && size <= before, "batch_sizes must not rise, be negative, or exceed the ", p.sequences,
            " sequences of h_0");
      offsets_.push_back(used_rows_);
      used_rows_ += size;
      before = size;
    }
    check(used_rows_ <= p.rows, "batch_sizes add up to ", used_rows_, " rows, but gates_x has ", p.rows);
    // Steps in which nothing runs are at the end; the kernels need not see them.
    p.steps = std::find(batch_sizes_.begin(), batch_sizes_.end(), 0) - batch_sizes_.begin();
    p.batch_sizes = batch_sizes_.data();
    p.offsets = offsets_.data();
  }

  ScalarType type_;
  std::vector<Tensor> kept_;
  std::vector<int64_t> batch_sizes_, offsets_;
  int64_t used_rows_ = 0;
};

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) { return Buffer(::operator new(static_cast<size_t>(bytes), std::align_val_t(64))); }

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Sequences of a task at most: their state should stay in the second-level cache beside the weights.
constexpr int64_t kMostSequences = 64;
// Sequences of a task at least: fewer leave the multipliers waiting for the weights.
constexpr int64_t kLeastSequences = 2;
// Multiplications below which a second thread costs more than it brings.
constexpr double kSmallWork = 1e5;

std::vector<Task> share(const Problem& p, int64_t used_rows, int threads) {
  std::vector<Task> tasks;
  const double work =
      static_cast<double>(used_rows) * p.directions * seqkernels::gates_of(p.cell) * p.hidden * p.projected;
  const int64_t per_direction = work < kSmallWork ? 1 : threads / std::gcd(threads, p.directions);
  const int64_t needed = (p.sequences + kMostSequences - 1) / kMostSequences;
  const int64_t most = std::max<int64_t>(1, p.sequences / kLeastSequences);
  // A multiple of what the threads share evenly, as far as there are sequences.
  const int64_t tiles = std::min((needed + per_direction - 1) / per_direction * per_direction, std::max(most, needed));
  const bool ragged = p.steps && p.batch_sizes[p.steps - 1] < p.sequences;
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int direction = 0; direction < p.directions; direction++) {
      const int64_t begin = p.sequences * tile / tiles, end = p.sequences * (tile + 1) / tiles;
      // Ragged sequences are sorted by length; dealt out like cards, they give every task the same mixture.
      if (ragged)
        tasks.push_back({direction, tile, tiles, (p.sequences - tile + tiles - 1) / tiles});
      else
        tasks.push_back({direction, begin, 1, end - begin});
    }
  return tasks;
}

// Pack the weights of every direction, then run the tasks, both in parallel.
template <class P, class Pack, class Run>
void run(const P& p, int64_t used_rows, int64_t packed_bytes, int64_t (*scratch_bytes)(const Problem&, int64_t),
         Pack pack, Run run_task) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const std::vector<Task> tasks = share(p, used_rows, threads);
  packed_bytes = round_up(packed_bytes);
  const Buffer packed = allocate(p.directions * packed_bytes);
  const auto packed_of = [&](int64_t d) { return static_cast<char*>(packed.get()) + d * packed_bytes; };
  std::vector<int64_t> scratch_offset{0};
  for (const Task& task : tasks)
    scratch_offset.push_back(scratch_offset.back() + round_up(scratch_bytes(p, task.count)));
  const Buffer scratch = allocate(scratch_offset.back());
  const auto run_tasks = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      run_task(p, tasks[i], packed_of(tasks[i].direction), static_cast<char*>(scratch.get()) + scratch_offset[i]);
  };
  for (int d = 0; d < p.directions; d++) pack(p, d, packed_of(d));
  if (static_cast<int64_t>(tasks.size()) <= p.directions && threads > 1 && p.directions == 1)
    run_tasks(0, static_cast<int64_t>(tasks.size()));
  else
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, run_tasks);
}

void zero_rows(Tensor& tensor, int64_t from) {
  if (!tensor.numel()) return;
  const int64_t bytes = tensor.numel() / tensor.size(0) * static_cast<int64_t>(tensor.element_size());
  memset(static_cast<char*>(tensor.mutable_data_ptr()) + from * bytes, 0, (tensor.size(0) - from) * bytes);
}

void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_forward(std::string cell, Tensor gates_x, Tensor w_hh,
                                                              Optional b_hh, Optional w_hr, Tensor h_0, Optional c_0,
                                                              Optional batch_sizes, bool save) {
  Forward p{};
  Arguments arguments(p, cell, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes);
  p.gates_x = arguments.keep(gates_x, "gates_x", {gates_x.size(0), gates_x.size(1), gates_x.size(2)});
  const int64_t D = p.directions, K = save ? seqkernels::saved_blocks_of(p.cell) : 0;
  Tensor y = torch::stable::new_empty(gates_x, Shape{p.rows, D * p.projected});
  Tensor h_n = torch::stable::new_empty(gates_x, Shape{D, p.sequences, p.projected});
  Tensor c_n = torch::stable::new_empty(gates_x, Shape{D, p.sequences, c_0 ? p.hidden : 0});
  Tensor saved = torch::stable::new_empty(gates_x, Shape{p.rows, D, K * p.hidden});
  zero_rows(y, arguments.used_rows());
  zero_rows(saved, arguments.used_rows());
  p.y = pointer(y);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.saved = pointer(saved);
  const seqkernels::Kernels& kernels = seqkernels::kernels();
  if (h_n.numel())
    run(p, arguments.used_rows(), kernels.forward_packed_bytes(p), kernels.forward_scratch_bytes, kernels.forward_pack,
        kernels.forward);
  return {y, h_n, c_n, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence_backward(std::string cell, Optional grad_y, Optional grad_h_n,
                                                               Optional grad_c_n, Tensor gates_x, Tensor w_hh,
                                                               Optional b_hh, Optional w_hr, Tensor h_0, Optional c_0,
                                                               Optional batch_sizes, Tensor y, Tensor saved) {
  Backward p{};
  Arguments arguments(p, cell, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes);
  const int64_t D = p.directions, N = p.rows, B = p.sequences, H = p.hidden, P = p.projected;
  const int64_t K = seqkernels::saved_blocks_of(p.cell), G = seqkernels::gates_of(p.cell);
  p.grad_y = grad_y ? arguments.keep(*grad_y, "grad_y", {N, D * P}) : nullptr;
  p.grad_h_n = grad_h_n ? arguments.keep(*grad_h_n, "grad_h_n", {D, B, P}) : nullptr;
  p.grad_c_n = grad_c_n && c_0 ? arguments.keep(*grad_c_n, "grad_c_n", {D, B, H}) : nullptr;
  p.y = arguments.keep(y, "y", {N, D * P});
  p.saved = arguments.keep(saved, "saved", {N, D, K * H});
  const int64_t extra = p.cell == Cell::gru ? H : p.has_projection ? P : 0;
  Tensor grad_gates_x = torch::stable::new_empty(gates_x, Shape{N, D, G * H});
  Tensor grad_hidden = torch::stable::new_empty(gates_x, Shape{N, D, extra});
  Tensor grad_h_0 = torch::stable::new_empty(gates_x, Shape{D, B, P});
  Tensor grad_c_0 = torch::stable::new_empty(gates_x, Shape{D, B, c_0 ? H : 0});
  zero_rows(grad_gates_x, arguments.used_rows());
  zero_rows(grad_hidden, arguments.used_rows());
  p.grad_gates_x = pointer(grad_gates_x);
  p.grad_hidden = pointer(grad_hidden);
  p.grad_h_0 = pointer(grad_h_0);
  p.grad_c_0 = pointer(grad_c_0);
  const seqkernels::Kernels& kernels = seqkernels::kernels();
  if (grad_h_0.numel())
    run(p, arguments.used_rows(), kernels.backward_packed_bytes(p), kernels.backward_scratch_bytes,
        kernels.backward_pack, kernels.backward);
  return {grad_gates_x, grad_hidden, grad_h_0, grad_c_0};
}

}  // namespace

// The schemas are those of seqkernels/ops.py, where every argument is explained.
STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def(
      "recurrence_forward.cpu(str cell, Tensor gates_x, Tensor w_hh, Tensor? b_hh, Tensor? w_hr, Tensor h_0, "
      "Tensor? c_0, Tensor? batch_sizes, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "recurrence_backward.cpu(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor gates_x, "
      "Tensor w_hh, Tensor? b_hh, Tensor? w_hr, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved) "
      "-> (Tensor grad_gates_x, Tensor grad_hidden, Tensor grad_h_0, Tensor grad_c_0)");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  m.impl("recurrence_forward.cpu", TORCH_BOX(&recurrence_forward));
  m.impl("recurrence_backward.cpu", TORCH_BOX(&recurrence_backward));
}

// The Python module seqkernels._C: importing it registers the operators above.

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(seqkernels::kernels().name); }

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
    {"build_info", build_info, METH_NOARGS, "What was built, and by which compiler."},
    {nullptr, nullptr, 0, nullptr},
};

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
