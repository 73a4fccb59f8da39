// What an operator does on its GPU besides launching our kernels: allocation, views, torch's matrix products. The
// emulator is built from it as well, for the CPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <memory>

#include "../check.h"
#include "plan.h"

#ifdef SEQKERNELS_EMULATOR
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "emulator/run.h"
#define SEQKERNELS_SHIM(operation) aoti_torch_cpu_##operation
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#define SEQKERNELS_SHIM(operation) aoti_torch_cuda_##operation
#endif

namespace seqkernels {

// The GPU and the stream that a call runs on, and the layer's dtype.
class CallContext {
 public:
  explicit CallContext(const Tensor& x);

#ifndef SEQKERNELS_EMULATOR
  // The same on another stream, which is torch's current one as long as this exists.
  CallContext(const CallContext& call, void* stream);
#endif

  void* stream() const { return stream_; }
  int device() const { return device_.index(); }

  // The facts of the GPU that plans depend on, read once.
  Gpu gpu() const;

  Tensor allocate(const Shape& shape) const { return allocate(shape, type_); }

  Tensor allocate(const Shape& shape, ScalarType type) const {
    const Shape strides = contiguous_strides(shape);
    AtenTensorHandle handle;
    const auto error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                number_of(type), number_of(device_.type()), device_.index(), &handle);
    // The stable ABI does not return the reason; torch has printed it.
    check(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of ", text_of(shape.data(), shape.size()));
    Tensor tensor(handle);
#ifdef SEQKERNELS_EMULATOR  // all memory starts as NaN
    emulator::counted.allocations++;
    if (tensor.numel()) memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
#endif
    return tensor;
  }

  // A tensor of memory that another one owns.
  Tensor view(const void* data, const Shape& shape, const Shape& strides) const {
    return view(data, shape, strides, type_);
  }
  Tensor view(const void* data, const Shape& shape) const { return view(data, shape, contiguous_strides(shape)); }
  Tensor view(const void* data, const Shape& shape, const Shape& strides, ScalarType type) const {
    return torch::stable::from_blob(const_cast<void*>(data), shape, strides, device_, type);
  }

  // Element `i` of an array of the layer's dtype.
  const void* at(const void* data, int64_t i) const { return static_cast<const char*>(data) + i * element_size(); }
  void* at(void* data, int64_t i) const { return static_cast<char*>(data) + i * element_size(); }

  // How many elements lie between two arrays.
  int64_t elements_between(const void* first, const void* second) const {
    return (reinterpret_cast<intptr_t>(second) - reinterpret_cast<intptr_t>(first)) / element_size();
  }

  // The dtype of sums and of the LSTM's c between steps.
  ScalarType accumulator_type() const { return type_ == ScalarType::Double ? type_ : ScalarType::Float; }

  // Bytes of so many elements of the layer's dtype.
  int64_t bytes(int64_t elements) const { return elements * element_size(); }

 private:
  template <class T>
  static int32_t number_of(T type) {
    return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  }
  int64_t element_size() const { return type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2; }

  ScalarType type_;
  torch::stable::Device device_;
#ifndef SEQKERNELS_EMULATOR
  struct EndStream {
    void operator()(CUDAStreamGuardOpaque* guard) const { aoti_torch_delete_cuda_stream_guard(guard); }
  };
  torch::stable::accelerator::DeviceGuard guard_;
  std::unique_ptr<CUDAStreamGuardOpaque, EndStream> stream_guard_;
#endif
  void* stream_ = nullptr;
};

// Raises the error that a launch returned; null is none.
inline void check_launch(const char* error) {
  check(!error, "a CUDA kernel of seqkernels was not started: ", error ? error : "");
}

// Kernels read two units at once.
inline CheckOptions check_options() {
  CheckOptions options;
  options.alignment = 2;
#ifdef SEQKERNELS_EMULATOR
  options.read_sizes = !emulator::sizes_on_gpu;
#endif
  return options;
}

inline void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

// ---- torch's operations: mostly one launch each

inline void count_operation() {
#ifdef SEQKERNELS_EMULATOR
  emulator::counted.operations++;
#endif
}

inline void copy(Tensor& to, const Tensor& from) {
  count_operation();
  torch::stable::copy_(to, from);
}

inline void zero(Tensor& tensor) {
  count_operation();
  torch::stable::zero_(tensor);
}

// Matrix products; with `add` the result is added to.

inline void check_product(AOTITorchError error) {
  count_operation();
  check(error == AOTI_TORCH_SUCCESS, "a matrix product of seqkernels failed for the reason that torch has printed");
}

inline void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add = false) {
  check_product(add ? SEQKERNELS_SHIM(addmm_out)(result.get(), result.get(), a.get(), b.get(), 1, 1)
                    : SEQKERNELS_SHIM(mm_out)(result.get(), a.get(), b.get()));
}

// One product for each direction.
inline void multiply_each(const Tensor& result, const Tensor& a, const Tensor& b, bool add = false) {
  check_product(add ? SEQKERNELS_SHIM(baddbmm_out)(result.get(), result.get(), a.get(), b.get(), 1, 1)
                    : SEQKERNELS_SHIM(bmm_out)(result.get(), a.get(), b.get()));
}

}  // namespace seqkernels
