// All that kernels know of a GPU: where a thread stands, memory, barriers, exchange in a warp, matrix cores, rounding.
// Kernels use nothing else, so that tests can compile them for the host, where tests/emulator/device.h says the same of
// threads that are fibers, with every access checked. Clusters need compute capability 9.0.
#pragma once
#ifdef SEQKERNELS_EMULATOR
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#define SEQKERNELS_ISA device
#define DEVICE __device__ __forceinline__

namespace seqkernels::device {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ---- threads and blocks

DEVICE int thread() { return threadIdx.x; }
DEVICE int64_t block() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }

// All threads of the block wait for each other, and see what the others have written.
DEVICE void synchronize() { __syncthreads(); }

// The same for the lanes of a warp, all of which take part.
DEVICE void synchronize_warp() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; all lanes of a warp take part.
DEVICE float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

// This block's number in its cluster, and how many blocks the cluster has.
DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of the cluster, in two halves: after `wait` they see what was written before `arrive`.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// ---- memory

// 16 bytes, read or written at once.
struct alignas(16) Words {
  uint32_t word[4];
};

// Two numbers side by side, which are read and written at once; those of 16 bits stay in one register.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};
template <>
struct Pair<bfloat16> {
  uint32_t word;
};
template <>
struct Pair<float16> {
  uint32_t word;
};

// An array in the GPU's memory; the number of its elements is for the host-run alone.
template <class T>
struct Global {
  T* data;
  DEVICE Global(T* data, int64_t /*count*/) : data(data) {}
  DEVICE explicit operator bool() const { return data; }
  DEVICE T load(int64_t i) const { return data[i]; }
  DEVICE void store(int64_t i, T value) const { data[i] = value; }
  // Elements i and i + 1, of which the first lies at a multiple of a pair's size.
  DEVICE Pair<std::remove_const_t<T> > load_pair(int64_t i) const {
    return *reinterpret_cast<const Pair<std::remove_const_t<T> >*>(data + i);
  }
  DEVICE void store_pair(int64_t i, Pair<T> pair) const { *reinterpret_cast<Pair<T>*>(data + i) = pair; }
};

// Counts, in 8 bytes of shared memory, the bytes that a block's peers push to it. A phase ends, and the next begins,
// when one thread has said how many bytes the phase brings and these have come, in any order.
class Mbarrier {
 public:
  DEVICE explicit Mbarrier(int byte) {
    extern __shared__ Words memory[];
    at_ = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + byte;
  }

  // By one thread; a barrier of the cluster makes it known.
  DEVICE void init() const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(at_)
                 : "memory");
  }

  // Say how many bytes the phase brings; once a phase, by one thread.
  DEVICE void expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at_), "r"(bytes) : "memory");
  }

  // Until the present phase has ended, if its number (from 0) has this parity; then the caller sees what it brought,
  // and what those who pushed or copied had seen when they did.
  DEVICE void wait(int parity) const {
    asm volatile(
        "{\n\t.reg .pred ended;\n"
        "waiting:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n\t"
        "@!ended bra waiting;\n\t}" ::"r"(at_),
        "r"(parity)
        : "memory");
  }

  // The same, but of shared memory alone, so that the L1 cache keeps what it has of the GPU's.
  DEVICE void wait_for_shared(int parity) const {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 7)
    asm volatile(
        "{\n\t.reg .pred ended;\n"
        "waiting:\n\tmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 ended, [%0], %1;\n\t"
        "@!ended bra waiting;\n\t"
        "fence.acquire.sync_restrict::shared::cluster.cluster;\n\t}" ::"r"(at_),
        "r"(parity)
        : "memory");
#else
    wait(parity);  // the fence is of PTX 8.6
#endif
  }

  DEVICE uint32_t address() const { return at_; }
  DEVICE uint32_t of_peer(int rank) const { return at_peer(at_, rank); }

  // Where a peer has what this block has at an address of its shared memory.
  static DEVICE uint32_t at_peer(uint32_t address, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
  }

 private:
  uint32_t at_;
};

