// SIMD vectors of the instruction set this file is compiled for, by the vector extension of GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what stands in innermost loops, whatever the compiler thinks of its size.
#define SEQKERNELS_INLINE inline __attribute__((always_inline))

namespace seqkernels::SEQKERNELS_ISA {

#if defined(__AVX512F__) || defined(SEQKERNELS_EMULATED_TILES)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 24;
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class S>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class S>
using acc_t = typename AccOf<S>::type;

template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vec = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- 16-bit conversions

typedef uint32_t u32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t u64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t u16 __attribute__((vector_size(kVectorBytes / 2)));  // half a vector

inline Vec<float> to_acc(u16 bits, bfloat16) { return bits_of<Vec<float>>(__builtin_convertvector(bits, u32) << 16); }

inline u16 from_acc(Vec<float> x, bfloat16) {  // to nearest, ties to even; NaN stays a (quiet) NaN
  const u32 bits = bits_of<u32>(x);
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32 nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, u16);
}

#if defined(__AVX512F__)
inline Vec<float> to_acc(u16 bits, float16) { return _mm512_cvtph_ps(bits_of<__m256i>(bits)); }
inline u16 from_acc(Vec<float> x, float16) {
  return bits_of<u16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vec<float> to_acc(u16 bits, float16) { return _mm256_cvtph_ps(bits_of<__m128i>(bits)); }
inline u16 from_acc(Vec<float> x, float16) {
  return bits_of<u16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vec<float> to_acc(u16 half, float16) {
  // Shift exponent and mantissa into place and rescale: multiplying by 2^112 corrects the bias and normalises
  // subnormals; Inf and NaN need their exponent set.
  const u32 bits = __builtin_convertvector(half, u32);
  const Vec<float> magnitude = bits_of<Vec<float>>((bits & 0x7fff) << 13) * 0x1p112f;
  const u32 special = (bits & 0x7c00) == 0x7c00 ? u32{} + 0x7f800000 : u32{};
  return bits_of<Vec<float>>(bits_of<u32>(magnitude) | special | ((bits & 0x8000) << 16));
}
inline u16 from_acc(Vec<float> x, float16) {
  const u32 bits = bits_of<u32>(x);
  const u32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal numbers: rebias and round to nearest even. Too large ones become Inf.
  const u32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal ones: adding 0.5 makes the hardware round at the last bit of a half.
  const u32 tiny = bits_of<u32>(bits_of<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  u32 half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? u32{} + 0x7c00 : half;
  half = magnitude > 0x7f800000u ? u32{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, u16);
}
#endif

inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }

// ---- loads and stores: whole vectors, and the first n lanes (zeros behind them)

inline Vec<float> load(const float* p) {
  Vec<float> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline Vec<double> load(const double* p) {
  Vec<double> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline Vec<int32_t> load(const int32_t* p) {
  Vec<int32_t> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class S>
inline Vec<float> load(const S* p) {
  u16 bits;
  memcpy(&bits, p, sizeof(bits));
  return to_acc(bits, S{});
}

inline void store(float* p, Vec<float> x) { memcpy(p, &x, sizeof(x)); }
inline void store(double* p, Vec<double> x) { memcpy(p, &x, sizeof(x)); }
inline void store(bfloat16* p, Vec<float> x) {
  const u16 bits = from_acc(x, bfloat16{});
  memcpy(p, &bits, sizeof(bits));
}
inline void store(float16* p, Vec<float> x) {
  const u16 bits = from_acc(x, float16{});
  memcpy(p, &bits, sizeof(bits));
}

template <class S>
inline Vec<acc_t<S>> load(const S* p, int64_t n) {
  if (n >= kLanes<acc_t<S>>) return load(p);
  S buffer[kLanes<acc_t<S>>] = {};
  for (int64_t k = 0; k < n; k++) buffer[k] = p[k];
  return load(buffer);
}
template <class S>
inline void store(S* p, Vec<acc_t<S>> x, int64_t n) {
  if (n >= kLanes<acc_t<S>>) return store(p, x);
  S buffer[kLanes<acc_t<S>>];
  store(buffer, x);
  for (int64_t k = 0; k < n; k++) p[k] = buffer[k];
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
inline Vec<float> load(const float* p, int64_t n) {
  return n >= 16 ? load(p) : _mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
inline void store(float* p, Vec<float> x, int64_t n) {
  n >= 16 ? store(p, x) : _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
template <>
inline Vec<float> load(const bfloat16* p, int64_t n) {
  return n >= 16 ? load(p) : to_acc(bits_of<u16>(_mm256_maskz_loadu_epi16(first_lanes(n), p)), bfloat16{});
}
template <>
inline void store(bfloat16* p, Vec<float> x, int64_t n) {
  n >= 16 ? store(p, x) : _mm256_mask_storeu_epi16(p, first_lanes(n), bits_of<__m256i>(from_acc(x, bfloat16{})));
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vec<float> load(const float* p, int64_t n) {
  return n >= 8 ? load(p) : _mm256_maskload_ps(p, first_lanes(n));
}
template <>
inline void store(float* p, Vec<float> x, int64_t n) {
  n >= 8 ? store(p, x) : _mm256_maskstore_ps(p, first_lanes(n), x);
}
#endif

template <class S>
inline float scalar(S x) {
  return load(&x, 1)[0];
}

// x that is to be used so many times. If these are several it stays in a register: GCC would rather read memory again
// for each, and the loads take longer than what is made of them.
template <int kUses, class V>
SEQKERNELS_INLINE V in_register(V x) {
#if defined(__x86_64__) && !defined(SEQKERNELS_EMULATED_TILES)  // whose vectors are wider than registers
  if constexpr (kUses > 1) asm("" : "+v"(x));
#endif
  return x;
}

// Lanes of a and b side by side, by their numbers.
template <class C, int... kLane>
inline Vec<C> shuffle(Vec<C> a, Vec<C> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  typedef typename std::conditional<sizeof(C) == 4, u32, u64>::type Lanes;
  return __builtin_shuffle(a, b, Lanes{kLane...});
#endif
}

}  // namespace seqkernels::SEQKERNELS_ISA
