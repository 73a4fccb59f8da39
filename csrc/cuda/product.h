// W h + b of one block: weights that stay where they are for all steps, times the states of up to 8 sequences.
//
// A warp multiplies 16 rows of a matrix, in chunks of its columns: 16 bytes of a row for each of the 4 lanes that share
// it. What a lane holds of 16 rows by a chunk is a fragment. Of the sums, lane l has for units l / 4 and l / 4 + 8
// those of sequences 2 (l % 4) and the next: the same for matrix cores and for plain multiplications.
#pragma once
#include "device.h"

namespace seqkernels::device {

constexpr int kSequences = 8;  // that a block takes at most; what the matrix cores multiply at once
constexpr int kUnits = 16;     // rows of a matrix that a warp multiplies at once
constexpr int kElements = 4;   // of kUnits by kSequences that a lane has

DEVICE int lane() { return thread() % 32; }
DEVICE int unit_of(int element) { return lane() / 4 + element / 2 * 8; }
DEVICE int sequence_of(int element) { return lane() % 4 * 2 + element % 2; }

struct Fragment {
  uint32_t word[8];
};

// Which of a chunk's columns a word of a fragment holds, and which of the 16 rows; with 16-bit factors a word holds a
// column and the next. The columns are in an order in which a lane finds all that it needs of a sequence side by side;
// the matrix cores sum over columns in any order, as long as it is the same for both factors.
DEVICE int row_of_word(int word) { return lane() / 4 + word % 2 * 8; }
template <class T>
DEVICE int column_of_word(int word) {
  return (lane() % 4 * 4 + word / 2) * (4 / static_cast<int>(sizeof(T)));
}

// The states of a block's sequences, or gradients of gates: `width` factors of each, in shared memory.
template <class T>
struct Factors {
  static constexpr int chunk = 64 / sizeof(T);
  // Rows begin 64 bytes apart modulo 128, so that 8 lanes read 16 bytes each from different banks.
  static constexpr int stride(int width) { return width + (width / chunk % 2 ? 0 : chunk); }
  static constexpr int bytes(int width) { return kSequences * stride(width) * static_cast<int>(sizeof(T)); }
};

// Matrix cores.
template <class T_>
struct MatrixCores {
  using T = T_;
  static constexpr bool splits_sums = true;  // each product waits for the one before, so several are under way
  static constexpr int sums = kElements;

  static DEVICE T factor(float x) { return Narrow<T>::of(x); }

  template <int N>
  static DEVICE void add(float (*sum)[sums], const Fragment (&weights)[N], Shared<T> factors, int stride, int column) {
    const Words b = factors.load_words(lane() / 4 * stride + column + lane() % 4 * (16 / static_cast<int>(sizeof(T))));
#pragma unroll
    for (int i = 0; i < N; i++) {
      multiply(T{}, sum[i], weights[i].word, b.word[0], b.word[1]);
      multiply(T{}, sum[i], weights[i].word + 4, b.word[2], b.word[3]);
    }
  }

  static DEVICE void begin(const float (&result)[kElements], float (&sum)[sums]) {
#pragma unroll
    for (int e = 0; e < kElements; e++) sum[e] = result[e];
  }

  static DEVICE void finish(const float (&sum)[sums], float (&result)[kElements]) {
#pragma unroll
    for (int e = 0; e < kElements; e++) result[e] = sum[e];
  }
};

// float32 factors rounded to TF32.
struct Tf32 : MatrixCores<float> {
  static DEVICE float factor(float x) { return tf32(x); }
};

// Exact float32, without matrix cores: the 4 lanes of a row share its columns, and add up at the end.
struct Exact {
  using T = float;
  static constexpr bool splits_sums = false;
  static constexpr int sums = 2 * kSequences;  // of two units

  static DEVICE float factor(float x) { return x; }

  template <int N>
  static DEVICE void add(float (*sum)[sums], const Fragment (&weights)[N], Shared<T> factors, int stride, int column) {
#pragma unroll
    for (int sequence = 0; sequence < kSequences; sequence++) {
      const Words b = factors.load_words(sequence * stride + column + lane() % 4 * 4);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int word = 0; word < 8; word++)
          sum[i][word % 2 * kSequences + sequence] += from_bits(weights[i].word[word]) * from_bits(b.word[word / 2]);
    }
  }

  static DEVICE void begin(const float (&)[kElements], float (&sum)[sums]) {
#pragma unroll
    for (int i = 0; i < sums; i++) sum[i] = 0;
  }

  // Of 8 sequences, a lane keeps the half, and then the quarter, that is its own, and gives the rest away.
  static DEVICE void finish(const float (&sum)[sums], float (&result)[kElements]) {
    const bool upper = lane() % 4 / 2, odd = lane() % 2;
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
      const float* of = sum + unit * kSequences;
      float half[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float given = exchange(upper ? of[i] : of[4 + i], 2);
        half[i] = (upper ? of[4 + i] : of[i]) + given;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float given = exchange(odd ? half[i] : half[2 + i], 1);
        result[unit * 2 + i] += (odd ? half[2 + i] : half[i]) + given;
      }
    }
  }
};

// The fragments of a thread: the first HELD in registers, the others in shared memory from `byte` on.
template <class T, int FRAGMENTS, int HELD, int THREADS>
class Weights {
 public:
  static constexpr int held = HELD < FRAGMENTS ? HELD : FRAGMENTS;
  static constexpr int bytes = (FRAGMENTS - held) * THREADS * static_cast<int>(sizeof(Fragment));

  // at(fragment, row of 16, column of a chunk) is an element of the matrix.
  template <class At>
  DEVICE Weights(int byte, At at) : others_(byte, bytes / 4) {
#pragma unroll
    for (int i = 0; i < held; i++)
#pragma unroll
      for (int word = 0; word < 8; word++) held_[i].word[word] = read(i, word, at);
    for (int i = held; i < FRAGMENTS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Words words;
#pragma unroll
        for (int word = 0; word < 4; word++) words.word[word] = read(i, half * 4 + word, at);
        others_.store_words(place(i, half), words);
      }
  }

  DEVICE Fragment operator[](int i) const {
    if (i < held) return held_[i];
    Fragment fragment;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Words words = others_.load_words(place(i, half));
#pragma unroll
      for (int word = 0; word < 4; word++) fragment.word[half * 4 + word] = words.word[word];
    }
    return fragment;
  }

 private:
  static DEVICE int place(int i, int half) { return (((i - held) * 2 + half) * THREADS + thread()) * 4; }

  template <class At>
  static DEVICE uint32_t read(int i, int word, At at) {
    const int row = row_of_word(word), column = column_of_word<T>(word);
    if constexpr (sizeof(T) == 2)
      return pair(at(i, row, column), at(i, row, column + 1));
    else
      return bits(at(i, row, column));
  }

  Fragment held_[held];
  Shared<uint32_t> others_;
};

}  // namespace seqkernels::device
