// All that kernels know of a GPU: threads, memory, barriers, shuffles, tensor cores, rounding. Kernels use nothing
// else, so that tests can compile them for the CPU: there tests/emulator/device.h has the same names, for threads that
// are fibers, and checks every access. Clusters need compute capability 9.0.
#pragma once
#ifdef SEQKERNELS_EMULATOR
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define SEQKERNELS_ISA device
#define DEVICE __device__ __forceinline__
// Whether PTX has scalars of 128 bits: from 8.3 on.
#define SEQKERNELS_B128 (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 3))

namespace seqkernels::device {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ---- threads and CTAs

DEVICE int thread() { return threadIdx.x; }
DEVICE int64_t block() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }

// All threads of the CTA wait for each other, and see what the others have written.
DEVICE void synchronize() { __syncthreads(); }

// The same for the lanes of a warp, all of which take part.
DEVICE void synchronize_warp() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; all lanes of a warp take part.
DEVICE float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
DEVICE double shfl_xor(double value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

// The value of one lane; all lanes of a warp take part.
DEVICE uint32_t shfl(uint32_t value, int lane) { return __shfl_sync(0xffffffff, value, lane); }

// This CTA's number in its cluster, and how many CTAs the cluster has.
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

// 16 bytes, read or written in one access.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Two neighbouring numbers, read and written in one access; those of 16 bits stay in one register.
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

// An array in global memory; only the emulator uses the number of its elements.
template <class T>
struct Global {
  T* data;
  DEVICE Global(T* data, int64_t /*count*/) : data(data) {}
  DEVICE explicit operator bool() const { return data; }
  // The same array as seen from an element so many rows further on: a number that is only added to the address.
  DEVICE Global moved(int64_t rows, int row_bytes) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return {reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + rows * row_bytes), 0};
  }
  DEVICE T load(int64_t i) const { return data[i]; }
  DEVICE void store(int64_t i, T value) const { data[i] = value; }
  // Elements i and i + 1, of which the first lies at a multiple of a pair's size.
  DEVICE Pair<std::remove_const_t<T> > load_pair(int64_t i) const {
    return *reinterpret_cast<const Pair<std::remove_const_t<T> >*>(data + i);
  }
  DEVICE void store_pair(int64_t i, Pair<T> pair) const { *reinterpret_cast<Pair<T>*>(data + i) = pair; }
};

template <class T>
DEVICE void store_if(bool stored, T* at, T value) {
  if constexpr (sizeof(T) == 8) {
    const auto words = reinterpret_cast<const uint32_t (&)[2]>(value);
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %0, 0;\n\t@p st.global.v2.b32 [%1], {%2, %3};\n\t}" ::"r"(int{stored}),
        "l"(at), "r"(words[0]), "r"(words[1]));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %0, 0;\n\t@p st.global.b32 [%1], %2;\n\t}" ::"r"(int{stored}),
                 "l"(at), "r"(reinterpret_cast<const uint32_t&>(value)));
  } else {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %0, 0;\n\t@p st.global.b16 [%1], %2;\n\t}" ::"r"(int{stored}),
                 "l"(at), "h"(reinterpret_cast<const uint16_t&>(value)));
  }
}

// A place in an array in global memory that moves from step to step.
template <class T>
class Cursor {
 public:
  DEVICE Cursor(Global<T> array, int64_t i) : at_(array.data + i) {}
  // By so many rows of so many elements: one instruction, which nvcc does not find by itself in a loop.
  DEVICE void move(int rows, int row) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    int64_t bytes;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(rows), "r"(row * static_cast<int>(sizeof(T))));
    at_ = reinterpret_cast<T*>(reinterpret_cast<Byte*>(at_) + bytes);
  }
  DEVICE T load(int i) const { return at_[i]; }
  DEVICE Pair<std::remove_const_t<T> > load_pair(int i) const {
    return *reinterpret_cast<const Pair<std::remove_const_t<T> >*>(at_ + i);
  }
  // If `stored`; for many stores nvcc would make a branch, which products could not move across.
  DEVICE void store(int i, T value, bool stored) const { store_if(stored, at_ + i, value); }
  DEVICE void store_pair(int i, Pair<T> pair, bool stored) const {
    store_if(stored, reinterpret_cast<Pair<T>*>(at_ + i), pair);
  }

 private:
  T* at_;
};

// Counts, in 8 bytes of shared memory, the bytes that peers send to a CTA. A phase ends, and the next begins, when one
// thread has said how many bytes the phase brings and these have come, in any order.
class Mbarrier {
 public:
  DEVICE explicit Mbarrier(int byte) {
    extern __shared__ Vec16 memory[];
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

  // Waits until the present phase has ended, if its number (from 0) has this parity. Then the caller sees what the
  // phase brought, and what those who sent or copied it had seen by then.
  DEVICE void wait(int parity) const {
    asm volatile(
        "{\n\t.reg .pred ended;\n"
        "waiting:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n\t"
        "@!ended bra waiting;\n\t}" ::"r"(at_),
        "r"(parity)
        : "memory");
  }

  // The same for shared memory alone, so that the L1 cache keeps its lines of global memory.
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

  // The address in a peer's shared memory that corresponds to one of this CTA's.
  static DEVICE uint32_t at_peer(uint32_t address, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
  }

 private:
  uint32_t at_;
};

// An array in the CTA's shared memory, a multiple of 16 bytes from its begin.
template <class T>
struct Shared {
  T* data;
  DEVICE Shared(int byte, int /*count*/) {
    extern __shared__ Vec16 memory[];
    data = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + byte);
  }
  DEVICE T load(int i) const { return data[i]; }
  DEVICE void store(int i, T value) const { data[i] = value; }
  DEVICE Pair<T> load_pair(int i) const { return *reinterpret_cast<const Pair<T>*>(data + i); }
  DEVICE void store_pair(int i, Pair<T> pair) const { *reinterpret_cast<Pair<T>*>(data + i) = pair; }
  // From element i on, which lies at a multiple of 16 bytes.
  DEVICE Vec16 load_vec16(int i) const { return *reinterpret_cast<const Vec16*>(data + i); }
  DEVICE void store_vec16(int i, Vec16 words) const { *reinterpret_cast<Vec16*>(data + i) = words; }
  // Stores into the same array of a peer (or of this CTA; PTX leaves it undefined for a CTA without peers). The store
  // is asynchronous: the peer's `arrivals` count it.
  DEVICE void st_async(int i, Vec16 words, int peer, Mbarrier arrivals) const {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(data + i));
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            Mbarrier::at_peer(at, peer)),
        "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3]), "r"(arrivals.of_peer(peer))
        : "memory");
  }
};

