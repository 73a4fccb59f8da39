// The backward pass of a single CTA. From barrier to barrier: products, and beneath them what no other thread waits
// for, which are the loads of the next step and the stores of this one; then the cell, without branches; then the
// gradients of its gates.
#pragma once
#include "single_cta.cuh"

namespace seqkernels::device {

// Where a thread reads what the forward pass has left and the gradient of y, and writes the gradients of the gates.
template <class C, int S>
class BackwardPlace {
 public:
  using T = typename C::T;
  static constexpr int K = saved_blocks_of(C::CELL), kGates = kSavedGates<C::CELL>;
  static constexpr int F = stored_gradients_of(C::CELL);
  // What the cell has of the state before a step, which is c where there is one, else h.
  static constexpr bool BEFORE = kHasC<C::CELL> || CellTraits<C::CELL>::needs_h_prev;

  DEVICE BackwardPlace(const BackwardArgs& s, const ThreadTile<C, S>& mine, int64_t row)
      : mine_(mine),
        initial_(kHasC<C::CELL> ? s.c_0 : s.h_0),
        hidden_(static_cast<int>(s.hidden)),
        of_y_(s.directions * hidden_),
        grad_y_(array(s.grad_y, s.rows * of_y_), place(s, row)),
        y_(array(s.y, s.rows * of_y_), place(s, row)),
        saved_(array(s.saved, s.rows * of_y_ * K), place(s, row) * K - (K - 1) * int64_t{mine.lane.unit}),
        grad_gates_(Global<T>(static_cast<T*>(s.grad_gates), s.directions * s.rows * F * s.hidden),
                    (mine.tile.direction() * s.rows + row + mine.lane.sequence) * F * hidden_ + mine.lane.unit),
        has_grad_y_(s.grad_y) {}

  // What the first step to be walked reads beyond what load() does.
  DEVICE void load_last(int m, int s, int running, StepInputs<T>& inputs) const {
    inputs = {};
    if constexpr (kHasC<C::CELL>)
      inputs.before = units(saved_, s * of_y_ * K + (K - 1) * hidden_ + m * kMmaRows, m, s, running);
  }

  // Of a step in which so many sequences run, as `then` do in the one before it in time, `rows` away. What was the
  // state before the step that was loaded last becomes the one after it.
  DEVICE void load(int m, int s, int running, int then, int rows, StepInputs<T>& inputs) const {
    const int at = s * of_y_ + m * kMmaRows, at_saved = s * of_y_ * K + m * kMmaRows;
    inputs.grad_y = units(grad_y_, at, m, s, has_grad_y_ ? running : 0);
#pragma unroll
    for (int block = 0; block < kGates; block++)
      inputs.saved[block] = units(saved_, at_saved + block * hidden_, m, s, running);
    if constexpr (kHasC<C::CELL>) inputs.now = inputs.before;
    if constexpr (CellTraits<C::CELL>::needs_h) inputs.now = units(y_, at, m, s, running);
    if constexpr (BEFORE) {
      Cursor<const T> from = kHasC<C::CELL> ? saved_ : y_;
      from.move(rows, kHasC<C::CELL> ? of_y_ * K : of_y_);
      inputs.before = units(from, kHasC<C::CELL> ? at_saved + (K - 1) * hidden_ : at, m, s, then);
      if (mine_.lane.sequence + s < running && mine_.lane.sequence + s >= then)
        inputs.before = mine_.load_state(initial_, m, s);
    }
  }
  DEVICE void move(int rows) {
    grad_y_.move(rows, of_y_), y_.move(rows, of_y_);
    if (K > 0) saved_.move(rows, of_y_ * K);
  }

  DEVICE void store(int m, int s, int running, const Pair<T> (&grad)[gradient_blocks_of(C::CELL)]) const {
#pragma unroll
    for (int block = 0; block < F; block++)
      store_units<C::EVEN>(grad_gates_, s * F * hidden_ + block * hidden_ + m * kMmaRows,
                           grad[gradient_of<C::CELL>(block)], mine_.runs(m, s, 0, running),
                           mine_.runs(m, s, 1, running));
  }
  DEVICE void move_gradients(int rows) { grad_gates_.move(rows, F * hidden_); }

 private:
  static DEVICE Global<const T> array(const void* data, int64_t count) { return {static_cast<const T*>(data), count}; }

  // Of y.
  DEVICE int64_t place(const BackwardArgs& s, int64_t row) const {
    return ((row + mine_.lane.sequence) * s.directions + mine_.tile.direction()) * hidden_ + mine_.lane.unit;
  }
  DEVICE Pair<T> units(const Cursor<const T>& from, int i, int m, int s, int running) const {
    return load_units<C::EVEN>(from, i, mine_.runs(m, s, 0, running), mine_.runs(m, s, 1, running));
  }

