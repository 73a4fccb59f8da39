// The backward pass of a single CTA with masks, or of sequences that consist of pieces.
#pragma once
#include "single_cta_backward.cuh"

namespace seqkernels::device {

template <class C>
struct MaskedSingleCtaBackward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Parameters = SingleCtaArgs<MaskedBackwardArgs>;
  using Arrays = BackwardArrays<C::CELL, T, C::EVEN>;
  using Step = typename Tile::Step;
  static constexpr int G = C::G, M_TILES = C::M_TILES;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const ThreadTile<C> mine(s, tile);
    const Arrays arrays(s, tile.direction(), states_of(s));
    const PackedWeights<C> weights(s, tile.direction());  // transposed

    float grad_h[M_TILES][1][kElements], grad_c[M_TILES][2][2];
    load_states(s, mine, grad_h, grad_c);

    StepInputs<T> inputs[M_TILES][2];
    int piece[2] = {};
    const int64_t last = tile.count() - 1;
    Step now = tile.step(tile.prefetch(last)), before = tile.step(tile.prefetch(last - 1)),
         earlier = tile.step(tile.prefetch(last - 2));
    load(s, mine, arrays, now, before, piece, inputs);

    for (int64_t k = last; k >= 0; k--) {
      const Shared<T> gradients = mine.factors(k % 2);
      const typename Tile::Prefetched prefetched = tile.prefetch(k - 3);
      mine.each([&](int m, int s_) {
        run_step(s, mine, arrays, now, m, s_, inputs[m][s_], grad_h[m], grad_c[m][s_], gradients);
      });
      synchronize();
      // Load what the next step reads; the products hide the latency.
      const int running = now.running;
      const int later[2] = {piece[0], piece[1]};
      now = before, before = earlier, earlier = tile.step(prefetched);
      load(s, mine, arrays, now, before, piece, inputs);
      // The gradient of the previous h: W^T times those of the gates; zeros for a sequence that does not run.
#pragma unroll
      for (int m = 0; m < M_TILES; m++) multiply_masked(s, mine, weights, m, gradients, running, grad_h[m]);
      if (s.masks.pieces)
        mine.each([&](int m, int s_) {
          if (later[s_] >= 0 && later[s_] != piece[s_])
            change_piece(s, mine, m, s_, later[s_], piece[s_], grad_h[m], grad_c[m][s_]);
        });
    }

