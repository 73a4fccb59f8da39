// W h + b of one block: weights that stay where they are for all steps, times the states of up to 8 sequences.
//
// A warp multiplies 16 rows of a matrix, in chunks of its columns: 16 bytes of a row for each of the 4 lanes that share
// it. What a lane holds of 16 rows by a chunk is a fragment. Of the sums, lane l has for units 2 (l / 4) and the next
// those of sequences 2 (l % 4) and the next: the same for matrix cores and for plain multiplications.
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace seqkernels::device {

constexpr int kSequences = 8;  // that a block takes at most; what the matrix cores multiply at once
constexpr int kUnits = 16;     // rows of a matrix that a warp multiplies at once
constexpr int kElements = 4;   // of kUnits by kSequences that a lane has: 2 units by 2 sequences, in this order

DEVICE int lane() { return thread() % 32; }
DEVICE int unit_of_lane() { return lane() / 4 * 2; }
DEVICE int sequence_of_lane() { return lane() % 4 * 2; }

struct Fragment {
  uint32_t word[8];
};
DEVICE Fragment fragment_of(Words first, Words second) {
  Fragment fragment;
#pragma unroll
  for (int i = 0; i < 4; i++) fragment.word[i] = first.word[i], fragment.word[4 + i] = second.word[i];
  return fragment;
}

// Which of a chunk's columns a word of a lane's fragment holds, and which of the 16 rows; with 16-bit factors a word
// holds a column and the next. The matrix cores take rows and columns in any order, as long as columns have the same in
// both factors: in this one a lane has two rows, and of a sequence all that it needs, side by side.
DEVICE int row_of_word(int lane, int word) { return lane / 4 * 2 + word % 2; }
template <class T>
DEVICE int column_of_word(int lane, int word) {
  return (lane % 4 * 4 + word / 2) * (4 / static_cast<int>(sizeof(T)));
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

  static DEVICE Pair<T> factors(float x, float y) { return pair(Narrow<T>::of(x), Narrow<T>::of(y)); }
  static DEVICE Pair<T> factors(Pair<T> numbers) { return numbers; }

  // Adds N products, the two halves of each to chains one after the other from `first` on, N apart; weights(i) are the
  // fragments, taken one by one to spare registers.
  template <int N, int CHAINS, class At>
  static DEVICE void add(float (&sum)[CHAINS][sums], int first, At weights, Shared<T> factors, int stride, int column) {
    const Words b = factors.load_words(lane() / 4 * stride + column + lane() % 4 * (16 / static_cast<int>(sizeof(T))));
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Fragment a = weights(i);
      multiply(T{}, sum[(first + i) % CHAINS], a.word, b.word[0], b.word[1]);
      multiply(T{}, sum[(first + i + N) % CHAINS], a.word + 4, b.word[2], b.word[3]);
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
  static DEVICE Pair<float> factors(float x, float y) { return pair(tf32(x), tf32(y)); }
  static DEVICE Pair<float> factors(Pair<float> numbers) { return factors(first(numbers), second(numbers)); }
};

// Exact float32, without matrix cores, for COUNT sequences (1, 2, 4 or 8): the 4 lanes of a row share its columns, and
// add up at the end.
template <int COUNT>
struct ExactFor {
  using T = float;
  static constexpr bool splits_sums = false;
  static constexpr int sums = 2 * COUNT;  // of two units

  static DEVICE Pair<float> factors(float x, float y) { return pair(x, y); }
  static DEVICE Pair<float> factors(Pair<float> numbers) { return numbers; }

  template <int N, int CHAINS, class At>
  static DEVICE void add(float (&sum)[CHAINS][sums], int, At weights, Shared<T> factors, int stride, int column) {
    static_assert(CHAINS == N);
    Fragment a[N];
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = weights(i);
#pragma unroll
    for (int sequence = 0; sequence < COUNT; sequence++) {
      const Words b = factors.load_words(sequence * stride + column + lane() % 4 * 4);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int word = 0; word < 8; word++)
          sum[i][word % 2 * COUNT + sequence] += from_bits(a[i].word[word]) * from_bits(b.word[word / 2]);
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
      const auto of = [&](int sequence) { return sequence < COUNT ? sum[unit * COUNT + sequence] : 0; };
      float half[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        half[i] = 0;
        if (i >= COUNT) continue;
        const float given = exchange(upper ? of(i) : of(4 + i), 2);
        half[i] = (upper ? of(4 + i) : of(i)) + given;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (i >= COUNT) continue;
        const float given = exchange(odd ? half[i] : half[2 + i], 1);
        result[unit * 2 + i] += (odd ? half[2 + i] : half[i]) + given;
      }
    }
  }
};

struct Exact : ExactFor<8> {};

// Call with what multiplies for so many sequences, as many in all threads of a block. The matrix cores take 8 at once.
template <class Product, class Call>
DEVICE void for_sequences(int sequences, Call call) {
  if constexpr (Product::splits_sums) {
    call(Product{});
  } else {
    switch ((sequences > 1) + (sequences > 2) + (sequences > 4)) {
      case 0: return call(ExactFor<1>{});
      case 1: return call(ExactFor<2>{});
      case 2: return call(ExactFor<4>{});
      default: return call(ExactFor<8>{});
    }
  }
}

// The sums of N results. Where products wait for each other, those of a result are added up in several chains, at least
// CHAINS of them together.
template <class Product, int N, int CHAINS = 2>
class Sums {
 public:
  // That begin with the results so far.
  DEVICE explicit Sums(const float (&result)[N][kElements]) {
    const float zero[kElements] = {};
#pragma unroll
    for (int i = 0; i < chains; i++) Product::begin(i < N ? result[i] : zero, sum_[i]);
  }

  // Adds a product to each result, by the chains from `first` on.
  template <class At>
  DEVICE void add(At weights, Shared<typename Product::T> factors, int stride, int column, int first = 0) {
    Product::template add<N>(sum_, first, weights, factors, stride, column);
  }

  DEVICE void finish(float (&result)[N][kElements]) const {
#pragma unroll
    for (int i = 0; i < N; i++) Product::finish(sum_[i], result[i]);
#pragma unroll
    for (int i = N; i < chains; i++) {
      float more[kElements] = {};
      Product::finish(sum_[i], more);
#pragma unroll
      for (int e = 0; e < kElements; e++) result[i % N][e] += more[e];
    }
  }

 private:
  static constexpr int chains = Product::splits_sums && N < CHAINS ? CHAINS : N;
  float sum_[chains][Product::sums];
};

// The fragments of a thread, in groups: one of each of G gates, for a chunk of columns and one of the BLOCKS of 16
// units that a warp takes; group i is chunk i / BLOCKS of block i % BLOCKS. The first HELD groups are in registers, so
// many of the others in shared memory, and what is left stays in global memory (in practice in the L2 cache), from
// where each step reads it anew.
template <int G, int BLOCKS, int CHUNKS, int HELD, int THREADS>
class Weights {
 public:
  static constexpr int groups = CHUNKS * BLOCKS, held = HELD < groups ? HELD : groups, others = groups - held;
  static constexpr int group_words = G * 2 * THREADS;  // Words (16 bytes) of a group
  static constexpr int group_bytes = group_words * static_cast<int>(sizeof(Words));
  static constexpr int words = groups * group_words;  // of a direction

  // `arranged`: the weights as an ArrangeKernel writes them; `shared` groups go to shared memory, from `byte` on.
  DEVICE Weights(const void* arranged, int direction, int byte, int shared)
      : all_(static_cast<const Words*>(arranged) + direction * words, words),
        shared_(byte, shared * group_bytes / 4),
        end_of_shared_(held + shared) {
#pragma unroll
    for (int i = 0; i < held; i++)
#pragma unroll
      for (int gate = 0; gate < G; gate++) held_[i][gate] = from_global(i, gate);
#pragma unroll 1
    for (int i = held; i < end_of_shared_; i++)
#pragma unroll
      for (int at = thread(); at < group_words; at += THREADS)
        shared_.store_words(((i - held) * group_words + at) * 4, all_.load(i * group_words + at));
  }

  // use(chunk, of) for all chunks of a block: of(gate) is a fragment.
  template <class Use>
  DEVICE void each(int block, Use use) const {
#pragma unroll
    for (int i = block; i < held; i += BLOCKS) use(i / BLOCKS, [&](int gate) { return held_[i][gate]; });
    int i = (held + BLOCKS - 1 - block) / BLOCKS * BLOCKS + block;
#pragma unroll 1
    for (; i < end_of_shared_; i += BLOCKS) use(i / BLOCKS, [&](int gate) { return from_shared(i, gate); });
#pragma unroll 1
    for (; i < groups; i += BLOCKS) use(i / BLOCKS, [&](int gate) { return from_global(i, gate); });
  }

 private:
  // Word `half` of a thread's fragment among those of a group.
  static DEVICE int place(int gate, int half) { return (gate * 2 + half) * THREADS + thread(); }

  DEVICE Fragment from_shared(int group, int gate) const {
    const auto half = [&](int half) {
      return shared_.load_words(((group - held) * group_words + place(gate, half)) * 4);
    };
    return fragment_of(half(0), half(1));
  }
  DEVICE Fragment from_global(int group, int gate) const {
    const auto half = [&](int half) { return all_.load(group * group_words + place(gate, half)); };
    return fragment_of(half(0), half(1));
  }
  Global<const Words> all_;
  Shared<uint32_t> shared_;
  int end_of_shared_;
  Fragment held_[held][G];
};

// Write the recurrent weights in the order in which the threads of a block hold them: for each direction, fragment and
// half of a fragment, 16 bytes of each thread. A fragment is `gate` of the `chunk` of columns of the `block` of 16
// units of the thread's warp, and its number (chunk * blocks + block) * gates + gate.
template <class T>
struct ArrangeKernel {
  static constexpr int threads = 128;
  using Parameters = Arrange;

  static DEVICE void run(const Arrange& p) {
    constexpr int chunk_width = Factors<T>::chunk;
    const int lanes = p.width / (kUnits * p.blocks) * 32, fragments = p.width / chunk_width * p.blocks * p.gates;
    const int i = static_cast<int>(block()) * threads + thread(), hidden = p.hidden;
    if (i >= fragments * 2 * lanes) return;
    const int lane = i % lanes, half = i / lanes % 2, fragment = i / lanes / 2;
    const int gate = fragment % p.gates, block = fragment / p.gates % p.blocks, chunk = fragment / p.gates / p.blocks;
    const int64_t matrix = int64_t(hidden) * hidden;
    const Global<const T> w_hh(static_cast<const T*>(p.w_hh[block_y()]), p.gates * matrix);
    const auto factor = [&](int row, int column) {
      if (row >= hidden || column >= hidden) return Narrow<T>::of(0);
      const int64_t at = p.transposed ? int64_t(column) * hidden + row : int64_t(row) * hidden + column;
      const T weight = w_hh.load(gate * matrix + at);
      if constexpr (sizeof(T) == 4) return p.tf32 ? tf32(weight) : weight;
      return weight;
    };
    Words words;
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const int row = (lane / 32 * p.blocks + block) * kUnits + row_of_word(lane % 32, half * 4 + word);
      const int column = chunk * chunk_width + column_of_word<T>(lane % 32, half * 4 + word);
      if constexpr (sizeof(T) == 4)
        words.word[word] = bits(factor(row, column));
      else
        words.word[word] = bits(pair(factor(row, column), factor(row, column + 1)));
    }
    const int all = fragments * 2 * lanes;
    Global<Words>(static_cast<Words*>(p.result) + block_y() * all, all).store(i, words);
  }
};

}  // namespace seqkernels::device
