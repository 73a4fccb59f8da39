// Starting a kernel, and the types that a dtype stands for. The emulator's launches are in tests/emulator/launch.h.
#pragma once
#include "mma.cuh"
#ifdef SEQKERNELS_EMULATOR
#include "emulator/launch.h"
#else
#include <atomic>

namespace seqkernels::device {

// A kernel is a type with `Parameters`, a number of `threads` a CTA, and `run(parameters)`, which every thread runs.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, 1) entry(const __grid_constant__ typename Kernel::Parameters p) {
  Kernel::run(p);
}

constexpr int kGpus = 64;            // whose properties are kept
constexpr int kPortableCluster = 8;  // CTAs that every GPU with clusters runs in one

// Which CTAs run at the same time: those of a cluster, along the first index of a CTA, or all of the grid.
struct Cooperation {
  int cluster = 1;
  bool whole_grid = false;
};

// Lets the CTAs of a kernel have all shared memory of the current GPU, and clusters up to kMaxCluster CTAs. Done once
// for each GPU.
template <class Kernel>
cudaError_t allow_more(bool large_cluster) {
  static std::atomic<bool> all_allowed[2][kGpus];
  std::atomic<bool>(&allowed)[kGpus] = all_allowed[large_cluster];
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kGpus && allowed[device].load(std::memory_order_relaxed))) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && large_cluster)
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess && device < kGpus) allowed[device].store(true, std::memory_order_relaxed);
  return error;
}

// How many clusters of so many CTAs the current GPU runs at the same time, if each CTA has all shared memory of a
// multiprocessor. Asked for once on each GPU. Null, or the text of an error.
template <class Kernel>
const char* count_clusters(int cluster, int& count) {
  static std::atomic<int> all_known[kMaxCluster + 1][kGpus];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  std::atomic<int>* known = cluster <= kMaxCluster && device < kGpus ? &all_known[cluster][device] : nullptr;
  if (known && (count = known->load(std::memory_order_relaxed))) return nullptr;
  error = allow_more<Kernel>(cluster > kPortableCluster);
  cudaLaunchAttribute of_cluster;
  of_cluster.id = cudaLaunchAttributeClusterDimension;
  of_cluster.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(Kernel::threads);
  config.attrs = &of_cluster;
  config.numAttrs = 1;
  int bytes = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  config.dynamicSmemBytes = bytes;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, entry<Kernel>, &config);
  if (error == cudaSuccess && known) known->store(count, std::memory_order_relaxed);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Starts a kernel on a stream of the current GPU. Returns the error's text if that fails, or if earlier work has
// failed, else null. blocks_y is at most 65,535.
template <class Kernel>
const char* launch(int64_t blocks, int blocks_y, int shared_bytes, void* stream,
                   const typename Kernel::Parameters& parameters, Cooperation cooperation = {}) {
  if (blocks > INT32_MAX) return "more blocks than a grid can have";
  cudaError_t error = cudaSuccess;
  // A CTA may have 48 KB, and a cluster 8 CTAs, without a special request.
  const bool large_cluster = cooperation.cluster > kPortableCluster;
  if (shared_bytes > 48 << 10 || large_cluster) error = allow_more<Kernel>(large_cluster);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), blocks_y);
  config.blockDim = dim3(Kernel::threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cooperation.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cooperation.cluster), 1, 1};
  }
  if (cooperation.whole_grid) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  error = cudaLaunchKernelEx(&config, entry<Kernel>, parameters);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace seqkernels::device
#endif

namespace seqkernels::device {

template <Scalar SCALAR>
using element_t =
    std::conditional_t<SCALAR == Scalar::float64, double,
                       std::conditional_t<SCALAR == Scalar::float32, float,
                                          std::conditional_t<SCALAR == Scalar::bfloat16, bfloat16, float16>>>;

// How kernels of a dtype multiply.
template <Scalar SCALAR, bool TF32>
using policy_t = std::conditional_t<SCALAR != Scalar::float32, TensorCore<element_t<SCALAR>>,
                                    std::conditional_t<TF32, Tf32, Fp32Fma>>;

}  // namespace seqkernels::device
