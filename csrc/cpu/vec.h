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

#if defined(__AVX512F__)
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
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

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

inline Vec<float> widen(u16 bits, bfloat16) { return bits_of<Vec<float>>(__builtin_convertvector(bits, u32) << 16); }

inline u16 narrow(Vec<float> x, bfloat16) {  // to nearest, ties to even; NaN stays a (quiet) NaN
  const u32 bits = bits_of<u32>(x);
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32 nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, u16);
}

#if defined(__AVX512F__)
inline Vec<float> widen(u16 bits, float16) { return _mm512_cvtph_ps(bits_of<__m256i>(bits)); }
inline u16 narrow(Vec<float> x, float16) {
  return bits_of<u16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vec<float> widen(u16 bits, float16) { return _mm256_cvtph_ps(bits_of<__m128i>(bits)); }
inline u16 narrow(Vec<float> x, float16) {
  return bits_of<u16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vec<float> widen(u16 half, float16) {
  // Shift exponent and mantissa into place and rescale: multiplying by 2^112 corrects the bias and normalises
  // subnormals; Inf and NaN need their exponent set.
  const u32 bits = __builtin_convertvector(half, u32);
  const Vec<float> magnitude = bits_of<Vec<float>>((bits & 0x7fff) << 13) * 0x1p112f;
  const u32 special = (bits & 0x7c00) == 0x7c00 ? u32{} + 0x7f800000 : u32{};
  return bits_of<Vec<float>>(bits_of<u32>(magnitude) | special | ((bits & 0x8000) << 16));
}
inline u16 narrow(Vec<float> x, float16) {
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
template <class S>
inline Vec<float> load(const S* p) {
  u16 bits;
  memcpy(&bits, p, sizeof(bits));
  return widen(bits, S{});
}

inline void store(float* p, Vec<float> x) { memcpy(p, &x, sizeof(x)); }
inline void store(double* p, Vec<double> x) { memcpy(p, &x, sizeof(x)); }
inline void store(bfloat16* p, Vec<float> x) {
  const u16 bits = narrow(x, bfloat16{});
  memcpy(p, &bits, sizeof(bits));
}
inline void store(float16* p, Vec<float> x) {
  const u16 bits = narrow(x, float16{});
  memcpy(p, &bits, sizeof(bits));
}

template <class S>
inline Vec<Compute<S>> load(const S* p, int64_t n) {
  if (n >= kLanes<Compute<S>>) return load(p);
  S buffer[kLanes<Compute<S>>] = {};
  for (int64_t k = 0; k < n; k++) buffer[k] = p[k];
  return load(buffer);
}
template <class S>
inline void store(S* p, Vec<Compute<S>> x, int64_t n) {
  if (n >= kLanes<Compute<S>>) return store(p, x);
  S buffer[kLanes<Compute<S>>];
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

// ---- factors: what products take, and what they add up in

// Two successive bfloat16 of a row, which AVX512-BF16 multiplies and adds as one.
struct bfloat16x2 {
  bfloat16 low, high;
};

template <class F>
struct SumOf {
  typedef F type;
};
template <>
struct SumOf<bfloat16x2> {
  typedef float type;
};
template <class F>
using Sum = typename SumOf<F>::type;

template <class F>
constexpr int kPerFactor = sizeof(F) / sizeof(Sum<F>) * (std::is_same<F, bfloat16x2>::value ? 2 : 1);

// Factors of a row of n numbers.
template <class F>
inline int64_t factors_of(int64_t n) {
  return (n + kPerFactor<F> - 1) / kPerFactor<F>;
}

// sum + w * x, lane by lane.
template <class F>
inline Vec<Sum<F>> add_product(Vec<Sum<F>> sum, Vec<Sum<F>> w, Vec<Sum<F>> x) {
  return sum + w * x;
}

// x in every lane.
template <class F>
inline Vec<Sum<F>> broadcast(F x) {
  return x - Vec<F>{};
}

#if defined(__AVX512F__)
// Functions that may run AVX512-BF16; they do where the machine has it (see Layer::bfloat16_products).
#define SEQKERNELS_PRODUCT_TARGET __attribute__((target("avx512bf16")))
template <>
SEQKERNELS_PRODUCT_TARGET inline Vec<float> add_product<bfloat16x2>(Vec<float> sum, Vec<float> w, Vec<float> x) {
  return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(w), bits_of<__m512bh>(x));
}
template <>
inline Vec<float> broadcast(bfloat16x2 x) {
  return bits_of<Vec<float>>(_mm512_set1_epi32(bits_of<int>(x)));
}
#else
#define SEQKERNELS_PRODUCT_TARGET
#endif

// A vector of factors, as bits: of the first n numbers from p on, zeros behind them.
template <class F, class S>
inline Vec<Sum<F>> load_factors(const S* p, int64_t n) {
  if constexpr (std::is_same<F, bfloat16x2>::value) {
    S numbers[2 * kLanes<float>] = {};
    memcpy(numbers, p, n < 2 * kLanes<float> ? n * sizeof(S) : sizeof(numbers));
    return bits_of<Vec<float>>(numbers);
  } else {
    return load(p, n);
  }
}

// Numbers [at, at + lanes of a vector) of a row of n numbers; an unpaired last one is paired with zero.
template <class F>
inline void store_factors(F* row, int64_t at, int64_t n, Vec<Sum<F>> x) {
  if constexpr (std::is_same<F, bfloat16x2>::value) {
    bfloat16* numbers = &row->low + at;
    store(numbers, x);
    if (n % 2 && n - at < kLanes<float>) numbers[n - at] = {};
  } else {
    store(row + at, x);
  }
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

// ---- exp, sigmoid and tanh

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  typedef u32 bits;
  static constexpr float lowest = -87.0f, highest = 87.0f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int exponent_bias = 127, mantissa_bits = 23;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2, least error of exp: 3e-9.
  static constexpr float tail[] = {0x1.fffffcp-2f, 0x1.555490p-3f, 0x1.5558f4p-5f, 0x1.123a6ap-7f, 0x1.6a2358p-10f};
};
template <>
struct ExpConstants<double> {
  typedef u64 bits;
  static constexpr double lowest = -708.0, highest = 708.0;
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int exponent_bias = 1023, mantissa_bits = 52;
  // The Taylor series, to a term below half an ulp.
  static constexpr double tail[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                    1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                    1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// x within the bounds; NaN stays NaN.
template <class C>
inline Vec<C> clamp(Vec<C> x, C lowest, C highest) {
  x = x < lowest ? Vec<C>{} + lowest : x;
  return x > highest ? Vec<C>{} + highest : x;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> clamp(Vec<float> x, float lowest, float highest) {  // max and min return their second operand for NaN
  return _mm512_min_ps(_mm512_set1_ps(highest), _mm512_max_ps(_mm512_set1_ps(lowest), x));
}
#elif defined(__AVX2__)
template <>
inline Vec<float> clamp(Vec<float> x, float lowest, float highest) {
  return _mm256_min_ps(_mm256_set1_ps(highest), _mm256_max_ps(_mm256_set1_ps(lowest), x));
}
#endif

// exp(x) = scale * (1 + p): Cody-Waite reduction to |r| <= ln(2)/2, then p = exp(r) - 1 = r + r^2 tail(r). x lies
// between K::lowest and K::highest, where scale is a normal number; NaN stays NaN.
template <class C>
inline void exp_parts(Vec<C> x, Vec<C>& scale, Vec<C>& p) {
  using K = ExpConstants<C>;
  constexpr int kTerms = sizeof(K::tail) / sizeof(C);
  const Vec<C> shifted = x * static_cast<C>(1.4426950408889634) + K::round;
  const Vec<C> n = shifted - K::round;
  const Vec<C> r = (x - n * K::ln2_high) - n * K::ln2_low;
  Vec<C> tail = Vec<C>{} + K::tail[kTerms - 1];
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; k--) tail = tail * r + K::tail[k];
  p = r + r * r * tail;
  scale = bits_of<Vec<C>>((bits_of<typename K::bits>(shifted) + K::exponent_bias) << K::mantissa_bits);
}

// 1 / x for normal x.
template <class V>
inline V reciprocal(V x) {
  return 1 / x;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> reciprocal(Vec<float> x) {  // 14 bits and one Newton step: an ulp, and no wait for the divider
  const Vec<float> y = _mm512_rcp14_ps(x);
  return y + y * (1 - x * y);
}
#endif

template <class V>
using LaneOf = typename std::remove_reference<decltype(V{}[0])>::type;

// Within 2 ulp. 1 + exp(-x) loses nothing before its one rounding, as scale is a power of two.
template <class V>
SEQKERNELS_INLINE V sigmoid(V x) {
  using C = LaneOf<V>;
  V scale, p;
  exp_parts<C>(clamp<C>(-x, ExpConstants<C>::lowest, ExpConstants<C>::highest), scale, p);
  return reciprocal<V>(scale * p + (scale + 1));
}

// Within 4 ulp, near zero as well: e / (e + 2) of e = exp(2x) - 1, whose scale is 1 there.
template <class V>
SEQKERNELS_INLINE V tanh(V x) {
  using C = LaneOf<V>;
  V scale, p;
  constexpr C kOne = sizeof(C) == 4 ? 20 : 40;  // from here on tanh(x / 2) is 1
  exp_parts<C>(clamp<C>(x * 2, -kOne, kOne), scale, p);
  const V e = scale * p + (scale - 1);
  return e * reciprocal<V>(e + 2);
}

}  // namespace seqkernels::SEQKERNELS_ISA
