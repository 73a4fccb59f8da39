// The operators of the CUDA backend: checks, allocation, products by torch's cuBLAS, launches of the sweeps. Nothing
// waits for the GPU, and nothing is read again from the host's memory, so that all of it can be captured in a CUDA
// graph. The tests build it for the host as well, where the kernels run as tests/emulator/device.h says.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <tuple>

#include "../check.h"
#include "kernels.h"

#ifdef SEQKERNELS_EMULATOR
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "emulator/run.h"
#define READS_SIZES !emulator::sizes_on_gpu
#define SHIM(operation) aoti_torch_cpu_##operation
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#define READS_SIZES true
#define SHIM(operation) aoti_torch_cuda_##operation
#endif

namespace {

using namespace seqkernels;

// The GPU, and its stream, that a call runs on, with what the call allocates there.
class Gpu {
 public:
  explicit Gpu(const Tensor& x)
      : type_(x.scalar_type()),
        device_(x.device())
#ifndef SEQKERNELS_EMULATOR
        ,
        guard_(device_.index())
#endif
  {
#ifndef SEQKERNELS_EMULATOR
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
    // The guard has told the driver, by torch's copy of the CUDA runtime; ours asks the driver.
    int current = -1;
    const cudaError_t error = cudaGetDevice(&current);
    check(error == cudaSuccess, "CUDA does not say which GPU is the current one: ", cudaGetErrorString(error));
    check(current == device_.index(), "the kernels would run on GPU ", current, ", but x is on GPU ", device_.index());
#endif
  }

  void* stream() const { return stream_; }

  Tensor allocate(const Shape& shape) const { return allocate(shape, type_); }

  Tensor allocate(const Shape& shape, ScalarType type) const {
    const Shape strides = contiguous(shape);
    AtenTensorHandle handle;
    const auto error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                number_of(type), number_of(device_.type()), device_.index(), &handle);
    // The stable ABI passes no reason on; torch has printed its own.
    check(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of ", text_of(shape.data(), shape.size()));
    Tensor tensor(handle);
#ifdef SEQKERNELS_EMULATOR  // all memory starts as NaN
    if (tensor.numel()) memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
#endif
    return tensor;
  }

  // A tensor of memory that another one holds.
  Tensor view(const void* data, const Shape& shape, const Shape& strides) const {
    return torch::stable::from_blob(const_cast<void*>(data), shape, strides, device_, type_);
  }
  Tensor view(const void* data, const Shape& shape) const { return view(data, shape, contiguous(shape)); }

  // Element `i` of an array of the layer's dtype.
  const void* at(const void* data, int64_t i) const { return static_cast<const char*>(data) + i * size(); }
  void* at(void* data, int64_t i) const { return static_cast<char*>(data) + i * size(); }

  // The dtype that sums and cell states are carried in.
  ScalarType wide() const { return type_ == ScalarType::Double ? type_ : ScalarType::Float; }

 private:
  static Shape contiguous(const Shape& shape) {
    Shape strides(shape.size(), 1);
    for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
    return strides;
  }
  template <class T>
  static int32_t number_of(T type) {
    return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  }
  int64_t size() const { return type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2; }

  ScalarType type_;
  torch::stable::Device device_;
#ifndef SEQKERNELS_EMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

#ifndef SEQKERNELS_EMULATOR
const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
#endif

void check_launch(const char* error) { check(!error, "a CUDA kernel of seqkernels was not started: ", error ? error : ""); }

// ---- products; with `add` to what the result holds

void check_launch(AOTITorchError error) {
  check(error == AOTI_TORCH_SUCCESS, "a matrix product of seqkernels failed for the reason that torch has printed");
}

void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add = false) {
  check_launch(add ? SHIM(addmm_out)(result.get(), result.get(), a.get(), b.get(), 1, 1)
           : SHIM(mm_out)(result.get(), a.get(), b.get()));
}

void multiply_each(const Tensor& result, const Tensor& a, const Tensor& b, bool add = false) {
  check_launch(add ? SHIM(baddbmm_out)(result.get(), result.get(), a.get(), b.get(), 1, 1)
           : SHIM(bmm_out)(result.get(), a.get(), b.get()));
}

void copy(Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); }

