// A sweep in one launch: a CTA takes up to 8 sequences through all their steps, with the recurrent weights in its
// registers and shared memory, as far as these go. CTAs know nothing of each other; both directions run side by side
// (the second index of a CTA). A thread has the same units and sequences in all steps, and their states in registers.
// What the other threads need of them goes through shared memory, in two buffers, so that one barrier a step is enough.
#pragma once
#include "masks.cuh"
#include "pieces.cuh"
#include "rough.cuh"
#include "walk.cuh"
#include "weights.cuh"

namespace seqkernels::device {

// A kernel for layers of up to WIDTH units, in which the rows of kResident for ARCH hold.
template <Arch ARCH, Cell CELL_, class MathPolicy_, bool BACKWARD, int WIDTH_, bool EVEN_>
struct SingleCtaConfig {
  using MathPolicy = MathPolicy_;
  using T = typename MathPolicy::T;
  static constexpr Cell CELL = CELL_;
  static constexpr bool EVEN = EVEN_, one_sequence = false;
  static constexpr Variant variant = variant_of(ARCH, CELL, MathPolicy::math, BACKWARD, EVEN);
  static constexpr SingleCtaLayout layout = single_cta_layout(variant, WIDTH_);
  static constexpr int G = gates_of(CELL), WIDTH = WIDTH_, M_TILES = layout.m_tiles, threads = layout.threads;
  static constexpr int k_width = k_block_width(MathPolicy::math);
  static_assert(WIDTH % k_width == 0 && WIDTH % (kMmaRows * M_TILES) == 0 && layout.resident > 0);
};

// The same for layers with masks.
template <Arch ARCH, Cell CELL, class MathPolicy, bool BACKWARD, int WIDTH>
struct MaskedConfig : SingleCtaConfig<ARCH, CELL, MathPolicy, BACKWARD, WIDTH, false> {
  using Plain = SingleCtaConfig<ARCH, CELL, MathPolicy, BACKWARD, WIDTH, false>;
  static constexpr SingleCtaLayout layout = masked_single_cta_layout(Plain::variant, WIDTH);
};

// The same for tiles of one sequence, if has_one_sequence().
template <class C>
struct OneSequence : C {
  using MathPolicy = Fp32FmaForOne;
  static constexpr bool one_sequence = true;
  static constexpr SingleCtaLayout layout = one_sequence_layout(C::variant, C::WIDTH);
};

template <class Pass>
struct SingleCtaArgs : Pass {
  const void* packed;  // what pack_weights() has written: the weights that neither registers nor shared memory hold
  int tile;            // sequences that a CTA takes: 1 to kMaxTile
  int shared_groups;   // of the weights, in shared memory
};

// What a thread has in either pass: of each of its tiles of 16 rows two units side by side, in S sequences: two, or one
// where the tile has at most 4, so that they are shared among all lanes. Element e of them is unit e / 2 in sequence
// e % 2.
template <class C, int S = 2>
struct ThreadTile {
  using T = typename C::T;
  static constexpr int stride = C::layout.stride, buffer_bytes = C::layout.buffers / 2;

  // One of the two buffers of factors.
  static DEVICE Shared<T> factors(int which) {
    return {which * buffer_bytes, buffer_bytes / static_cast<int>(sizeof(T))};
  }

  const Tile& tile;
  int64_t hidden, states;   // of all directions and sequences
  int64_t first_state;      // where element 0 of tile 0 is among them
  Lane lane;                // its sequence and unit
  int present[C::M_TILES];  // of the two units, how many the layer has

  DEVICE ThreadTile(const SweepArgs& s, const Tile& tile)
      : tile(tile),
        hidden(s.hidden),
        states(s.directions * s.sequences * s.hidden),
        lane{sequence_of_lane() * S / 2, thread() / kWarpSize * C::M_TILES * kMmaRows + unit_of_lane()} {
    first_state = (tile.direction() * s.sequences + tile.first() + lane.sequence) * hidden + lane.unit;
#pragma unroll
    for (int m = 0; m < C::M_TILES; m++) {
      present[m] = two_of(static_cast<int>(hidden) - lane.unit - m * kMmaRows);
#pragma unroll
      for (int i = 0; i < 2; i++) sequence_[m][i] = i < present[m] ? lane.sequence : kMaxTile;
    }
  }

  // Calls with a tile of 16 rows and one of the sequences.
  template <class Do>
  DEVICE void each(Do act) const {
#pragma unroll
    for (int m = 0; m < C::M_TILES; m++)
#pragma unroll
      for (int s = 0; s < S; s++) act(m, s);
  }

