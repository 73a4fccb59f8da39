// Single steps of layers with layer norm, behind the product W_hh h. A CTA has a row, which is a sequence in one
// direction, so that its norms need no other. A thread has the same units all along, and reads again what it wrote.
#pragma once
#include "norms.cuh"

namespace seqkernels::device {

constexpr int kNormThreads = 256;

// Calls each(unit) for a thread's units.
template <class Each>
DEVICE void for_units(int hidden, Each each) {
  for (int unit = thread(); unit < hidden; unit += kNormThreads) each(unit);
}

// The part of an array that belongs to a row.
template <class T>
struct Part {
  Global<T> all;
  int64_t begin;

  DEVICE explicit operator bool() const { return static_cast<bool>(all); }
  DEVICE T load(int64_t i) const { return all.load(begin + i); }
  DEVICE void store(int64_t i, T value) const { all.store(begin + i, value); }
};

// Where a row has its parts.
struct NormRow {
  const SweepArgs& s;
  int direction;
  int64_t sequence, row;

  // Of arrays [N, D, width], [D, B, width] and [D, width].
  template <class T, class Pointer>
  DEVICE Part<T> of_rows(Pointer data, int64_t width) const {
    return {{static_cast<T*>(data), s.rows * s.directions * width}, (row * s.directions + direction) * width};
  }
  template <class T, class Pointer>
  DEVICE Part<T> of_states(Pointer data, int64_t width) const {
    return {{static_cast<T*>(data), s.directions * s.sequences * width}, (direction * s.sequences + sequence) * width};
  }
  template <class T>
  DEVICE Part<const T> of_direction(const void* data, int64_t width) const {
    return {{static_cast<const T*>(data), s.directions * width}, direction * width};
  }
};

// Means over all units, of which each thread has sums of its own; always in the same order. Each has a place of its own
// in shared memory, so that one barrier is enough.
template <class T>
class CtaMeans {
  static constexpr int kWarps = kNormThreads / kWarpSize, kSums = 4;  // of a step, at most

 public:
  static constexpr int bytes = kSums * kWarps * static_cast<int>(sizeof(T));

  DEVICE CtaMeans() : of_warps_(0, kSums * kWarps) {}

  // From sums to the means of `count` numbers.
  template <int COUNT>
  DEVICE void operator()(T (&sums)[COUNT], int count) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      for (int mask = kWarpSize / 2; mask; mask /= 2) sums[i] += shfl_xor(sums[i], mask);
      if (thread() % kWarpSize == 0) of_warps_.store(next_ + i * kWarps + thread() / kWarpSize, sums[i]);
    }
    synchronize();
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      sums[i] = 0;
      for (int warp = 0; warp < kWarps; warp++) sums[i] += of_warps_.load(next_ + i * kWarps + warp);
      sums[i] /= static_cast<T>(count);
    }
    next_ += COUNT * kWarps;
  }

 private:
  Shared<T> of_warps_;
  int next_ = 0;
};

// Of the numbers x(unit, block) of all units.
template <int BLOCKS, class T, class Number>
DEVICE Moments<T> moments_of(CtaMeans<T>& means, int hidden, Number x) {
  T mean[1] = {}, variance[1] = {};
  for_units(hidden, [&](int unit) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) mean[0] += x(unit, block);
  });
  means(mean, BLOCKS * hidden);
  for_units(hidden, [&](int unit) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      const T difference = x(unit, block) - mean[0];
      variance[0] += difference * difference;
    }
  });
  means(variance, BLOCKS * hidden);
  return {mean[0], 1 / square_root(variance[0] + static_cast<T>(kNormEpsilon))};
}

// What is done to a normalized row.
template <class T>
struct Scale {
  Part<const T> scale, shift;

  DEVICE explicit operator bool() const { return static_cast<bool>(scale); }
  DEVICE T of(int i, T normalized) const { return normalized * scale.load(i) + (shift ? shift.load(i) : 0); }
};

// What both passes have.
template <Cell CELL, class T>
class NormedStep {
 protected:
  static constexpr int G = gates_of(CELL), S = G + (kHasC<CELL> ? 1 : 0);

  DEVICE NormedStep(const NormStep& p, const NormRow& at)
      : p_(p),
        at_(at),
        hidden_(static_cast<int>(p.hidden)),
        gates_x_(at.of_rows<const T>(p.norms.gates_x, G * p.hidden)),
        gates_{at.of_direction<T>(p.norms.scale, G * p.hidden), at.of_direction<T>(p.norms.shift, G * p.hidden)},
        of_c_{at.of_direction<T>(p.norms.scale_c, p.hidden), at.of_direction<T>(p.norms.shift_c, p.hidden)} {}

  DEVICE MaskedStep<CELL, T> masked(int unit) const {
    return {p_.masks, p_, at_.direction, at_.sequence, at_.row, unit};
  }

  DEVICE T x_apart(int column) const { return p_.norms.of_sum ? 0 : gates_x_.load(column); }

  const NormStep& p_;
  const NormRow& at_;
  const int hidden_;
  const Part<const T> gates_x_;
  const Scale<T> gates_, of_c_;
  CtaMeans<T> means_;
};

}  // namespace seqkernels::device