void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

// ---- steps

// First rows and sizes of the steps, on the GPU, and how many sequences run in a step at most, as far as the host
// knows.
class StepOffsets {
 public:
  StepOffsets(const Gpu& gpu, const Layer& p, const Optional& batch_sizes) : p_(p), ragged_(batch_sizes.has_value()) {
    if (!ragged_ || p.steps == 0) return;
    if (!p.batch_sizes) {
      sizes_ = torch::stable::contiguous(*batch_sizes);
      // The sums of the sizes before: of a zero and the sizes. (The stable ABI subtracts no integers.)
      Tensor before = gpu.allocate({p.steps + 1}, ScalarType::Long);
      torch::stable::zero_(before);
      Tensor behind_zero = torch::stable::narrow(before, 0, 1, p.steps);
      copy(behind_zero, *sizes_);
      std::array<StableIValue, 3> stack{torch::stable::detail::from(before), torch::stable::detail::from(int64_t{0}),
                                        torch::stable::detail::from(std::optional<ScalarType>())};
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
      starts_ = torch::stable::detail::to<Tensor>(stack[0]);
      return;
    }
    starts_ = gpu.allocate({p.steps}, ScalarType::Long);
    sizes_ = gpu.allocate({p.steps}, ScalarType::Long);
    for (int64_t t = 0; t < p.steps;) {
      WriteSteps part{p.steps,
                      t,
                      0,
                      {},
                      {},
                      {},
                      static_cast<int64_t*>(starts_->mutable_data_ptr()),
                      static_cast<int64_t*>(sizes_->mutable_data_ptr())};
      for (; t < p.steps && part.count < WriteSteps::runs; part.count++) {
        part.start[part.count] = p.offsets[t];
        part.size[part.count] = p.batch_sizes[t];
        while (t < p.steps && p.batch_sizes[t] == part.size[part.count]) t++;
        part.end[part.count] = t;
      }
      check_launch(write_steps(part, gpu.stream()));
    }
  }

  const int64_t* starts() const { return starts_ ? static_cast<const int64_t*>(starts_->const_data_ptr()) : nullptr; }
  const int64_t* sizes() const { return sizes_ ? static_cast<const int64_t*>(sizes_->const_data_ptr()) : nullptr; }

  // Sequences that run in the k-th step of any direction.
  int64_t running(int64_t k) const {
    if (!p_.batch_sizes) return p_.sequences;
    const int64_t forth = p_.batch_sizes[k], back = p_.batch_sizes[p_.steps - 1 - k];
    return p_.directions == 2 ? std::max(forth, back) : forth;
  }

 private:
  const Layer& p_;
  bool ragged_;
  Optional starts_, sizes_;
};

template <class S>
S sweep_of(const Layer& p, const StepOffsets& steps, int64_t rows, bool tf32) {
  S s{};
  static_cast<SweepArgs&>(s) = {p.cell, p.scalar, tf32,        p.directions,   p.steps,      p.sequences,
                            rows,   p.hidden, p.projected, steps.starts(), steps.sizes()};
  s.h_0 = p.h_0;
  s.c_0 = p.c_0;
  for (int d = 0; d < p.directions; d++) s.w_hh[d] = p.weights[d].w_hh;
  return s;
}

// A weight of all directions, one behind the other.
Tensor stacked(const Gpu& gpu, const Layer& p, const void* const WeightsOf<const void*>::* which, int64_t rows,
               int64_t columns) {
  if (p.directions == 1) return gpu.view(p.weights[0].*which, {1, rows, columns});
  Tensor both = gpu.allocate({2, rows, columns});
  for (int d = 0; d < 2; d++) {
    Tensor one = gpu.view(gpu.at(both.mutable_data_ptr(), d * rows * columns), {rows, columns});
    copy(one, gpu.view(p.weights[d].*which, {rows, columns}));
  }
  return both;
}

// The first rows of each of the D matrices of an array [D, B, width]; a step mostly has as many as the one before, and
// then their view.
class FirstRows {
 public:
  FirstRows(const Gpu& gpu, const Layer& p, const Tensor& array, int64_t width)
      : gpu_(gpu), p_(p), data_(array.const_data_ptr()), width_(width) {}