    store_states(s, mine, grad_h, grad_c);
  }

 private:
  static DEVICE void load_states(const Parameters& s, const ThreadTile<C>& mine, float (&grad_h)[M_TILES][1][kElements],
                                 float (&grad_c)[M_TILES][2][2]) {
    int piece[2];
    if (s.masks.pieces) mine.load_outermost(Pieces(s.masks, s, mine.tile.direction()), true, piece);
    const auto load = [&](const void* array, int m, int s_) {
      if (s.masks.pieces) return mine.load_piece(array, s, s.masks, piece[s_], m);
      return mine.load_state(array, m, s_);
    };
    mine.each([&](int m, int s_) {
      float units[2];
      to_acc(load(s.grad_h_n, m, s_), units);
      grad_h[m][0][s_] = units[0], grad_h[m][0][2 + s_] = units[1];
      to_acc(load(s.grad_c_n, m, s_), grad_c[m][s_]);
    });
  }

  // The gradients of the initial states; pieces have left theirs.
  static DEVICE void store_states(const Parameters& s, const ThreadTile<C>& mine,
                                  const float (&grad_h)[M_TILES][1][kElements], const float (&grad_c)[M_TILES][2][2]) {
    if (s.masks.pieces) return;
    mine.each([&](int m, int s_) {
      const float units[2] = {grad_h[m][0][s_], grad_h[m][0][2 + s_]};
      mine.store_state(s.grad_h_0, m, s_, from_acc<T>(units));
      if (kHasC<C::CELL>) mine.store_state(s.grad_c_0, m, s_, from_acc<T>(grad_c[m][s_]));
    });
  }

  // What a step reads, and of which pieces it is.
  static DEVICE void load(const Parameters& s, const ThreadTile<C>& mine, const Arrays& arrays, const Step& now,
                          const Step& before, int (&piece)[2], StepInputs<T> (&inputs)[M_TILES][2]) {
    int piece_before[2];
    if (s.masks.pieces) {
      const Pieces pieces(s.masks, s, mine.tile.direction());
      mine.load_pieces(pieces, now, piece);
      mine.load_pieces(pieces, before, piece_before);
    }
    mine.each([&](int m, int s_) {
      inputs[m][s_] = {};
      const int count = mine.count(m, s_, now.running);
      bool ran = mine.lane.sequence + s_ < before.running;
      int64_t state = mine.tile.first() + s_;
      if (s.masks.pieces) {
        ran = piece_before[s_] == piece[s_];
        state = piece[s_] - mine.tile.direction() * s.masks.states - mine.lane.sequence;
      }
      if (count) arrays.load(now.row + s_, before.row + s_, ran, state, m * kMmaRows, mine.lane, count, inputs[m][s_]);
    });
  }

  // Gradients of the gates, which are stored for the weights' gradients and go to all threads.
  static DEVICE void run_step(const Parameters& s, const ThreadTile<C>& mine, const Arrays& arrays, const Step& now,
                              int m, int s_, const StepInputs<T>& inputs, float (&grad_h)[1][kElements],
                              float (&grad_c)[2], Shared<T> gradients) {
    const bool running = mine.lane.sequence + s_ < now.running;
    float grad[2][kMaxBlocks] = {}, h_new[2] = {grad_h[0][s_], grad_h[0][2 + s_]}, c_new[2] = {grad_c[0], grad_c[1]};
    zero_absent(h_new, mine.present[m]);
    mine.masks(s.masks, s, now.row, m, s_).backward(inputs, mine.count(m, s_, now.running), h_new, c_new, grad);
    if (running) {
#pragma unroll
      for (int i = 0; i < 2; i++) grad_h[0][i * 2 + s_] = h_new[i], grad_c[i] = c_new[i];
      arrays.store_gates(now.row + s_, m * kMmaRows, mine.lane, mine.present[m], grad);
    }
    publish(gradients, mine.place(m, s_), grad, running);
  }

  // How many initial states a direction has.
  static DEVICE int64_t states_of(const Parameters& s) {
    if (s.masks.pieces) return s.masks.states;
    return s.sequences;
  }

  // Where a piece has begun: the gradients of its initial states leave, and those of the final states of the one before
  // begin, if there is one.
  static DEVICE void change_piece(const Parameters& s, const ThreadTile<C>& mine, int m, int s_, int begun, int before,
                                  float (&grad_h)[1][kElements], float (&grad_c)[2]) {
    float units[2] = {grad_h[0][s_], grad_h[0][2 + s_]};
    mine.store_piece(s.grad_h_0, s, s.masks, begun, m, from_acc<T>(units));
    if (kHasC<C::CELL>) mine.store_piece(s.grad_c_0, s, s.masks, begun, m, from_acc<T>(grad_c));
    if (before < 0) return;
    to_acc(mine.load_piece(s.grad_h_n, s, s.masks, before, m), units);
    grad_h[0][s_] = units[0], grad_h[0][2 + s_] = units[1];
    if (kHasC<C::CELL>) to_acc(mine.load_piece(s.grad_c_n, s, s.masks, before, m), grad_c);
  }

  // The gradients of the gates of two units, for all threads; zeros for a sequence that does not run.
  static DEVICE void publish(Shared<T> gradients, int at, const float (&grad)[2][kMaxBlocks], bool runs) {
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const Pair<T> factors = runs ? MathPolicy::factors(grad[0][gate], grad[1][gate]) : Pair<T>{};
      gradients.store_pair(at + gate * C::WIDTH, factors);
    }
  }

  // The same where a mask multiplied h in the products.
  static DEVICE void multiply_masked(const Parameters& s, const ThreadTile<C>& mine, const PackedWeights<C>& weights,
                                     int m, Shared<T> gradients, int sequences, float (&grad_h)[1][kElements]) {
    float products[1][kElements] = {};
    SingleCtaBackward<C>::multiply_all(weights, m, gradients, sequences, products);
#pragma unroll
    for (int s_ = 0; s_ < 2; s_++) {
      const auto masked = mine.masks(s.masks, s, 0, m, s_);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (i < mine.count(m, s_, sequences)) grad_h[0][i * 2 + s_] += masked.in_products(i, products[0][i * 2 + s_]);
    }
  }
};

}  // namespace seqkernels::device