// Vectors of 16 bytes in global memory, by which CTAs that run at the same time send each other three words at once.
// The fourth word is a tag: who polls a vector until it has the tag that he waits for, has the words as well, so that
// there is no flag to wait for, and no fence. This rests on three rules of PTX: a scalar of 128 bits is written and
// read as a whole (before PTX 8.3 there is none, and a vector as large is, by all hardware that there is); what threads
// that a barrier orders store at one place comes there in this order; and nothing is stored before the values are known
// that it and the branches before it depend on. Nothing else passes: a receiver need not see what else the sender has
// done.
class Tagged {
 public:
  DEVICE Tagged(Vec16* data, int64_t /*count*/) : data_(data) {}

  DEVICE void store(int i, uint32_t first, uint32_t second, uint32_t third, uint32_t tag) const {
#if SEQKERNELS_B128
    asm volatile(
        "{\n\t.reg .b64 low, high;\n\t.reg .b128 all;\n\t"
        "mov.b64 low, {%1, %2};\n\tmov.b64 high, {%3, %4};\n\tmov.b128 all, {low, high};\n\t"
        "st.relaxed.gpu.global.b128 [%0], all;\n\t}" ::"l"(data_ + i),
        "r"(first), "r"(second), "r"(third), "r"(tag)
        : "memory");
#else
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(data_ + i), "r"(first), "r"(second),
                 "r"(third), "r"(tag)
                 : "memory");
#endif
  }

  // Loads vectors i, i + stride, ... below `end`, COUNT at most and side by side, and again those that do not have the
  // tag yet. The words of those from `end` on are zeros.
  template <int COUNT>
  DEVICE void wait(int i, int stride, int end, uint32_t tag, Vec16 (&found)[COUNT]) const {
#pragma unroll
    for (int of = 0; of < COUNT; of++) found[of] = {{0, 0, 0, i + of * stride < end ? ~tag : tag}};
    bool come;
    do {
      come = true;
#pragma unroll
      for (int of = 0; of < COUNT; of++) load_without(tag, data_ + i + of * stride, found[of].word);
#pragma unroll
      for (int of = 0; of < COUNT; of++) come &= found[of].word[3] == tag;
    } while (!come);
  }

 private:
  // Loads a vector that does not have the tag.
  static DEVICE void load_without(uint32_t tag, const Vec16* from, uint32_t (&word)[4]) {
#if SEQKERNELS_B128
    asm volatile(
        "{\n\t.reg .pred lacks;\n\t.reg .b64 low, high;\n\t.reg .b128 all;\n\tsetp.ne.u32 lacks, %3, %4;\n\t"
        "mov.b64 low, {%0, %1};\n\tmov.b64 high, {%2, %3};\n\tmov.b128 all, {low, high};\n\t"
        "@lacks ld.relaxed.gpu.global.b128 all, [%5];\n\t"
        "mov.b128 {low, high}, all;\n\tmov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
        : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3])
        : "r"(tag), "l"(from)
        : "memory");
#else
    asm volatile(
        "{\n\t.reg .pred lacks;\n\tsetp.ne.u32 lacks, %3, %4;\n\t"
        "@lacks ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%5];\n\t}"
        : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3])
        : "r"(tag), "l"(from)
        : "memory");
#endif
  }

  Vec16* data_;
};

// ---- numbers

// What sums and cell states are computed in: double for double, else float.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

DEVICE double to_acc(double x) { return x; }
DEVICE float to_acc(float x) { return x; }
DEVICE float to_acc(bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_acc(float16 x) { return __half2float(x); }

// Rounds to the nearest even.
template <class T>
DEVICE T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __float2half_rn(x);
  else
    return x;
}

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
// With a relative error of 2^-11 at most.
DEVICE float approximate_tanh(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// With a relative error of 2^-16 at most, of the result and of what it lacks of 1, unless one is denormal. Half of 1 +
// the tanh above would err by 2^-12, which is more than a gate near 0 has, and changes how long a state lasts that a
// gate near 1 multiplies in every step.
DEVICE float approximate_sigmoid(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1 + power));
  return result;
}
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE double square_root(double x) { return sqrt(x); }

// ---- tensor cores: sum[16, 8] += a[16, K] b[K, 8], K being 16 for 16-bit factors and 8 for TF32, by all lanes of a
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

}  // namespace seqkernels::device
#endif