  const Tensor& operator()(int64_t rows) {
    if (!view_ || rows != rows_)
      view_ = gpu_.view(data_, {p_.directions, rows, width_}, {p_.sequences * width_, width_, 1});
    rows_ = rows;
    return *view_;
  }

 private:
  const Gpu& gpu_;
  const Layer& p_;
  const void* data_;
  int64_t width_, rows_ = 0;
  Optional view_;
};

Tensor transposed(const Gpu& gpu, const Layer& p, const Tensor& array, int64_t rows, int64_t columns) {
  return gpu.view(array.const_data_ptr(), {p.directions, columns, rows}, {rows * columns, 1, columns});
}

// Rows that no step uses are zeros; where only the GPU knows which these are, all rows are.
void zero_rows(const Gpu& gpu, const Layer& p, Tensor& tensor, bool ragged) {
  if (!tensor.numel() || !ragged) return;
  const int64_t rows = tensor.size(0), from = p.batch_sizes ? p.rows : 0, width = tensor.numel() / rows;
  if (from == rows) return;
  Tensor rest = gpu.view(gpu.at(tensor.mutable_data_ptr(), from * width), {rows - from, width});
  torch::stable::zero_(rest);
}

// Where a single CTA finds its weights.
Tensor packed_weights(const Gpu& gpu, const Layer& p) {
  return gpu.allocate({p.directions, single_cta_packed_bytes(p.cell, p.scalar, p.hidden)}, ScalarType::Byte);
}

// How a layer is swept: "stepwise", by a "single CTA" for every tile of sequences, by a "cluster" of blocks, each of
// so many hidden units, or by the "persistent grid", whose clusters have so many. seqkernels/select.py chooses.
struct PassPlan {
  bool tf32, single_cta, cluster, persistent_grid;
  LaunchShape shape;

  PassPlan(bool tf32, const std::string& name, int64_t tile, int64_t memory, int64_t units)
      : tf32(tf32),
        single_cta(name == "single CTA"),
        cluster(name == "cluster"),
        persistent_grid(name == "persistent grid"),
        shape{} {
    shape.arch = Arch::sm_90;
    shape.tile = static_cast<int>(tile);
    shape.units = static_cast<int>(units);
    shape.shared_memory = static_cast<int>(memory);
    check(in_one_launch() || name == "stepwise", "unknown path '", name,
          "'; the paths are stepwise, single CTA, cluster and persistent grid");
    check(!in_one_launch() || (tile >= 1 && tile <= 8), "a block takes 1 to 8 sequences, got ", tile);
  }

  bool in_one_launch() const { return single_cta || cluster || persistent_grid; }
};

// What the blocks of the persistent grid share, and where they exchange.
struct GridWorkspace {
  GridGroups groups{};
  Tensor exchange, flags;

  GridWorkspace(const Gpu& gpu, const SweepArgs& sweep, const LaunchShape& shape, bool backward)
      : exchange(allocate(gpu, sweep, shape, backward)), flags(gpu.allocate({groups.flags}, ScalarType::Int)) {
    torch::stable::zero_(flags);
  }

 private:
  Tensor allocate(const Gpu& gpu, const SweepArgs& sweep, const LaunchShape& shape, bool backward) {
    check_launch(persistent_grid_groups(sweep, shape, backward, groups));
    return gpu.allocate({groups.bytes}, ScalarType::Byte);
  }
};

// ---- forward

// The input projections [D, N, G*H], with all biases but GRU's b_hn.
Tensor project_input(const Gpu& gpu, const Layer& p, int64_t rows) {
  const int64_t GH = gates_of(p.cell) * p.hidden;
  const Tensor inputs = gpu.view(p.x, {rows, p.input});
  Tensor gates = gpu.allocate({p.directions, rows, GH});
  for (int d = 0; d < p.directions; d++) {
    const auto& w = p.weights[d];
    const Tensor result = gpu.view(gpu.at(gates.mutable_data_ptr(), d * rows * GH), {rows, GH});
    const Tensor w_ih = gpu.view(w.w_ih, {p.input, GH}, {1, p.input});
    if (!w.b_ih) {
      multiply(result, inputs, w_ih);
      continue;
    }
    Tensor bias = gpu.allocate({GH});
    const int64_t folded = p.cell == Cell::gru ? 2 * p.hidden : GH;
    check_launch(fold_biases({w.b_ih, w.b_hh, bias.mutable_data_ptr(), GH, folded}, p.scalar, gpu.stream()));
    check_launch(SHIM(addmm_out)(result.get(), bias.get(), inputs.get(), w_ih.get(), 1, 1));
  }
  return gates;
}

