// W h + b of one CTA: weights that stay where they are for all steps, times the factors of up to 8 sequences (states,
// or gradients of gates), by a math policy: Fp32Fma, Tf32 or TensorCore.
//
// A warp multiplies 16 rows of a matrix, in k-blocks of its columns: 16 bytes of a row for each of the 4 lanes that
// share it. What a lane has of 16 rows by a k-block is a fragment. Of the result, lane l has units 2 (l / 4) and the
// next, each of sequences 2 (l % 4) and the next: the same for tensor cores and for plain multiply-adds.
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace seqkernels::device {

constexpr int kElements = 4;  // of a lane's result: 2 units by 2 sequences, in this order

DEVICE int lane() { return thread() % 32; }
DEVICE int unit_of_lane() { return lane() / 4 * 2; }
DEVICE int sequence_of_lane() { return lane() % 4 * 2; }

struct Fragment {
  uint32_t word[8];
};
DEVICE Fragment fragment_of(Vec16 first, Vec16 second) {
  Fragment fragment;
#pragma unroll
  for (int i = 0; i < 4; i++) fragment.word[i] = first.word[i], fragment.word[4 + i] = second.word[i];
  return fragment;
}

// Which of a k-block's columns a word of a lane's fragment has, and which of the 16 rows; with 16-bit factors a word
// has a column and the next. Tensor cores take rows and columns in any order, as long as both factors have the same
// order of columns. In this one a lane has two rows, and all that it needs of a sequence lies side by side.
DEVICE int row_of_word(int lane, int word) { return lane / 4 * 2 + word % 2; }
template <class T>
DEVICE int column_of_word(int lane, int word) {
  return (lane % 4 * 4 + word / 2) * (4 / static_cast<int>(sizeof(T)));
}

// 16-bit factors (and TF32, below) in tensor cores.
template <class T_>
struct TensorCore {
  using T = T_;
  static constexpr Math math = Math::tensor_core;
  static constexpr bool pipelined = true;  // an MMA waits for the one before on its accumulators: several are in flight
  static constexpr int accumulators = kElements;

  static DEVICE Pair<T> factors(float x, float y) { return pair(from_acc<T>(x), from_acc<T>(y)); }
  static DEVICE Pair<T> factors(Pair<T> numbers) { return numbers; }

  // Adds N products, the two halves of each to different chains of accumulators, N apart, from chain `first` on.
  // weights(i) are the fragments, taken one by one to spare registers.
  template <int N, int CHAINS, class At>
  static DEVICE void add(float (&sum)[CHAINS][accumulators], int first, At weights, Shared<T> factors, int stride,
                         int column) {
    const Vec16 b = factors.load_vec16(lane() / 4 * stride + column + lane() % 4 * (16 / static_cast<int>(sizeof(T))));
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Fragment a = weights(i);
      multiply(T{}, sum[(first + i) % CHAINS], a.word, b.word[0], b.word[1]);
      multiply(T{}, sum[(first + i + N) % CHAINS], a.word + 4, b.word[2], b.word[3]);
    }
  }

  static DEVICE void begin(const float (&result)[kElements], float (&sum)[accumulators]) {
#pragma unroll
    for (int e = 0; e < kElements; e++) sum[e] = result[e];
  }

  static DEVICE void finish(const float (&sum)[accumulators], float (&result)[kElements]) {
#pragma unroll
    for (int e = 0; e < kElements; e++) result[e] = sum[e];
  }
};

// float32 factors rounded to TF32.
struct Tf32 : TensorCore<float> {
  static constexpr Math math = Math::tf32;
  static DEVICE Pair<float> factors(float x, float y) { return pair(tf32(x), tf32(y)); }
  static DEVICE Pair<float> factors(Pair<float> numbers) { return factors(first(numbers), second(numbers)); }
};

// float32 by multiply-adds, for COUNT sequences (1, 2, 4 or 8), of which a lane has PER_LANE in its result: the 4 lanes
// of a row share its columns, and add up at the end.
template <int COUNT, int PER_LANE = 2>
struct Fp32FmaFor {
  static_assert(COUNT <= 4 * PER_LANE);
  using T = float;
  static constexpr Math math = Math::fp32_fma;
  static constexpr bool pipelined = false;
  static constexpr int accumulators = 2 * COUNT;  // of two units

  static DEVICE Pair<float> factors(float x, float y) { return pair(x, y); }
  static DEVICE Pair<float> factors(Pair<float> numbers) { return numbers; }

