// The forward pass of a single CTA with masks, or of sequences that consist of pieces.
#pragma once
#include "single_cta_forward.cuh"

namespace seqkernels::device {

template <class C>
struct MaskedSingleCtaForward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Parameters = SingleCtaArgs<MaskedForwardArgs>;
  using Arrays = ForwardArrays<C::CELL, T, C::EVEN>;
  using Step = typename Tile::Step;
  static constexpr int G = C::G, M_TILES = C::M_TILES;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const ThreadTile<C> mine(s, tile);
    const Arrays arrays(s, tile.direction());
    const PackedWeights<C> weights(s, tile.direction());
    const SharedBiases<C::CELL, T, C::WIDTH> biases(s, tile.direction(), 0, C::threads, C::layout.buffers);

    Pair<T> h[M_TILES][2];
    float c[M_TILES][2][2];
    int piece[2] = {}, next_piece[2] = {};
    load_states(s, mine, h, c, piece);

    // Gates are read one step ahead, so that reading overlaps with the products, and where they lie two steps ahead.
    Pair<T> x[M_TILES][2][G];
    Step now = tile.step(tile.prefetch(0)), next = tile.step(tile.prefetch(1));
    const auto load = [&](int m, const Step& step) {
#pragma unroll
      for (int s_ = 0; s_ < 2; s_++)
        arrays.load_gates(step.row + s_, m * kMmaRows, mine.lane, mine.count(m, s_, step.running), x[m][s_]);
    };
#pragma unroll
    for (int m = 0; m < M_TILES; m++) load(m, now);
    synchronize();