void stepwise_forward(const Gpu& gpu, const Layer& p, const StepOffsets& steps, const ForwardArgs& sweep, Tensor& h_n,
                      Tensor& c) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = stacked(gpu, p, &WeightsOf<const void*>::w_hh, GH, P), w_hh_t = transposed(gpu, p, w_hh, GH, P);
  Tensor gates_h = gpu.allocate({D, B, GH}), h = h_n, result = h_n, w_hr = h_n, w_hr_t = h_n;
  if (p.has_projection) {
    h = gpu.allocate({D, B, H}), result = gpu.allocate({D, B, P});
    w_hr = stacked(gpu, p, &WeightsOf<const void*>::w_hr, P, H), w_hr_t = transposed(gpu, p, w_hr, P, H);
  }
  FirstRows of_gates(gpu, p, gates_h, GH), of_h_n(gpu, p, h_n, P), of_result(gpu, p, result, P), of_h(gpu, p, h, H);
  for (int64_t k = 0; k < p.steps; k++) {
    const int64_t rows = steps.running(k);
    multiply_each(of_gates(rows), of_h_n(rows), w_hh_t);
    check_launch(step_forward({sweep, k, rows, gates_h.const_data_ptr(), h.mutable_data_ptr(), pointer(c), p.has_projection},
                      gpu.stream()));
    if (!p.has_projection) continue;
    multiply_each(of_result(rows), of_h(rows), w_hr_t);
    check_launch(step_project({sweep, k, rows, result.const_data_ptr(), h_n.mutable_data_ptr(), sweep.y}, gpu.stream()));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_forward(std::string cell, Tensor x, Tensors weights, Tensor h_0,
                                                        Optional c_0, Optional batch_sizes, bool save, bool tf32,
                                                        std::string path_name, int64_t tile, int64_t memory,
                                                        int64_t units) {
  const PassPlan path(tf32, path_name, tile, memory, units);
  LayerForward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes, 2, READS_SIZES);
  const Gpu gpu(x);
  const int64_t D = p.directions, N = x.size(0), B = p.sequences, H = p.hidden, P = p.projected;
  const bool ragged = batch_sizes.has_value();
  Tensor y = gpu.allocate({N, D * P}), h_n = gpu.allocate({D, B, P}), c_n = gpu.allocate({D, B, c_0 ? H : 0});
  Tensor saved = gpu.allocate({N, D, save ? saved_blocks_of(p.cell) * H : 0});
  zero_rows(gpu, p, y, ragged);
  zero_rows(gpu, p, saved, ragged);
  if (!h_n.numel()) return {y, h_n, c_n, saved};
  const bool walks = p.steps && p.rows, one_launch = walks && path.in_one_launch();
  if (!one_launch) copy(h_n, h_0);
  if (!walks) {
    if (c_0) copy(c_n, *c_0);
    return {y, h_n, c_n, saved};
  }
  const StepOffsets steps(gpu, p, batch_sizes);
  Tensor gates_x = project_input(gpu, p, N);
  ForwardArgs sweep = sweep_of<ForwardArgs>(p, steps, N, tf32);
  sweep.gates_x = gates_x.const_data_ptr();
  for (int d = 0; d < D; d++)
    sweep.b_hn[d] = p.cell == Cell::gru && p.weights[d].b_hh ? gpu.at(p.weights[d].b_hh, 2 * H) : nullptr;
  sweep.y = pointer(y), sweep.h_n = pointer(h_n), sweep.c_n = pointer(c_n), sweep.saved = pointer(saved);
  if (path.single_cta) {
    check_launch(single_cta_forward(sweep, path.shape, packed_weights(gpu, p).mutable_data_ptr(),
                              gpu.stream()));
  } else if (path.cluster) {
    check_launch(cluster_forward(sweep, path.shape, gpu.stream()));
  } else if (path.persistent_grid) {
    GridWorkspace workspace(gpu, sweep, path.shape, false);
    check_launch(persistent_grid_forward(sweep, path.shape, workspace.groups, workspace.exchange.mutable_data_ptr(),
                           workspace.flags.mutable_data_ptr(), gpu.stream()));
  } else {
    Tensor c = gpu.allocate({D, B, c_0 ? H : 0}, gpu.wide());
    if (c_0) copy(c, *c_0);
    stepwise_forward(gpu, p, steps, sweep, h_n, c);
    if (c_0) copy(c_n, c);
  }
  return {y, h_n, c_n, saved};
}

