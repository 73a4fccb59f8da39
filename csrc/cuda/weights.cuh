// Recurrent weights as the threads of a CTA have them: fragments, the first of them in registers for all steps, the
// others in shared memory or in L2.
#pragma once
#include "layer.cuh"
#include "mma.cuh"

namespace seqkernels::device {

// What runs beneath products where nothing does.
struct Nothing {
  DEVICE void operator()() const {}
};

// A lane's fragment: at(row of 16, column of a k-block) are two elements of the matrix, the column's and the next's.
template <class T, class At>
DEVICE Fragment read_fragment(At at) {
  Fragment fragment;
#pragma unroll
  for (int word = 0; word < 8; word++) {
    if (sizeof(T) == 4 && word % 4 >= 2) continue;  // comes with the word two before
    const Pair<T> columns = at(row_of_word(lane(), word), column_of_word<T>(lane(), word));
    if constexpr (sizeof(T) == 2)
      fragment.word[word] = bits(columns);
    else
      fragment.word[word] = bits(first(columns)), fragment.word[word + 2] = bits(second(columns));
  }
  return fragment;
}

// The same where neighbouring rows lie side by side: at(row, column) are the row's element and the next's.
template <class T, class At>
DEVICE Fragment read_transposed(At at) {
  Fragment fragment;
#pragma unroll
  for (int word = 0; word < 8; word += 2) {
    const int row = row_of_word(lane(), word), column = column_of_word<T>(lane(), word);
    const Pair<T> rows = at(row, column);
    if constexpr (sizeof(T) == 2) {
      const Pair<T> next = at(row, column + 1);
      fragment.word[word] = bits(pair(first(rows), first(next)));
      fragment.word[word + 1] = bits(pair(second(rows), second(next)));
    } else {
      fragment.word[word] = bits(first(rows)), fragment.word[word + 1] = bits(second(rows));
    }
  }
  return fragment;
}

// The fragments of a thread of a single CTA, in groups: one of each gate, for a k-block of columns and one of the tiles
// of 16 rows that the warp takes; group i is k-block i / M_TILES of tile i % M_TILES. C::layout says how many groups
// are in registers; so many of the others are in shared memory, and the rest is read again in every step from global
// memory (in practice from the L2 cache), where pack_weights() has written it. Backward the matrices are transposed.
template <class C>
class PackedWeights {
 public:
  using T = typename C::T;
  static constexpr int G = C::G, M_TILES = C::M_TILES, groups = C::layout.groups, resident = C::layout.resident;
  static constexpr int begin_of_shared = C::layout.weights();
  static constexpr int group_vec16s = C::layout.group_bytes / static_cast<int>(sizeof(Vec16));
  static constexpr int vec16s = groups * group_vec16s;  // of a direction