    for (int64_t k = 0; k < tile.count(); k++) {
      const Shared<T> before = mine.factors(k % 2), after = mine.factors((k + 1) % 2);
      const typename Tile::Prefetched after_next = tile.prefetch(k + 2);
      if (s.masks.pieces) mine.load_pieces(Pieces(s.masks, s, tile.direction()), next, next_piece);
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        // The accumulators start from the gates of x, whose registers then take those of the next step.
        float sum[G][kElements], x_apart[kElements];
        SingleCtaForward<C>::template start<2>(x[m], biases, mine.lane.unit + m * kMmaRows, sum, x_apart);
        // Add W h. Exact float32 loads the next step's gates behind these products: before them nvcc spills.
        SingleCtaForward<C>::multiply_all(weights, m, before, now.running, sum, [&] {
          if (MathPolicy::pipelined) load(m, next);
        });
        if (!MathPolicy::pipelined) load(m, next);
#pragma unroll
        for (int s_ = 0; s_ < 2; s_++) {
          run_step(s, mine, arrays, now, m, s_, sum, x_apart, piece[s_], next_piece[s_], h[m][s_], c[m][s_]);
          after.store_pair(mine.place(m, s_), factors(s, mine, m, s_, h[m][s_]));
        }
      }
#pragma unroll
      for (int s_ = 0; s_ < 2; s_++)
        if (mine.lane.sequence + s_ < now.running) piece[s_] = next_piece[s_];
      now = next, next = tile.step(after_next);
      synchronize();
    }

    if (s.masks.pieces) return;  // each has left its states
    mine.each([&](int m, int s_) {
      mine.store_state(s.h_n, m, s_, h[m][s_]);
      if (kHasC<C::CELL>) mine.store_state(s.c_n, m, s_, from_acc<T>(c[m][s_]));
    });
  }

 private:
  // The initial states, which go to all threads.
  static DEVICE void load_states(const Parameters& s, const ThreadTile<C>& mine, Pair<T> (&h)[M_TILES][2],
                                 float (&c)[M_TILES][2][2], int (&piece)[2]) {
    if (s.masks.pieces) mine.load_outermost(Pieces(s.masks, s, mine.tile.direction()), false, piece);
    const auto load = [&](const void* array, int m, int s_) {
      if (s.masks.pieces) return mine.load_piece(array, s, s.masks, piece[s_], m);
      return mine.load_state(array, m, s_);
    };
    mine.each([&](int m, int s_) {
      h[m][s_] = load(s.h_0, m, s_);
      to_acc(load(s.c_0, m, s_), c[m][s_]);
      mine.factors(0).store_pair(mine.place(m, s_), factors(s, mine, m, s_, h[m][s_]));
    });
  }

  // Activations of two units of a sequence, and what they yield: the new state, y, what the backward pass needs.
  static DEVICE void run_step(const Parameters& s, const ThreadTile<C>& mine, const Arrays& arrays, const Step& now,
                              int m, int s_, const float (&sum)[G][kElements], const float (&x_apart)[kElements],
                              int piece, int next_piece, Pair<T>& h, float (&c)[2]) {
    float saved[2][kMaxBlocks], h_new[2], c_new[2] = {c[0], c[1]};
    to_acc(h, h_new);
    activate(sum, x_apart, s_, h_new, c_new, saved);
    apply_masks(s, mine, now, m, s_, saved, h, c, h_new, c_new);
    // Sequences that have ended, or (backwards in time) not yet begun, keep their state.
    if (mine.lane.sequence + s_ >= now.running) return;
    const int present = mine.present[m];
    zero_absent(h_new, present);
    h = from_acc<T>(h_new), c[0] = c_new[0], c[1] = c_new[1];
    arrays.store_y(now.row + s_, m * kMmaRows, mine.lane, present, h);
    arrays.store_saved(now.row + s_, m * kMmaRows, mine.lane, present, saved, c_new);
    if (s.masks.pieces && next_piece != piece) change_piece(s, mine, m, piece, next_piece, h, c);
  }

  // h of two units as products read it.
  static DEVICE Pair<T> factors(const Parameters& s, const ThreadTile<C>& mine, int m, int s_, Pair<T> h) {
    float units[2];
    to_acc(h, units);
    const auto masked = mine.masks(s.masks, s, 0, m, s_);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < mine.count(m, s_, mine.tile.sequences())) units[i] = masked.in_products(i, units[i]);
    return MathPolicy::factors(from_acc<T>(units));
  }

  // What masks change about the states that a step gave two units of a sequence, if it runs.
  static DEVICE void apply_masks(const Parameters& s, const ThreadTile<C>& mine, const Step& now, int m, int s_,
                                 const float (&saved)[2][kMaxBlocks], Pair<T> h, const float (&c)[2], float (&h_new)[2],
                                 float (&c_new)[2]) {
    float h_before[2];
    to_acc(h, h_before);
    const auto masked = mine.masks(s.masks, s, now.row, m, s_);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < mine.count(m, s_, now.running)) masked.forward(i, saved[i], h_before[i], c[i], h_new[i], c_new[i]);
  }

  // Where a piece has ended: its states leave, and those of the next begin, if there is one.
  static DEVICE void change_piece(const Parameters& s, const ThreadTile<C>& mine, int m, int ended, int next,
                                  Pair<T>& h, float (&c)[2]) {
    mine.store_piece(s.h_n, s, s.masks, ended, m, h);
    if (kHasC<C::CELL>) mine.store_piece(s.c_n, s, s.masks, ended, m, from_acc<T>(c));
    if (next < 0) return;
    h = mine.load_piece(s.h_0, s, s.masks, next, m);
    if (kHasC<C::CELL>) to_acc(mine.load_piece(s.c_0, s, s.masks, next, m), c);
  }

  // The step of two units of a sequence; h and c change in place.
  static DEVICE void activate(const float (&sum)[G][kElements], const float (&x_apart)[kElements], int s_,
                              float (&h)[2], float (&c)[2], float (&saved)[2][kMaxBlocks]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x_i[G] = {}, of_h[G];
      if (stays_apart<C::CELL>(G - 1)) x_i[G - 1] = x_apart[i * 2 + s_];
#pragma unroll
      for (int gate = 0; gate < G; gate++) of_h[gate] = sum[gate][i * 2 + s_];
      cell_forward<C::CELL>(x_i, of_h, h[i], c[i], saved[i]);
    }
  }
};

}  // namespace seqkernels::device