// ---- backward

void stepwise_backward(const Gpu& gpu, const Layer& p, const StepOffsets& steps, const BackwardArgs& sweep,
                       Tensor& grad_h, Tensor& grad_c, void* grad_projected) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = stacked(gpu, p, &WeightsOf<const void*>::w_hh, GH, P);
  Tensor grad_step = gpu.allocate({D, B, GH}), of_step = grad_h, result = grad_h, w_hr = grad_h;
  BackwardArgs inner = sweep;
  if (p.has_projection) {
    inner.grad_y = nullptr;
    of_step = gpu.allocate({D, B, H}), result = gpu.allocate({D, B, P});
    w_hr = stacked(gpu, p, &WeightsOf<const void*>::w_hr, P, H);
  }
  FirstRows of_gates(gpu, p, grad_step, GH), of_grad_h(gpu, p, grad_h, P), of_result(gpu, p, result, P);
  FirstRows of_h(gpu, p, of_step, H);
  for (int64_t k = p.steps; k-- > 0;) {
    const int64_t rows = steps.running(k);
    if (p.has_projection) {
      check_launch(step_project_backward(
          {sweep, k, rows, sweep.grad_y, grad_h.mutable_data_ptr(), result.mutable_data_ptr(), grad_projected},
          gpu.stream()));
      multiply_each(of_h(rows), of_result(rows), w_hr);
    }
    check_launch(step_backward(
        {inner, k, rows, of_step.mutable_data_ptr(), pointer(grad_c), grad_step.mutable_data_ptr(), p.has_projection},
        gpu.stream()));
    multiply_each(of_grad_h(rows), of_gates(rows), w_hh, true);
  }
}