// An array in the block's shared memory, at a multiple of 16 bytes from its begin.
template <class T>
struct Shared {
  T* data;
  DEVICE Shared(int byte, int /*count*/) {
    extern __shared__ Words memory[];
    data = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + byte);
  }
  DEVICE T load(int i) const { return data[i]; }
  DEVICE void store(int i, T value) const { data[i] = value; }
  DEVICE Pair<T> load_pair(int i) const { return *reinterpret_cast<const Pair<T>*>(data + i); }
  DEVICE void store_pair(int i, Pair<T> pair) const { *reinterpret_cast<Pair<T>*>(data + i) = pair; }
  // From element i on, which lies at a multiple of 16 bytes.
  DEVICE Words load_words(int i) const { return *reinterpret_cast<const Words*>(data + i); }
  DEVICE void store_words(int i, Words words) const { *reinterpret_cast<Words*>(data + i) = words; }
  // Into the same array of a peer (or of this block; but PTX leaves it undefined where a block has no peers), at a time
  // of its own: the peer's `arrivals` count it.
  DEVICE void push_words(int i, Words words, int peer, Mbarrier arrivals) const {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(data + i));
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            Mbarrier::at_peer(at, peer)),
        "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3]), "r"(arrivals.of_peer(peer))
        : "memory");
  }
  // `count` elements of global memory, a multiple of 16 bytes, into the same array of all blocks of the cluster, read
  // once for all of them; the `arrivals` of each count the bytes. Copies go another way than loads and stores: one of
  // the fences below comes between what is stored and a copy of it, or to the same place.
  DEVICE void copy_to_cluster(int i, Global<T> from, int64_t at, int count, Mbarrier arrivals) const {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(data + i));
    const auto all = static_cast<uint16_t>((1 << cluster_size()) - 1);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from.data + at), "r"(count * static_cast<int>(sizeof(T))), "r"(arrivals.address()), "h"(all)
        : "memory");
  }
};

// The caller's copies from global memory that follow see what others have stored there, as far as it knows of that.
DEVICE void fence_copies_from_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Copies to the block's shared memory that follow, anyone's, come after what the caller has stored there.
DEVICE void fence_copies_to_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Numbers in the GPU's memory, by which blocks that run at the same time wait for each other.
class Flags {
 public:
  DEVICE Flags(uint32_t* data, int64_t /*count*/) : data_(data) {}

  // Who waits for the value sees what the caller has seen and done.
  DEVICE void raise(int64_t i, uint32_t value) const {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(data_ + i), "r"(value) : "memory");
  }

  // Until flag i has at least this value.
  DEVICE void wait(int64_t i, uint32_t value) const {
    uint32_t found;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(data_ + i) : "memory");
    while (found < value);
  }

 private:
  uint32_t* data_;
};

// ---- numbers

DEVICE double wide(double x) { return x; }
DEVICE float wide(float x) { return x; }
DEVICE float wide(bfloat16 x) { return __bfloat162float(x); }
DEVICE float wide(float16 x) { return __half2float(x); }

