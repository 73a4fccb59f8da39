#include "context.h"

#include <mutex>

#include "kernels.h"

#ifndef SEQKERNELS_EMULATOR
#include <cuda_runtime_api.h>
#endif

namespace seqkernels {

#ifdef SEQKERNELS_EMULATOR

CallContext::CallContext(const Tensor& x) : type_(x.scalar_type()), device_(x.device()) {}

// One of compute capability 9.0, as far as tests do not say otherwise.
Gpu CallContext::gpu() const {
  Gpu gpu{};
  gpu.target = 90;
  gpu.shared_memory = emulator::shared_memory;
  gpu.multiprocessors = emulator::multiprocessors;
  for (int blocks = 1; blocks <= kMaxCluster; blocks++)
    check_launch(clusters_at_once(blocks, gpu.clusters[blocks - 1]));
  return gpu;
}

#else

namespace {

void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, "CUDA does not say ", what, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "what a GPU has");
  return value;
}

Gpu describe(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  Gpu gpu{};
  gpu.target = major * 10 + attribute(cudaDevAttrComputeCapabilityMinor, device);
  gpu.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  for (int blocks = 1; blocks <= kMaxCluster; blocks++)
    if (clusters_at_once(blocks, gpu.clusters[blocks - 1])) gpu.clusters[blocks - 1] = 0;
  return gpu;
}

}  // namespace

CallContext::CallContext(const Tensor& x) : type_(x.scalar_type()), device_(x.device()), guard_(device_.index()) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  // The guard has told the driver, by torch's copy of the CUDA runtime; ours asks the driver.
  int current = -1;
  check_cuda(cudaGetDevice(&current), "which GPU is the current one");
  check(current == device_.index(), "the kernels would run on GPU ", current, ", but x is on GPU ", device_.index());
}

CallContext::CallContext(const CallContext& call, void* stream)
    : type_(call.type_), device_(call.device_), guard_(device_.index()), stream_(stream) {
  CUDAStreamGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_stream_guard(stream, device_.index(), &guard));
  stream_guard_.reset(guard);
}

Gpu CallContext::gpu() const {
  static std::mutex mutex;
  static std::vector<std::optional<Gpu> > known;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t i = device_.index();
  if (known.size() <= i) known.resize(i + 1);
  if (!known[i]) known[i] = describe(device_.index());
  return *known[i];
}

#endif

}  // namespace seqkernels
