// A sweep in one launch by groups of CTAs (compute capability 9.0). A group takes up to 8 sequences at a time through
// all their steps. Each of its CTAs has a slice of the hidden units, with the recurrent weights of all their gates in
// its registers and shared memory. Groups know nothing of each other; both directions run side by side (the second
// index of a CTA). Here is what a thread of a slice has, in slice_forward.cuh and slice_backward.cuh what a CTA does
// with its slice. How the CTAs of a group exchange, once a step, is an Exchange: through the shared memory of a cluster
// (cluster.cuh), or through the L2 cache (persistent_grid.cuh).
#pragma once
#include "tile.cuh"
#include "weights.cuh"

namespace seqkernels::device {

// A kernel whose CTAs have UNITS hidden units each (a multiple of 16), in which the rows of kResident for ARCH hold.
template <Arch ARCH, Path PATH_, Cell CELL_, class MathPolicy_, bool BACKWARD, int UNITS_, bool EVEN_>
struct SliceConfig {
  using MathPolicy = MathPolicy_;
  using T = typename MathPolicy::T;
  static constexpr Path PATH = PATH_;
  static constexpr Cell CELL = CELL_;
  static constexpr bool EVEN = EVEN_;
  static constexpr Variant variant = variant_of(ARCH, CELL, MathPolicy::math, BACKWARD, EVEN);
  static constexpr int G = gates_of(CELL), UNITS = UNITS_, RESIDENT = resident_of(PATH, variant, UNITS);
  static constexpr int warps = slice_warps(UNITS, BACKWARD), threads = warps * kWarpSize;
  static constexpr int owners = owner_warps(UNITS);  // warps with states
  static constexpr int k_width = k_block_width(MathPolicy::math);
  static_assert(UNITS % kMmaRows == 0 && owners <= warps && RESIDENT > 0);
};

// A sweep, and the layout of a CTA's shared memory for it: SliceLayout in config.h.
template <class Pass>
struct SliceArgs : Pass {
  int tile;    // sequences that a group takes at once: 1 to kMaxTile
  int stride;  // of a row of factors
  // Bytes of all units, and of a row of gates_x or grad_gates (of a direction), of y and grad_y, and of saved.
  int block, gates_row, y_row, saved_row;
  int exchange, weights, bytes;
};

DEVICE void words_of(Pair<float> pair, uint32_t (&words)[4]) {
  words[0] = bits(first(pair)), words[1] = bits(second(pair));
}
template <class T>
DEVICE void words_of(Pair<T> pair, uint32_t (&words)[4]) {
  words[0] = bits(pair);
}

// Gathers 16 bytes of a row, of which 4 lanes side by side (2 of float32) have two numbers each.
template <class T>
DEVICE Vec16 gather(Pair<T> mine) {
  Vec16 all;
  words_of(mine, all.word);
#pragma unroll
  for (int count = sizeof(mine) / 4, mask = 1; count < 4; count *= 2, mask *= 2) {
    const bool upper = lane() & mask;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i >= count) continue;
      const uint32_t own = all.word[i], other = bits(shfl_xor(from_bits(own), mask));
      all.word[i] = upper ? other : own, all.word[count + i] = upper ? own : other;
    }
  }
  return all;
}

// What a thread has in either pass: two units side by side of one sequence. The first warps have them, one thread for
// each two units; the others have none.
template <class C>
struct OwnedUnits {
  using T = typename C::T;
  static constexpr int pairs = C::UNITS / 2;

  static constexpr bool all_threads = pairs * kMaxTile == C::threads;  // have some

  bool any;      // whether the thread has some
  int sequence;  // of the tile
  int at, unit;  // the first unit in the slice, and in the layer
  int present;   // units that the layer has, of a sequence that the tile has: 0
                 // to 2

  DEVICE OwnedUnits(const SweepArgs& s, const Tile& tile, int rank)
      : any(all_threads || thread() < pairs * kMaxTile),
        sequence(thread() / pairs),
        at(thread() % pairs * 2),
        unit(rank * C::UNITS + at),
        sweep_(s),
        tile_(tile) {
    present = sequence < tile.sequences() ? two_of(static_cast<int>(s.hidden) - unit) : 0;
  }

  // Whether its own sequence is among so many that run, or one of its warp's, whose lanes go the same way.
  DEVICE bool runs(int running) const { return sequence < running; }
  DEVICE bool warp_runs(int running) const { return thread() / kWarpSize * kWarpSize / pairs < running; }
  DEVICE int present_of(int running) const { return runs(running) ? present : 0; }

  // Its two units of the first of `blocks` blocks of a row, where rows of the tile begin with `first`: of an array [N,
  // D, blocks, H], or [D, N, blocks, H] that has the directions one after the other.
  template <class Element>
  DEVICE Global<Element> of_row(Element* array, int blocks, int direction, int64_t first) const {
    return place(array, blocks, (first + sequence) * sweep_.directions + direction);
  }
  template <class Element>
  DEVICE Global<Element> of_direction(Element* array, int blocks, int direction, int64_t first) const {
    return place(array, blocks, direction * sweep_.rows + first + sequence);
  }

  DEVICE Pair<T> load_state(const void* array) const {
    if (!array) return {};
    return load_units<false>(Global<const T>(static_cast<const T*>(array), states()), state(), present);
  }
  DEVICE void store_state(void* array, Pair<T> units) const {
    store_units<false>(Global<T>(static_cast<T*>(array), states()), state(), units, present);
  }

 private:
  template <class Element>
  DEVICE Global<Element> place(Element* array, int blocks, int64_t row) const {
    const int64_t all = sweep_.rows * sweep_.directions * blocks * sweep_.hidden;
    return Global<Element>(array, all).moved(row * blocks * sweep_.hidden + unit, sizeof(Element));
  }

  // Computed where they are used, so that they take no register during the steps.
  DEVICE int64_t states() const { return sweep_.directions * sweep_.sequences * sweep_.hidden; }
  DEVICE int64_t state() const {
    return (tile_.direction() * sweep_.sequences + tile_.first() + sequence) * sweep_.hidden + unit;
  }

  const SweepArgs& sweep_;
  const Tile& tile_;
};

// The arrivals of the n-th exchange: two mbarriers, at the beginning of shared memory, alternate.
DEVICE Mbarrier arrivals(uint32_t n) { return Mbarrier(static_cast<int>(n % 2) * 8); }
DEVICE int phase(uint32_t n) { return static_cast<int>(n / 2 % 2); }

// One of the two buffers of factors, for the n-th exchange.
template <class T>
DEVICE Shared<T> factor_buffer(uint32_t n, int stride) {
  constexpr int size = sizeof(T);
  return Shared<T>(kMbarrierBytes + static_cast<int>(n % 2) * kMaxTile * stride * size, kMaxTile * stride);
}

// Stores to the same place in `peers` CTAs of a cluster. The lanes that have the same 16 bytes (4 side by side, 2 of
// float32) divide the peers among them; each begins with the one after its own CTA's `rank` that its number says.
template <class T>
DEVICE void st_async_to_all(Shared<T> array, int at, Vec16 words, int rank, int peers, Mbarrier arrivals) {
  constexpr int lanes = 8 / sizeof(T);
  int peer = rank + lane() % lanes;
#pragma unroll 1
  for (int left = peers - lane() % lanes; left > 0; left -= lanes, peer += lanes) {
    if (peer >= peers) peer -= peers;
    array.st_async(at, words, peer, arrivals);
  }
}

}  // namespace seqkernels::device