  const ThreadTile<C, S>& mine_;
  const void* initial_;
  int hidden_, of_y_;
  Cursor<const T> grad_y_, y_, saved_;
  Cursor<T> grad_gates_;
  bool has_grad_y_;
};

template <class C>
struct SingleCtaBackward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Parameters = SingleCtaArgs<BackwardArgs>;
  static constexpr int G = C::G, F = gradient_blocks_of(C::CELL), M_TILES = C::M_TILES;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const PackedWeights<C> weights(s, tile.direction());  // transposed
    if constexpr (C::one_sequence)
      steps<1>(s, tile, weights);
    else if (tile.sequences() <= kMaxTile / 2)
      steps<1>(s, tile, weights);
    else
      steps<2>(s, tile, weights);
  }

  // Adds the products of the first `sequences` sequences to `sum`; tensor cores in two chains for each gate, if a warp
  // has the registers. What `beneath` does runs beneath them.
  template <int S = 2, class Beneath = Nothing>
  static DEVICE void multiply_all(const PackedWeights<C>& weights, int m, Shared<T> gradients, int sequences,
                                  float (&sum)[1][kElements], Beneath beneath = {}) {
    constexpr int chains = M_TILES == 1 || G < 2 ? 2 * G : G;
    if (!MathPolicy::pipelined) beneath();
    for_sequences<MathPolicy, S>(sequences, [&](auto policy) {
      Accumulators<decltype(policy), 1, chains> accumulators(sum);
      const auto use = [&](int k_block, auto of) {
#pragma unroll
        for (int gate = 0; gate < G; gate++)
          accumulators.add([&](int) { return of(gate); }, gradients, ThreadTile<C>::stride,
                           gate * C::WIDTH + k_block * C::k_width, gate * 2);
      };
      if constexpr (MathPolicy::pipelined)
        weights.each(m, use, beneath);
      else
        weights.each(m, use);
      accumulators.template finish<S>(sum);
    });
  }

 private:
  // Of tiles in which a lane has up to S sequences.
  template <int S>
  static DEVICE void steps(const Parameters& s, const Tile& tile, const PackedWeights<C>& weights) {
    const ThreadTile<C, S> mine(s, tile);
    float grad_h[M_TILES][1][kElements] = {}, grad_c[M_TILES][S][2];
    mine.clear_others(G);
    mine.each([&](int m, int s_) {
      float units[2];
      to_acc(mine.load_state(s.grad_h_n, m, s_), units);
      grad_h[m][0][s_] = units[0], grad_h[m][0][2 + s_] = units[1];
      to_acc(mine.load_state(s.grad_c_n, m, s_), grad_c[m][s_]);
    });

    Walk<2> walk(s, tile, true);
    BackwardPlace<C, S> place(s, mine, walk.row());
    StepInputs<T> inputs[M_TILES][S];
    mine.each([&](int m, int s_) {
      place.load_last(m, s_, walk.running(), inputs[m][s_]);
      place.load(m, s_, walk.running(), walk.running(1), walk.rows(), inputs[m][s_]);
    });

    for (int buffer = 0; walk.any(); buffer ^= 1, walk.advance()) {
      const Shared<T> gradients = mine.factors(buffer);
      const int running = walk.running();
      Pair<T> grad[M_TILES][S][F];
      mine.each([&](int m, int s_) {
        run_cell(mine, m, s_, running, inputs[m][s_], grad_h[m], grad_c[m][s_], grad[m][s_]);
#pragma unroll
        for (int gate = 0; gate < G; gate++)
          gradients.store_pair(mine.place(m, s_) + gate * C::WIDTH, MathPolicy::factors(grad[m][s_][gate]));
      });
      synchronize();
      place.move(walk.rows());
#pragma unroll
      for (int m = 0; m < M_TILES; m++)
        multiply_all<S>(weights, m, gradients, running, grad_h[m], [&] {
#pragma unroll
          for (int s_ = 0; s_ < S; s_++) {
            place.store(m, s_, running, grad[m][s_]);
            place.load(m, s_, walk.running(1), walk.running(2), walk.rows(1), inputs[m][s_]);
          }
        });
      place.move_gradients(walk.rows());
      walk.fetch();
    }

    mine.each([&](int m, int s_) {
      const float units[2] = {grad_h[m][0][s_], grad_h[m][0][2 + s_]};
      mine.store_state(s.grad_h_0, m, s_, from_acc<T>(units));
      if (kHasC<C::CELL>) mine.store_state(s.grad_c_0, m, s_, from_acc<T>(grad_c[m][s_]));
    });
  }

  // The gradients of the gates of two units of a sequence, zeros if it does not run or the layer does not have them,
  // and what of those of its states goes past them, which change in place.
  template <int S>
  static DEVICE void run_cell(const ThreadTile<C, S>& mine, int m, int s_, int running, const StepInputs<T>& inputs,
                              float (&grad_h)[1][kElements], float (&grad_c)[2], Pair<T> (&grad)[F]) {
    // In float, not Rough: an error of 2^-11 would be many times 1 - tanh^2 of a large c.
    float of_units[2][kMaxBlocks], saved[2][kMaxBlocks], now[2], before[2], grad_y[2];
#pragma unroll
    for (int block = 0; block < kSavedGates<C::CELL>; block++)
      saved[0][block] = to_acc(first(inputs.saved[block])), saved[1][block] = to_acc(second(inputs.saved[block]));
    to_acc(inputs.now, now), to_acc(inputs.before, before), to_acc(inputs.grad_y, grad_y);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float of_gates[kMaxBlocks], c = grad_c[i], &h = grad_h[0][i * 2 + s_];
      const float past = cell_backward<C::CELL>(h + grad_y[i], c, saved[i], now[i], before[i], of_gates);
      const bool runs = mine.runs(m, s_, i, running);
      h = runs ? past : h, grad_c[i] = runs ? c : grad_c[i];
#pragma unroll
      for (int block = 0; block < F; block++) of_units[i][block] = runs ? of_gates[block] : 0;
    }
#pragma unroll
    for (int block = 0; block < F; block++) {
      const float units[2] = {of_units[0][block], of_units[1][block]};
      grad[block] = from_acc<T>(units);
    }
  }
};

}  // namespace seqkernels::device
