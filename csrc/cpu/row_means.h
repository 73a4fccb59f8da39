// Means over a row of numbers: what layer norm divides by and subtracts.
#pragma once
#include "layout.h"

namespace seqkernels::SEQKERNELS_ISA {

// The first n lanes; zeros behind them.
template <class C>
inline Vec<C> first_of(Vec<C> x, int64_t n) {
  if (n >= kLanes<C>) return x;
  C lanes[kLanes<C>] = {};
  store(lanes, x, n);
  return load(lanes);
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// The means of kCount rows of n numbers: each(i, sums) adds vector i of every row to its own sum; what it adds behind
// the last number of a row does not count.
template <class C, int kCount, class Each>
SEQKERNELS_INLINE void means_of(int64_t n, C* means, const Each& each) {
  constexpr int V = kLanes<C>, kChains = 4 / kCount;  // side by side, as an addition takes some cycles
  Vec<C> sums[kChains][kCount] = {};
  int64_t i = 0;
  for (; i + kChains * V <= n; i += kChains * V)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; chain++) each(i + chain * V, sums[chain]);
  for (; i < n; i += V) {
    Vec<C> last[kCount] = {};
    each(i, last);
    for (int k = 0; k < kCount; k++) sums[0][k] += first_of<C>(last[k], n - i);
  }
  for (int k = 0; k < kCount; k++) {
    C sum = 0;
    for (int chain = 1; chain < kChains; chain++) sums[0][k] += sums[chain][k];
    for (int lane = 0; lane < V; lane++) sum += sums[0][k][lane];
    means[k] = sum / static_cast<C>(n);
  }
}

// What a row is normalized by: (x - mean) * inverse.
template <class C>
struct Moments {
  C mean, inverse;

  // Of n numbers, behind which a vector may be read.
  Moments(const C* x, int64_t n) {
    C variance;
    means_of<C, 1>(n, &mean, [&](int64_t i, Vec<C>* sum) { *sum += load(x + i); });
    means_of<C, 1>(n, &variance, [&, mean = mean](int64_t i, Vec<C>* sum) {
      const Vec<C> difference = load(x + i) - mean;
      *sum += difference * difference;
    });
    inverse = 1 / square_root(variance + static_cast<C>(kNormEpsilon));
  }
  Moments(C mean, C inverse) : mean(mean), inverse(inverse) {}

  Vec<C> of(Vec<C> x) const { return (x - mean) * inverse; }
};

// The gradient of x, from that of x normalized: both vectors of a row, and the means over it of that gradient, and of
// that times x normalized.
template <class C>
SEQKERNELS_INLINE Vec<C> normalized_backward(Vec<C> grad, Vec<C> normalized, const C* means, C inverse) {
  return inverse * (grad - means[0] - normalized * means[1]);
}

}  // namespace seqkernels::SEQKERNELS_ISA