// Which columns of grad_gates [N, F*H] belong to which rows of w_ih.
struct Block {
  int64_t column, row, width;
};
std::vector<Block> blocks_of_x(const Layer& p) {
  const int64_t H = p.hidden;
  if (p.cell == Cell::gru) return {{0, 0, 2 * H}, {3 * H, 2 * H, H}};
  return {{0, 0, gates_of(p.cell) * H}};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> cuda_backward(std::string cell, Optional grad_y, Optional grad_h_n,
                                                          Optional grad_c_n, Tensor x, Tensors weights, Tensor h_0,
                                                          Optional c_0, Optional batch_sizes, Tensor y, Tensor saved,
                                                          bool wants_x, bool wants_weights, bool tf32,
                                                          std::string path_name, int64_t tile, int64_t memory,
                                                          int64_t units) {
  const PassPlan path(tf32, path_name, tile, memory, units);
  LayerBackward p{};
  Arguments arguments(p, cell, x, weights, h_0, c_0, batch_sizes, 2, READS_SIZES);
  const Gpu gpu(x);
  const int64_t D = p.directions, N = x.size(0), B = p.sequences, I = p.input, H = p.hidden, P = p.projected;
  const int64_t GH = gates_of(p.cell) * H, FH = gradient_blocks_of(p.cell) * H, K = saved_blocks_of(p.cell);
  const bool ragged = batch_sizes.has_value(), walks = p.steps && p.rows && h_0.numel();
  const void* given_y = grad_y ? arguments.check_contiguous(*grad_y, "grad_y", {N, D * P}) : nullptr;
  const void* given_h = grad_h_n ? arguments.check_contiguous(*grad_h_n, "grad_h_n", {D, B, P}) : nullptr;
  const void* given_c = grad_c_n && c_0 ? arguments.check_contiguous(*grad_c_n, "grad_c_n", {D, B, H}) : nullptr;
  const void* kept_y = arguments.check_contiguous(y, "y", {N, D * P});
  const void* kept_saved = arguments.check_contiguous(saved, "saved", {N, D, K * H});

  Tensor grad_x = gpu.allocate(wants_x ? Shape{N, I} : Shape{0});
  Tensor grad_h_0 = gpu.allocate({D, B, P}), grad_c_0 = gpu.allocate({D, B, c_0 ? H : 0});
  Tensors grad_weights;
  for (const Tensor& weight : weights) {
    const auto sizes = weight.sizes();
    grad_weights.push_back(gpu.allocate(wants_weights ? Shape(sizes.begin(), sizes.end()) : Shape{0}));
    if (!walks) torch::stable::zero_(grad_weights.back());
  }
  // Where nothing runs, or each step adds to it: the gradient of the initial states begins as that of the final ones.
  const auto begin = [&](Tensor& grad, const void* given, int64_t width) {
    if (!grad.numel()) return;
    if (given)
      copy(grad, gpu.view(given, {D, B, width}));
    else
      torch::stable::zero_(grad);
  };
  if (!walks) {
    begin(grad_h_0, given_h, P);
    begin(grad_c_0, given_c, H);
    torch::stable::zero_(grad_x);
    return {grad_x, grad_weights, grad_h_0, grad_c_0};
  }

  const StepOffsets steps(gpu, p, batch_sizes);
  // Rows that no step uses have no gradient.
  Tensor grad_gates = gpu.allocate({D, N, FH}), grad_projected = gpu.allocate({D, N, p.has_projection ? P : 0});
  if (ragged && !(p.batch_sizes && p.rows == N)) {
    torch::stable::zero_(grad_gates);
    if (grad_projected.numel()) torch::stable::zero_(grad_projected);
  }
  BackwardArgs sweep = sweep_of<BackwardArgs>(p, steps, N, tf32);
  sweep.grad_y = given_y, sweep.grad_h_n = given_h, sweep.grad_c_n = given_c;
  sweep.y = kept_y, sweep.saved = kept_saved, sweep.grad_gates = grad_gates.mutable_data_ptr();
  sweep.grad_h_0 = pointer(grad_h_0), sweep.grad_c_0 = pointer(grad_c_0);
  if (path.single_cta) {
    check_launch(single_cta_backward(sweep, path.shape, packed_weights(gpu, p).mutable_data_ptr(),
                               gpu.stream()));
  } else if (path.cluster) {
    check_launch(cluster_backward(sweep, path.shape, gpu.stream()));
  } else if (path.persistent_grid) {
    GridWorkspace workspace(gpu, sweep, path.shape, true);
    check_launch(persistent_grid_backward(sweep, path.shape, workspace.groups, workspace.exchange.mutable_data_ptr(),
                            workspace.flags.mutable_data_ptr(), gpu.stream()));
  } else {
    begin(grad_h_0, given_h, P);
    Tensor grad_c = gpu.allocate({D, B, c_0 ? H : 0}, gpu.wide());
    begin(grad_c, given_c, H);
    stepwise_backward(gpu, p, steps, sweep, grad_h_0, grad_c, pointer(grad_projected));
    if (c_0) copy(grad_c_0, grad_c);
  }

  // Products and sums over all rows that steps use.
  const int64_t R = p.rows;
  const auto grads = [&](int d, int64_t column, int64_t width) {  // transposed
    return gpu.view(gpu.at(grad_gates.const_data_ptr(), d * N * FH + column), {width, R}, {1, FH});
  };
  if (wants_x) {
    bool add = false;
    for (int d = 0; d < D; d++)
      for (const Block& b : blocks_of_x(p)) {
        const Tensor of = gpu.view(gpu.at(grad_gates.const_data_ptr(), d * N * FH + b.column), {N, b.width}, {FH, 1});
        multiply(grad_x, of, gpu.view(gpu.at(p.weights[d].w_ih, b.row * I), {b.width, I}), add);
        add = true;
      }
  }
  const size_t each = weights.size() / D;
  for (int d = 0; wants_weights && d < D; d++) {
    Tensor* of = &grad_weights[d * each];
    const Tensor inputs = gpu.view(p.x, {R, I});
    for (const Block& b : blocks_of_x(p))
      multiply(gpu.view(gpu.at(of[0].mutable_data_ptr(), b.row * I), {b.width, I}), grads(d, b.column, b.width),
               inputs);
    Tensor before = gpu.allocate({N, P});
    check_launch(previous({sweep, d, p.h_0, kept_y, before.mutable_data_ptr()}, gpu.stream()));
    multiply(of[1], grads(d, 0, GH), gpu.view(before.const_data_ptr(), {R, P}));
    if (each >= 4) {
      const Shape rows{0};
      const Tensor sums = torch::stable::sum(gpu.view(gpu.at(grad_gates.const_data_ptr(), d * N * FH), {N, FH}), rows);
      copy(of[3], gpu.view(sums.const_data_ptr(), {GH}));
      for (const Block& b : blocks_of_x(p)) {
        Tensor part = gpu.view(gpu.at(of[2].mutable_data_ptr(), b.row), {b.width});
        copy(part, gpu.view(gpu.at(sums.const_data_ptr(), b.column), {b.width}));
      }
    }
    if (p.has_projection) {
      Tensor h = gpu.allocate({N, H});
      check_launch(unprojected({sweep, d, kept_saved, h.mutable_data_ptr()}, gpu.stream()));
      const void* of_projected = gpu.at(grad_projected.const_data_ptr(), d * N * P);
      multiply(of[each - 1], gpu.view(of_projected, {P, R}, {1, P}), gpu.view(h.const_data_ptr(), {R, H}));
    }
  }
  return {grad_x, grad_weights, grad_h_0, grad_c_0};
}

// Of clusters of 1, 2, ... 16 blocks, how many the current GPU runs at the same time: 0 where it has no code for them.
std::vector<int64_t> cuda_clusters() {
  std::vector<int64_t> counts;
  for (int blocks = 1; blocks <= 16; blocks++) {
    int clusters = 0;
    counts.push_back(clusters_at_once(blocks, clusters) ? 0 : clusters);
  }
  return counts;
}

}  // namespace

