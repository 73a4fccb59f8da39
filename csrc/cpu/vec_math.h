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

#if defined(__AVX512F__)
// A vector of results that are rounded to 16 bits: sigmoid and tanh have relative errors of some 2^-13, and cost half
// as much. In other respects a Vec<float>.
struct RoughVec {
  Vec<float> x;

  RoughVec() : x{} {}
  SEQKERNELS_INLINE RoughVec(Vec<float> x) : x(x) {}
  SEQKERNELS_INLINE RoughVec(float all) : x(Vec<float>{} + all) {}
  SEQKERNELS_INLINE operator Vec<float>() const { return x; }
  friend SEQKERNELS_INLINE RoughVec operator+(RoughVec a, RoughVec b) { return a.x + b.x; }
  friend SEQKERNELS_INLINE RoughVec operator-(RoughVec a, RoughVec b) { return a.x - b.x; }
  friend SEQKERNELS_INLINE RoughVec operator*(RoughVec a, RoughVec b) { return a.x * b.x; }
};

// 2^t = (1 + q) * 2^n, with the nearest integer n; a polynomial with a relative error of 2^-16 of q.
SEQKERNELS_INLINE void rough_exp2(Vec<float> t, Vec<float>& n, Vec<float>& q) {
  n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = t - n;
  q = r *
      (0x1.62e2d60000000p-1f + r * (0x1.ebff080000000p-3f + r * (0x1.c96b680000000p-5f + r * 0x1.3b2a6a0000000p-7f)));
}
SEQKERNELS_INLINE Vec<float> times_power_of_2(Vec<float> x, Vec<float> n) { return _mm512_scalef_ps(x, n); }
SEQKERNELS_INLINE Vec<float> rough_reciprocal(Vec<float> x) { return _mm512_rcp14_ps(x); }

template <>
SEQKERNELS_INLINE RoughVec sigmoid(RoughVec x) {  // an infinite power of 2 gives 0
  Vec<float> n, q;
  rough_exp2(x.x * -0x1.715476p+0f, n, q);
  return rough_reciprocal(1 + times_power_of_2(1 + q, n));
}
template <>
SEQKERNELS_INLINE RoughVec tanh(RoughVec x) {
  constexpr float kOne = 40;  // from here on tanh is 1, and its power of 2 would not be finite at last
  Vec<float> n, q;
  rough_exp2(_mm512_min_ps(_mm512_set1_ps(kOne), x.x * 0x1.715476p+1f), n, q);  // of NaN, min returns it
  const Vec<float> scale = times_power_of_2(Vec<float>{} + 1, n), e = scale * q + (scale - 1);
  return e * rough_reciprocal(e + 2);
}
template <>
SEQKERNELS_INLINE RoughVec relu(RoughVec x) {
  return relu(x.x);
}
template <class S>
using cell_t = typename std::conditional<sizeof(S) == 2, RoughVec, Vec<acc_t<S>>>::type;
#else
template <class S>
using cell_t = Vec<acc_t<S>>;
#endif

}  // namespace seqkernels::SEQKERNELS_ISA