  template <int N, int CHAINS, class At>
  static DEVICE void add(float (&sum)[CHAINS][accumulators], int, At weights, Shared<T> factors, int stride,
                         int column) {
    static_assert(CHAINS == N);
    Fragment a[N];
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = weights(i);
#pragma unroll
    for (int sequence = 0; sequence < COUNT; sequence++) {
      const Vec16 b = factors.load_vec16(sequence * (2 / PER_LANE) * stride + column + lane() % 4 * 4);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int word = 0; word < 8; word++)
          sum[i][word % 2 * COUNT + sequence] += from_bits(a[i].word[word]) * from_bits(b.word[word / 2]);
    }
  }

  static DEVICE void begin(const float (&)[kElements], float (&sum)[accumulators]) {
#pragma unroll
    for (int i = 0; i < accumulators; i++) sum[i] = 0;
  }

  // The lanes of a row reduce: of all sequences each keeps the half, then the quarter, that is its own.
  static DEVICE void finish(const float (&sum)[accumulators], float (&result)[kElements]) {
    const bool upper = lane() % 4 / 2, odd = lane() % 2;
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
      const auto of = [&](int sequence) { return sequence < COUNT ? sum[unit * COUNT + sequence] : 0; };
      float half[2 * PER_LANE];
#pragma unroll
      for (int i = 0; i < 2 * PER_LANE; i++) {
        half[i] = 0;
        if (i >= COUNT) continue;
        const float received = shfl_xor(upper ? of(i) : of(2 * PER_LANE + i), 2);
        half[i] = (upper ? of(2 * PER_LANE + i) : of(i)) + received;
      }
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        if (i >= COUNT) continue;
        const float received = shfl_xor(odd ? half[i] : half[PER_LANE + i], 1);
        result[unit * 2 + i] += (odd ? half[PER_LANE + i] : half[i]) + received;
      }
    }
  }
};

struct Fp32Fma : Fp32FmaFor<8> {};

// For tiles of one sequence: what lanes have of others may be anything, so that there is nothing to choose.
struct Fp32FmaForOne : Fp32FmaFor<1, 1> {
  static DEVICE void finish(const float (&sum)[accumulators], float (&result)[kElements]) {
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
      const float half = sum[unit] + shfl_xor(sum[unit], 2);
      result[unit * 2] += half + shfl_xor(half, 1);
    }
  }
};

// Calls with the policy for so many sequences, a number that is the same in all threads of a CTA, unless it is for any
// anyway, as an MMA is for 8, or for one. A lane has PER_LANE of them in its result: with 1, no more than 4 come, and
// every other row has their factors.
template <class MathPolicy, int PER_LANE = 2, class Call>
DEVICE void for_sequences(int sequences, Call call) {
  if constexpr (!std::is_same_v<MathPolicy, Fp32Fma>) {
    call(MathPolicy{});
  } else {
    switch ((sequences > 1) + (sequences > 2) + (PER_LANE > 1 && sequences > 4)) {
      case 0: return call(Fp32FmaFor<1, PER_LANE>{});
      case 1: return call(Fp32FmaFor<2, PER_LANE>{});
      case 2: return call(Fp32FmaFor<4, PER_LANE>{});
      default: return call(Fp32FmaFor<4 * PER_LANE, PER_LANE>{});
    }
  }
}

// The accumulators of N results. Where a product waits for the one before, there are at least CHAINS chains, several
// for a result.
template <class MathPolicy, int N, int CHAINS = 2>
class Accumulators {
 public:
  // Starts from the results so far.
  DEVICE explicit Accumulators(const float (&result)[N][kElements]) {
    const float zero[kElements] = {};
#pragma unroll
    for (int i = 0; i < chains; i++) MathPolicy::begin(i < N ? result[i] : zero, sum_[i]);
  }

  // Adds a product to each result, in the chains from `first` on.
  template <class At>
  DEVICE void add(At weights, Shared<typename MathPolicy::T> factors, int stride, int column, int first = 0) {
    MathPolicy::template add<N>(sum_, first, weights, factors, stride, column);
  }

  // Of PER_LANE sequences; the elements of others get nothing that counts.
  template <int PER_LANE = 2>
  DEVICE void finish(float (&result)[N][kElements]) const {
#pragma unroll
    for (int i = 0; i < N; i++) MathPolicy::finish(sum_[i], result[i]);
#pragma unroll
    for (int i = N; i < chains; i++) {
      float more[kElements] = {};
      MathPolicy::finish(sum_[i], more);
#pragma unroll
      for (int e = 0; e < kElements; e++)
        if (e % 2 < PER_LANE) result[i % N][e] += more[e];
    }
  }

 private:
  static constexpr int chains = MathPolicy::pipelined && N < CHAINS ? CHAINS : N;
  float sum_[chains][MathPolicy::accumulators];
};

}  // namespace seqkernels::device
