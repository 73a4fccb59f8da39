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
  static constexpr float round = 0x1.8p23f;   // adding it puts the nearest integer into the low mantissa bits
#if defined(__FMA__) || defined(__aarch64__)  // whose products are not rounded: that of n adds 2e-9 n
  static constexpr float ln2_high = 0x1.62e430p-1f, ln2_low = 0;
#else
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
#endif
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
inline Vec<C> at_most(Vec<C> x, C highest) {
  return x > highest ? Vec<C>{} + highest : x;
}
template <class C>
inline Vec<C> at_least(Vec<C> x, C lowest) {
  return x < lowest ? Vec<C>{} + lowest : x;
}
#if defined(__AVX512F__)  // min and max return their second operand for NaN
template <>
inline Vec<float> at_most(Vec<float> x, float highest) {
  return _mm512_min_ps(_mm512_set1_ps(highest), x);
}
template <>
inline Vec<float> at_least(Vec<float> x, float lowest) {
  return _mm512_max_ps(_mm512_set1_ps(lowest), x);
}
#elif defined(__AVX2__)
template <>
inline Vec<float> at_most(Vec<float> x, float highest) {
  return _mm256_min_ps(_mm256_set1_ps(highest), x);
}
template <>
inline Vec<float> at_least(Vec<float> x, float lowest) {
  return _mm256_max_ps(_mm256_set1_ps(lowest), x);
}
#endif
template <class C>
inline Vec<C> clamp(Vec<C> x, C lowest, C highest) {
  return at_most<C>(at_least<C>(x, lowest), highest);
}

// The coefficient of r^k in (exp(f r) - 1 - f r) / r^2.
template <class C>
constexpr C tail_of(int f, int k) {
  C coefficient = ExpConstants<C>::tail[k];
  for (int i = 0; i < k + 2; i++) coefficient *= f;
  return coefficient;
}

// exp(f x) = scale * (1 + p), f being 2 or -1: Cody-Waite reduction to |f r| <= ln(2)/2, then p = exp(f r) - 1. f x
// lies between K::lowest and K::highest, where scale is a normal number; NaN stays NaN. Operations that wait for each
// other are few, as other vectors do not fill all of the time: so the polynomial takes two terms at once.
template <int f, class C>
inline void exp_parts(Vec<C> x, Vec<C>& scale, Vec<C>& p) {
  using K = ExpConstants<C>;
  constexpr int kTerms = sizeof(K::tail) / sizeof(C), kLast = (kTerms - 1) / 2 * 2;
  constexpr C kRound = K::round + K::exponent_bias;
  const Vec<C> shifted = x * static_cast<C>(f * 1.4426950408889634) + kRound;
  const Vec<C> n = shifted - kRound;
  Vec<C> r = x - n * (K::ln2_high / f);
  if constexpr (K::ln2_low != 0) r = r - n * (K::ln2_low / f);
  const Vec<C> square = r * r;
  const auto two_terms = [&](int k) {
    return k + 1 < kTerms ? r * tail_of<C>(f, k + 1) + tail_of<C>(f, k) : Vec<C>{} + tail_of<C>(f, k);
  };
  Vec<C> tail = two_terms(kLast);
#pragma GCC unroll 16
  for (int k = kLast - 2; k >= 0; k -= 2) tail = tail * square + two_terms(k);
  p = r * f + square * tail;
  scale = bits_of<Vec<C>>(bits_of<typename K::bits>(shifted) << K::mantissa_bits);
}

// x / y for normal y.
template <class V>
inline V quotient(V x, V y) {
  return x / y;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> quotient(Vec<float> x, Vec<float> y) {  // 14 bits and one Newton step: no wait for the divider
  const Vec<float> inverse = _mm512_rcp14_ps(y);
  return x * (inverse + inverse * (1 - y * inverse));
}
#endif

template <class V>
using LaneOf = typename std::remove_reference<decltype(V{}[0])>::type;

// Within 2.5 ulp, and 6 of what is smaller than 1e-7; zero below K::lowest, where it is hardly a normal number, so that
// an infinity times it is NaN, as in torch. 1 + exp(-x) loses nothing before its one rounding, as scale is a power of
// two.
template <class V>
SEQKERNELS_INLINE V sigmoid(V x) {
  using C = LaneOf<V>;
  using K = ExpConstants<C>;
  V scale, p;
  exp_parts<-1, C>(at_most<C>(x, K::highest), scale, p);  // of less it does not matter what they are
  return x < K::lowest ? V{} : quotient<V>(V{} + 1, scale * p + (scale + 1));
}

// Within 4 ulp, near zero as well: (e - 1) / (e + 1) of e = exp(2x), whose scale is 1 there.
template <class V>
SEQKERNELS_INLINE V tanh(V x) {
  using C = LaneOf<V>;
  V scale, p;
  constexpr C kOne = sizeof(C) == 4 ? 10 : 20;  // from here on tanh is 1
  exp_parts<2, C>(clamp<C>(x, -kOne, kOne), scale, p);
  return quotient<V>(scale * p + (scale - 1), scale * p + (scale + 1));
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