// Rounded to the nearest even.
template <class T>
struct Narrow;
template <>
struct Narrow<double> {
  static DEVICE double of(double x) { return x; }
};
template <>
struct Narrow<float> {
  static DEVICE float of(float x) { return x; }
};
template <>
struct Narrow<bfloat16> {
  static DEVICE bfloat16 of(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<float16> {
  static DEVICE float16 of(float x) { return __float2half_rn(x); }
};

DEVICE Pair<double> pair(double first, double second) { return {first, second}; }
DEVICE Pair<float> pair(float first, float second) { return {first, second}; }
DEVICE Pair<bfloat16> pair(bfloat16 first, bfloat16 second) {
  return {__bfloat16_as_ushort(first) | uint32_t(__bfloat16_as_ushort(second)) << 16};
}
DEVICE Pair<float16> pair(float16 first, float16 second) {
  return {__half_as_ushort(first) | uint32_t(__half_as_ushort(second)) << 16};
}
template <class T>
DEVICE T first(Pair<T> pair) {
  return pair.first;
}
template <class T>
DEVICE T second(Pair<T> pair) {
  return pair.second;
}
DEVICE bfloat16 first(Pair<bfloat16> pair) { return __ushort_as_bfloat16(static_cast<uint16_t>(pair.word)); }
DEVICE bfloat16 second(Pair<bfloat16> pair) { return __ushort_as_bfloat16(static_cast<uint16_t>(pair.word >> 16)); }
DEVICE float16 first(Pair<float16> pair) { return __ushort_as_half(static_cast<uint16_t>(pair.word)); }
DEVICE float16 second(Pair<float16> pair) { return __ushort_as_half(static_cast<uint16_t>(pair.word >> 16)); }
// The bits of two 16-bit numbers, the first in the lower half.
template <class T>
DEVICE uint32_t bits(Pair<T> pair) {
  return pair.word;
}

DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

// To the 10 bits of TF32, to the nearest, ties away from zero.
DEVICE float tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return from_bits(rounded);
}

// The quick quotient errs by one unit in the last place and has no branch for denormals, which 1 + exp cannot be.
DEVICE float sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }
DEVICE double sigmoid(double x) { return 1 / (1 + exp(-x)); }
DEVICE float tanh(float x) { return tanhf(x); }
DEVICE double tanh(double x) { return ::tanh(x); }

// ---- matrix cores: sum[16, 8] += a[16, K] b[K, 8], K being 16 for 16-bit factors and 8 for TF32, by all lanes of a
// warp. A lane has the elements that PTX's description of mma.m16n8k16 and mma.m16n8k8 gives it.

DEVICE void multiply(bfloat16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}
DEVICE void multiply(float16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}
DEVICE void multiply(float, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}

// ---- launches

// A kernel is a type with `Parameters`, a number of `threads` a block, and `run(parameters)`, which every thread runs.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, 1) entry(const __grid_constant__ typename Kernel::Parameters p) {
  Kernel::run(p);
}

// Which blocks run at the same time: those of a cluster, along the first index of a block, or all.
struct Together {
  int cluster = 1;
  bool all = false;
};

// Let the blocks of a kernel have as much shared memory as there is on the current GPU, and clusters up to 16 blocks,
// where some GPUs have 8; asked for once on each.
template <class Kernel>
cudaError_t allow_more(bool large_cluster) {
  static std::atomic<bool> all_allowed[2][64];
  std::atomic<bool>(&allowed)[64] = all_allowed[large_cluster];
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < 64 && allowed[device].load(std::memory_order_relaxed))) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && large_cluster)
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess && device < 64) allowed[device].store(true, std::memory_order_relaxed);
  return error;
}

// How many clusters of so many blocks of a kernel the current GPU runs at the same time, if a block has the GPU's
// shared memory for itself; asked for once on each GPU. Null, or the text of an error.
template <class Kernel>
const char* count_clusters(int cluster, int& clusters) {
  static std::atomic<int> all_known[17][64];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  std::atomic<int>* known = cluster <= 16 && device < 64 ? &all_known[cluster][device] : nullptr;
  if (known && (clusters = known->load(std::memory_order_relaxed))) return nullptr;
  error = allow_more<Kernel>(cluster > 8);
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
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, entry<Kernel>, &config);
  if (error == cudaSuccess && known) known->store(clusters, std::memory_order_relaxed);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Start a kernel on a stream of the current GPU; the error's text if that fails, or if work before has failed, else
// null. blocks_y is at most 65,535.
template <class Kernel>
const char* launch(int64_t blocks, int blocks_y, int shared_bytes, void* stream,
                   const typename Kernel::Parameters& parameters, Together together = {}) {
  if (blocks > INT32_MAX) return "more blocks than a grid can have";
  cudaError_t error = cudaSuccess;
  // What a block or a cluster may have without being asked for.
  if (shared_bytes > 48 << 10 || together.cluster > 8) error = allow_more<Kernel>(together.cluster > 8);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), blocks_y);
  config.blockDim = dim3(Kernel::threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (together.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(together.cluster), 1, 1};
  }
  if (together.all) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  error = cudaLaunchKernelEx(&config, entry<Kernel>, parameters);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace seqkernels::device
#endif