  // Whether there is unit i, of a sequence that is among so many of the tile.
  DEVICE bool runs(int m, int s, int i, int sequences) const { return sequence_[m][C::EVEN ? 0 : i] + s < sequences; }

  // Zeros, as factors of the sequences that no tile has: blocks of WIDTH.
  DEVICE void clear_others(int blocks) const {
    if constexpr (S == 1)
#pragma unroll
      for (int m = 0; m < C::M_TILES; m++)
        for (int block = 0; block < blocks; block++)
          for (int which = 0; which < 2; which++) factors(which).store_pair(place(m, 1) + block * C::WIDTH, Pair<T>{});
  }

  // Of the sequences whose first one has this row.
  DEVICE MaskedStep<C::CELL, T> masks(const StepMasks& masks, const SweepArgs& s, int64_t row, int m, int s_) const {
    return {masks,
            s,
            tile.direction(),
            tile.first() + lane.sequence + s_,
            row + lane.sequence + s_,
            lane.unit + m * kMmaRows};
  }

  // Which state of their pieces the two sequences have in a step, -1 where they do not run.
  DEVICE void load_pieces(const Pieces& pieces, const Tile::Step& step, int (&found)[2]) const {
#pragma unroll
    for (int s = 0; s < 2; s++)
      found[s] = static_cast<int>(pieces.state(step.row + lane.sequence + s, lane.sequence + s < step.running));
  }
  // The same of their first pieces, in the order of the direction, or of their last.
  DEVICE void load_outermost(const Pieces& pieces, bool last, int (&found)[2]) const {
#pragma unroll
    for (int s = 0; s < 2; s++)
      found[s] = lane.sequence + s < tile.sequences()
                     ? static_cast<int>(pieces.outermost(tile.first() + lane.sequence + s, last))
                     : -1;
  }

  // How many of the two units take part, if `sequences` of the tile do.
  DEVICE int count(int m, int s, int sequences) const { return lane.sequence + s < sequences ? present[m] : 0; }
  // Where they are in a buffer of factors, whose rows are the columns of an MMA.
  DEVICE int place(int m, int s) const { return (sequence_of_lane() + s) * stride + lane.unit + m * kMmaRows; }

  DEVICE Pair<T> load_state(const void* array, int m, int s) const {
    if (!array) return {};
    const Global<const T> from(static_cast<const T*>(array), states);
    return load_units<false>(from, state(m, s), count(m, s, tile.sequences()));
  }
  DEVICE void store_state(void* array, int m, int s, Pair<T> units) const {
    const Global<T> to(static_cast<T*>(array), states);
    store_units<false>(to, state(m, s), units, count(m, s, tile.sequences()));
  }

  // The same of a piece; zeros of none.
  DEVICE Pair<T> load_piece(const void* array, const SweepArgs& s, const StepMasks& masks, int state, int m) const {
    if (!array || state < 0) return {};
    const Global<const T> from(static_cast<const T*>(array), s.directions * masks.states * hidden);
    return load_units<false>(from, state * hidden + lane.unit + m * kMmaRows, present[m]);
  }
  DEVICE void store_piece(void* array, const SweepArgs& s, const StepMasks& masks, int state, int m,
                          Pair<T> units) const {
    const Global<T> to(static_cast<T*>(array), s.directions * masks.states * hidden);
    store_units<false>(to, state * hidden + lane.unit + m * kMmaRows, units, present[m]);
  }

 private:
  DEVICE int64_t state(int m, int s) const { return first_state + s * hidden + m * kMmaRows; }

  int sequence_[C::M_TILES][2];  // of either unit; kMaxTile if the layer does not have it
};

// Units i and i + 1 of a place; of each whether it is to be read or written.
template <bool EVEN, class T>
DEVICE Pair<std::remove_const_t<T>> load_units(const Cursor<T>& from, int i, bool one, bool two) {
  using Number = std::remove_const_t<T>;
  if constexpr (EVEN) return one ? from.load_pair(i) : Pair<Number>{};
  const Number zero = from_acc<Number>(0);
  return pair(one ? from.load(i) : zero, two ? from.load(i + 1) : zero);
}
template <bool EVEN, class T>
DEVICE void store_units(const Cursor<T>& to, int i, Pair<T> units, bool one, bool two) {
  if constexpr (EVEN)
    to.store_pair(i, units, one);
  else
    to.store(i, first(units), one), to.store(i + 1, second(units), two);
}

}  // namespace seqkernels::device
