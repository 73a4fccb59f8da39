// The forward pass of a single CTA. From barrier to barrier: products, and beneath them what no other thread waits for,
// which are the loads of the next step and the stores of the one before; then the cell, without branches; then the new
// states.
#pragma once
#include "single_cta.cuh"

namespace seqkernels::device {

// Where a thread reads the gates of x, and writes y and what the backward pass needs, in one step.
template <class C, int S>
class ForwardPlace {
 public:
  using T = typename C::T;
  static constexpr int G = C::G, K = saved_blocks_of(C::CELL), kGates = kSavedGates<C::CELL>;

  DEVICE ForwardPlace(const ForwardArgs& s, const ThreadTile<C, S>& mine, int64_t row)
      : mine_(mine),
        hidden_(static_cast<int>(s.hidden)),
        of_y_(s.directions * hidden_),
        x_(Global<const T>(static_cast<const T*>(s.gates_x), s.directions * s.rows * G * s.hidden),
           ((mine.tile.direction() ^ s.first_direction) * s.rows + row + mine.lane.sequence) * G * hidden_ +
               mine.lane.unit),
        y_(Global<T>(static_cast<T*>(s.y), s.rows * of_y_), place(s, row)),
        saved_(Global<T>(static_cast<T*>(s.saved), s.rows * of_y_ * K),
               place(s, row) * K - (K - 1) * int64_t{mine.lane.unit}),
        saves_(s.saved) {}

  DEVICE void load(int m, int s, int running, Pair<T> (&x)[G]) const {
#pragma unroll
    for (int gate = 0; gate < G; gate++)
      x[gate] = load_units<C::EVEN>(x_, s * G * hidden_ + gate * hidden_ + m * kMmaRows, mine_.runs(m, s, 0, running),
                                    mine_.runs(m, s, 1, running));
  }
  DEVICE void move_x(int rows) { x_.move(rows, G * hidden_); }

  // saved: the gates.
  DEVICE void store(int m, int s, int running, Pair<T> h, const float (&c)[2], const Pair<T>* saved) const {
    const bool one = mine_.runs(m, s, 0, running), two = mine_.runs(m, s, 1, running);
    store_units<C::EVEN>(y_, s * of_y_ + m * kMmaRows, h, one, two);
    const int at = s * of_y_ * K + m * kMmaRows;
#pragma unroll
    for (int block = 0; block < kGates; block++)
      store_units<C::EVEN>(saved_, at + block * hidden_, saved[block], one && saves_, two && saves_);
    if (kHasC<C::CELL>)
      store_units<C::EVEN>(saved_, at + (K - 1) * hidden_, from_acc<T>(c), one && saves_, two && saves_);
  }
  DEVICE void move_results(int rows) {
    y_.move(rows, of_y_);
    if (K > 0) saved_.move(rows, of_y_ * K);
  }

 private:
  // Of y.
  DEVICE int64_t place(const ForwardArgs& s, int64_t row) const {
    return ((row + mine_.lane.sequence) * s.directions + mine_.tile.direction()) * hidden_ + mine_.lane.unit;
  }

