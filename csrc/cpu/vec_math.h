// exp, sigmoid and tanh of SIMD vectors.
#pragma once
#include "vec.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  typedef u32 bits;
  static constexpr float lowest = -87.0f, highest = 87.0f;
  static constexpr float round = 0x1.8p23f;  // adding it puts the nearest integer into the low mantissa bits
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int exponent_bias = 127, mantissa_bits = 23;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2, where the error of exp is 3e-9 at most.
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

// Within 2.5 ulp; zero below K::lowest, where it is hardly a normal number, so that an infinity times it is NaN, as in
// torch. 1 + exp(-x) loses nothing before its one rounding, as scale is a power of two.
template <class V>
SEQKERNELS_INLINE V sigmoid(V x) {
  using C = LaneOf<V>;
  using K = ExpConstants<C>;
  V scale, p;
  exp_parts<C>(clamp<C>(-x, K::lowest, K::highest), scale, p);
  return x < K::lowest ? V{} : reciprocal<V>(scale * p + (scale + 1));
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