  template <class Args>
  DEVICE PackedWeights(const Args& s, int direction)
      : all_(static_cast<const Vec16*>(s.packed) + first_vec16(s.shared_groups, direction), vec16s),
        shared_(begin_of_shared, (s.shared_groups ? s.shared_groups : 1) * C::layout.group_bytes / 4),
        end_of_shared_(resident + s.shared_groups) {
    const int hidden = static_cast<int>(s.hidden);
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[direction]), G * s.hidden * s.hidden);
#pragma unroll
    for (int i = 0; i < resident; i++) {  // through shared memory: unrolled, what reads them would take more registers
      store_group(w_hh, hidden, i, 0);
#pragma unroll
      for (int gate = 0; gate < G; gate++) resident_[i][gate] = from_shared(resident, gate);
    }
#pragma unroll 1
    for (int i = resident; i < end_of_shared_; i++) store_group(w_hh, hidden, i, i - resident);
  }

  // use(k_block, of) for all k-blocks of a tile of 16 rows: of(gate) is a fragment. What `beneath` does, it does once,
  // behind the first products whose weights are in registers.
  template <class Use, class Beneath = Nothing>
  DEVICE void each(int m_tile, Use use, Beneath beneath = {}) const {
#pragma unroll
    for (int i = m_tile; i < resident; i += M_TILES) {
      use(i / M_TILES, [&](int gate) { return resident_[i][gate]; });
      if (i == m_tile) beneath();
    }
    if (m_tile >= resident) beneath();
    if constexpr (resident == groups) return;
    if constexpr (C::MathPolicy::pipelined && groups - resident <= 4)
      if (end_of_shared_ == groups) {
#pragma unroll
        for (int i = 0; i < groups; i++)
          if (i >= resident && i % M_TILES == m_tile) use(i / M_TILES, [&](int gate) { return from_shared(i, gate); });
        return;
      }
    int i = (resident + M_TILES - 1 - m_tile) / M_TILES * M_TILES + m_tile;
#pragma unroll 1
    for (; i < end_of_shared_; i += M_TILES) use(i / M_TILES, [&](int gate) { return from_shared(i, gate); });
#pragma unroll 1
    for (; i < groups; i += M_TILES) use(i / M_TILES, [&](int gate) { return from_packed(i, gate); });
  }

 private:
  // Where one half of a thread's fragment is among those of a group.
  static DEVICE int place(int gate, int half) { return (gate * 2 + half) * C::threads + thread(); }

  // Where all groups of a direction would begin, of which only those behind the shared ones are packed.
  static DEVICE int first_vec16(int shared, int direction) {
    const int before = resident + shared;
    return (direction * (groups - before) - before) * group_vec16s;
  }

  // Brings a group from w_hh to shared memory.
  DEVICE void store_group(Global<const T> w_hh, int hidden, int group, int to) const {
#pragma unroll 1
    for (int gate = 0; gate < G; gate++) {
      const Fragment fragment = read(w_hh, hidden, group, gate);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t* word = fragment.word + half * 4;
        shared_.store_vec16((to * group_vec16s + place(gate, half)) * 4, {{word[0], word[1], word[2], word[3]}});
      }
    }
  }

  static DEVICE Fragment read(Global<const T> w_hh, int hidden, int group, int gate) {
    const int first_row = (thread() / kWarpSize * M_TILES + group % M_TILES) * kMmaRows;
    const int first_column = group / M_TILES * C::k_width;
    const auto elements = [&](int row, int column) {  // of w_hh
      const int count = row < hidden ? two_of(hidden - column) : 0;
      return C::MathPolicy::factors(load_units<C::EVEN>(w_hh, (gate * hidden + row) * hidden + column, count));
    };
    if constexpr (C::variant.backward)
      return read_transposed<T>([&](int row, int column) { return elements(first_column + column, first_row + row); });
    else
      return read_fragment<T>([&](int row, int column) { return elements(first_row + row, first_column + column); });
  }

  DEVICE Fragment from_shared(int group, int gate) const {
    const auto half = [&](int half) {
      return shared_.load_vec16(((group - resident) * group_vec16s + place(gate, half)) * 4);
    };
    return fragment_of(half(0), half(1));
  }
  DEVICE Fragment from_packed(int group, int gate) const {
    const auto half = [&](int half) { return all_.load(group * group_vec16s + place(gate, half)); };
    return fragment_of(half(0), half(1));
  }

  Global<const Vec16> all_;
  Shared<uint32_t> shared_;
  int end_of_shared_;
  Fragment resident_[resident ? resident : 1][G];
};

// The fragments of a thread that has a part of a slice, in `count` groups of N: the first C::RESIDENT fragments in
// registers, the others in shared memory from byte `begin` to `end`.
template <class C, int N>
class SliceWeights {
 public:
  using T = typename C::T;
  static constexpr int RESIDENT = C::RESIDENT;

  // at(group, i, row of 16, column of a k-block) are two elements of fragment i of a group: the column's and the
  // next's.
  template <class At>
  DEVICE SliceWeights(int count, int begin, int end, At at) : others_(begin, (end - begin) / 4), count_(count) {
#pragma unroll
    for (int i = 0; i < RESIDENT; i++) resident_[i] = i / N < count ? read(i, at) : Fragment{};
#pragma unroll 1
    for (int i = RESIDENT; i < count * N; i++) {
      const Fragment fragment = read(i, at);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t* word = fragment.word + half * 4;
        others_.store_vec16(place(i, half), {{word[0], word[1], word[2], word[3]}});
      }
    }
  }

  // use(group, of) for all groups: of(i) is a fragment.
  template <class Use>
  DEVICE void each(Use use) const {
#pragma unroll
    for (int group = 0; group < resident_groups; group++)
      if (group < count_)
        use(group, [&](int i) { return group * N + i < RESIDENT ? resident_[group * N + i] : other(group * N + i); });
#pragma unroll 1
    for (int group = resident_groups; group < count_; group++) use(group, [&](int i) { return other(group * N + i); });
  }

 private:
  static constexpr int resident_groups = (RESIDENT + N - 1) / N;  // of which some fragments are in registers

  static DEVICE int place(int i, int half) { return (((i - RESIDENT) * 2 + half) * C::threads + thread()) * 4; }

  template <class At>
  static DEVICE Fragment read(int i, At at) {
    return read_fragment<T>([&](int row, int column) { return at(i / N, i % N, row, column); });
  }

  DEVICE Fragment other(int i) const {
    return fragment_of(others_.load_vec16(place(i, 0)), others_.load_vec16(place(i, 1)));
  }

  Fragment resident_[RESIDENT];
  Shared<uint32_t> others_;
  int count_;
};

}  // namespace seqkernels::device