  const ThreadTile<C, S>& mine_;
  int hidden_, of_y_;
  Cursor<const T> x_;
  Cursor<T> y_, saved_;
  bool saves_;
};

template <class C>
struct SingleCtaForward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Parameters = SingleCtaArgs<ForwardArgs>;
  using Biases = SharedBiases<C::CELL, T, C::WIDTH>;
  static constexpr int G = C::G, M_TILES = C::M_TILES, kGates = kSavedGates<C::CELL>;
  // Whether results wait in registers for the next step's products, which take 16 bits of each.
  static constexpr bool LATE = sizeof(T) == 2 && M_TILES == 1;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const PackedWeights<C> weights(s, tile.direction());
    const Biases biases(s, tile.direction(), 0, C::threads, C::layout.buffers);
    if constexpr (C::one_sequence)
      steps<1>(s, tile, weights, biases);
    else if (tile.sequences() <= kMaxTile / 2)
      steps<1>(s, tile, weights, biases);
    else
      steps<2>(s, tile, weights, biases);
  }

  // Adds the products of the first `sequences` sequences to `sum`; tensor cores in two chains for each gate, if a warp
  // has the registers. What `beneath` does runs beneath them.
  template <int S = 2, class Beneath = Nothing>
  static DEVICE void multiply_all(const PackedWeights<C>& weights, int m, Shared<T> h, int sequences,
                                  float (&sum)[G][kElements], Beneath beneath = {}) {
    if (!MathPolicy::pipelined) beneath();
    for_sequences<MathPolicy, S>(sequences, [&](auto policy) {
      Accumulators<decltype(policy), G, M_TILES == 1 ? 2 * G : 2> accumulators(sum);
      const auto use = [&](int k_block, auto of) {
        accumulators.add(of, h, ThreadTile<C>::stride, k_block * C::k_width);
      };
      if constexpr (MathPolicy::pipelined)
        weights.each(m, use, beneath);
      else
        weights.each(m, use);
      accumulators.template finish<S>(sum);
    });
  }

  // What W h is added to: the gates of x with their biases; of a gate that stays apart its bias, and those of x beside.
  template <int S>
  static DEVICE void start(const Pair<T> (&x)[S][G], const Biases& biases, int unit, float (&sum)[G][kElements],
                           float (&x_apart)[kElements]) {
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const bool apart = stays_apart<C::CELL>(gate);
      float of_x[2], of_h[2] = {};
      to_acc(biases.of_x(gate, unit), of_x);
      if (apart) to_acc(biases.of_h(gate, unit), of_h);
#pragma unroll
      for (int s_ = 0; s_ < S; s_++) {
        float units[2];
        to_acc(x[s_][gate], units);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          units[i] += of_x[i];
          sum[gate][i * 2 + s_] = apart ? of_h[i] : units[i];
          if (apart) x_apart[i * 2 + s_] = units[i];
        }
      }
    }
  }

 private:
  // Of tiles in which a lane has up to S sequences.
  template <int S>
  static DEVICE void steps(const Parameters& s, const Tile& tile, const PackedWeights<C>& weights,
                           const Biases& biases) {
    const ThreadTile<C, S> mine(s, tile);
    Pair<T> h[M_TILES][S], x[M_TILES][S][G], saved[M_TILES][S][kGates + 1];
    float c[M_TILES][S][2];
    load_states(s, mine, h, c);

    Walk<1> walk(s, tile, false);
    ForwardPlace<C, S> place(s, mine, walk.row());
    mine.each([&](int m, int s_) { place.load(m, s_, walk.running(), x[m][s_]); });
    const auto store = [&](int running) {
      mine.each([&](int m, int s_) { place.store(m, s_, running, h[m][s_], c[m][s_], saved[m][s_]); });
    };
    synchronize();

    float sum[M_TILES][G][kElements] = {}, x_apart[M_TILES][kElements];  // of other sequences than S always 0
    int ran = 0, moved = 0;                                              // in the step before
    for (int buffer = 0; walk.any(); buffer ^= 1, walk.advance()) {
      const int running = walk.running();
      walk.fetch();
      place.move_x(walk.rows());
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        start<S>(x[m], biases, mine.lane.unit + m * kMmaRows, sum[m], x_apart[m]);
        multiply_all<S>(weights, m, mine.factors(buffer), running, sum[m], [&] {
          mine.each([&](int of, int s_) {
            if (of == m) place.load(m, s_, walk.running(1), x[m][s_]);
          });
          if (LATE) store(ran), place.move_results(moved);
        });
#pragma unroll
        for (int s_ = 0; s_ < S; s_++) {
          activate(mine, m, s_, running, sum[m], x_apart[m], h[m][s_], c[m][s_], saved[m][s_]);
          mine.factors(buffer ^ 1).store_pair(mine.place(m, s_), MathPolicy::factors(h[m][s_]));
        }
      }
      if (!LATE) store(running), place.move_results(walk.rows());
      ran = running, moved = walk.rows();
      synchronize();
    }
    if (LATE) store(ran);
    mine.each([&](int m, int s_) {
      mine.store_state(s.h_n, m, s_, h[m][s_]);
      if (kHasC<C::CELL>) mine.store_state(s.c_n, m, s_, from_acc<T>(c[m][s_]));
    });
  }

  // The initial states, which go to all threads.
  template <int S>
  static DEVICE void load_states(const Parameters& s, const ThreadTile<C, S>& mine, Pair<T> (&h)[M_TILES][S],
                                 float (&c)[M_TILES][S][2]) {
    mine.clear_others(1);
    mine.each([&](int m, int s_) {
      h[m][s_] = mine.load_state(s.h_0, m, s_);
      to_acc(mine.load_state(s.c_0, m, s_), c[m][s_]);
      mine.factors(0).store_pair(mine.place(m, s_), MathPolicy::factors(h[m][s_]));
    });
  }

  // The step of two units of a sequence; h and c change in place, unless the sequence does not run: it has ended, or
  // (backwards in time) not yet begun. Nor do those of units that the layer does not have: their weights are zero, but
  // zero times infinity is NaN, which would reach all units through the next product.
  template <int S>
  static DEVICE void activate(const ThreadTile<C, S>& mine, int m, int s_, int running,
                              const float (&sum)[G][kElements], const float (&x_apart)[kElements], Pair<T>& h,
                              float (&c)[2], Pair<T> (&saved)[kGates + 1]) {
    float of_units[2][kMaxBlocks], h_new[2];
    to_acc(h, h_new);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x[G], of_h[G], h_i = h_new[i], c_i = c[i];
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
        x[gate] = stays_apart<C::CELL>(gate) ? x_apart[i * 2 + s_] : -0.0f;  // to which anything can be added
        of_h[gate] = sum[gate][i * 2 + s_];
      }
      forward_cell<C::CELL, T>(x, of_h, h_i, c_i, of_units[i]);
      const bool runs = mine.runs(m, s_, i, running);
      h_new[i] = runs ? h_i : h_new[i], c[i] = runs ? c_i : c[i];
    }
    h = from_acc<T>(h_new);
#pragma unroll
    for (int block = 0; block < kGates; block++) {
      const float units[2] = {of_units[0][block], of_units[1][block]};
      saved[block] = from_acc<T>(units);
    }
  }
};

}  // namespace seqkernels::device