// What seqkernels/backends/cuda.py calls: the operators of seqkernels/ops.py, and how to run them: whether float32
// factors may be rounded to TF32, the path, how many sequences a block or a cluster takes, how many bytes of shared
// memory a block may have, and how many hidden units (the block of a cluster, or a cluster of the persistent grid).
STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def(
      "cuda_forward(str cell, Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, bool save, "
      "bool tf32, str path, int tile, int memory, int units) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor "
      "saved)");
  m.def(
      "cuda_backward(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor[] weights, "
      "Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved, bool wants_x, bool wants_weights, "
      "bool tf32, str path, int tile, int memory, int units) -> (Tensor grad_x, Tensor[] grad_weights, "
      "Tensor grad_h_0, Tensor grad_c_0)");
  m.def("cuda_clusters() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_clusters", TORCH_BOX(&cuda_clusters));
}

#ifdef SEQKERNELS_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
#else
// nvcc's version, and what it compiled for: sm_80, compute_80, ...; to be read as well where the library does not load.
__attribute__((used)) static const char kBuild[] = SEQKERNELS_CUDA_BUILD;
static std::string cuda_build() { return kBuild; }

// The newest CUDA that the driver knows: 1000 times its major and 10 times its minor number; 0 without a driver.
static int64_t cuda_driver() {
  int version = 0;
  check_launch(text_of(cudaDriverGetVersion(&version)));
  return version;
}

STABLE_TORCH_LIBRARY_FRAGMENT(seqkernels, m) {
  m.def("cuda_build() -> str");
  m.def("cuda_driver() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
  m.impl("cuda_driver", TORCH_BOX(&cuda_driver));
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CUDA, m) {
#endif
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
}
