// A sweep in one launch: a block takes up to 8 sequences through all their steps, with the recurrent weights in its
// registers and shared memory. Blocks know nothing of each other; both directions run side by side (the second index of
// a block). A thread keeps the same elements (unit, sequence) for all steps, and their states in registers; what the
// other threads need of them goes through shared memory, in two buffers, so that one barrier a step is enough.
#pragma once
#include "layer.h"
#include "product.h"

namespace seqkernels::device {

// Sizes of a kernel for layers of up to HIDDEN units (a multiple of a chunk): BLOCKS times 16 of them a warp.
template <Cell CELL, class Product, int HIDDEN, int BLOCKS>
struct Sizes {
  using T = typename Product::T;
  static constexpr int gates = gates_of(CELL);
  static constexpr int threads = HIDDEN / kUnits / BLOCKS * 32;
  static constexpr int chunk = Factors<T>::chunk, chunks = HIDDEN / chunk;
  static constexpr int fragments = BLOCKS * gates * chunks;
  static_assert(HIDDEN % chunk == 0 && HIDDEN % (kUnits * BLOCKS) == 0);

  static DEVICE int first_unit(int block) { return (thread() / 32 * BLOCKS + block) * kUnits; }
};

template <class Arrays>
struct Tiled {
  Arrays arrays;
  int sequences;  // that a block takes
};

// The steps of one block's sequences, in the order of a direction.
class Tile {
 public:
  DEVICE Tile(const Sweep& s, int sequences)
      : steps_(s), direction_(block_y()), first_(block() * sequences), count_(steps_.count(first_)) {
    const int64_t left = s.sequences - first_;
    sequences_ = left < sequences ? static_cast<int>(left) : sequences;
  }

  DEVICE int64_t count() const { return count_; }  // steps of the longest sequence
  DEVICE int64_t first() const { return first_; }  // its number, and that of the first
  DEVICE int sequences() const { return sequences_; }
  DEVICE int direction() const { return direction_; }

  // The row of the block's first sequence in its k-th step, and how many run in it.
  struct Step {
    int64_t row;
    int running;
  };
  DEVICE Step step(int64_t k) const {
    if (k < 0 || k >= count_) return {0, 0};
    const int64_t t = step_of(k, count_, direction_), running = steps_.size(t) - first_;
    return {steps_.start(t) + first_, running < sequences_ ? static_cast<int>(running) : sequences_};
  }

 private:
  Steps steps_;
  int direction_;
  int64_t first_, count_;
  int sequences_;
};

template <Cell CELL, class Product, int HIDDEN, int BLOCKS, int HELD>
struct SingleBlockForward : Sizes<CELL, Product, HIDDEN, BLOCKS> {
  using Base = Sizes<CELL, Product, HIDDEN, BLOCKS>;
  using T = typename Product::T;
  using Parameters = Tiled<ForwardSweep>;
  using Held = Weights<T, Base::fragments, HELD, Base::threads>;
  static constexpr int G = Base::gates;
  static constexpr int stride = Factors<T>::stride(HIDDEN), buffer = Factors<T>::bytes(HIDDEN);
  static constexpr int shared_bytes = 2 * buffer + Held::bytes;

  static DEVICE void run(const Parameters& p) {
    const ForwardSweep& s = p.arrays;
    const Tile tile(s, p.sequences);
    const int d = tile.direction(), hidden = static_cast<int>(s.hidden);
    const ForwardLayer<CELL, T> layer(s, d);

    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[d]), G * s.hidden * s.hidden);
    const Held weights(2 * buffer, [&](int fragment, int row, int column) {
      const int gate = fragment % G, chunk = fragment / G % Base::chunks, block = fragment / G / Base::chunks;
      const int unit = Base::first_unit(block) + row, of = chunk * Base::chunk + column;
      const bool there = unit < hidden && of < hidden;
      return Product::factor(there ? wide(w_hh.load((int64_t(gate) * hidden + unit) * hidden + of)) : 0);
    });

    Lane lane{sequence_of(0), Base::first_unit(0) + unit_of(0)};
    const int64_t states = s.directions * s.sequences * s.hidden;
    const Global<const T> h_0(static_cast<const T*>(s.h_0), states), c_0(static_cast<const T*>(s.c_0), states);
    const auto state_of = [&](int unit, int e) {
      return (d * s.sequences + tile.first() + sequence_of(e)) * hidden + unit;
    };
    float h[BLOCKS][kElements] = {}, c[BLOCKS][kElements] = {}, b_hn[BLOCKS][2] = {};
    each([&](int block, int e, int unit) {
      if (unit < hidden && sequence_of(e) < tile.sequences()) {
        h[block][e] = wide(h_0.load(state_of(unit, e)));
        if (CELL == Cell::lstm) c[block][e] = wide(c_0.load(state_of(unit, e)));
      }
      if (unit < hidden && e % 2 == 0) b_hn[block][e / 2] = layer.b_hn(unit);
      factors(0).store(sequence_of(e) * stride + unit, Product::factor(h[block][e]));
    });

    T x[BLOCKS][kElements][G];
    typename Tile::Step now = tile.step(0);
    const auto load = [&](const typename Tile::Step& step) {
      each([&](int block, int e, int unit) {
#pragma unroll
        for (int gate = 0; gate < G; gate++) x[block][e][gate] = Narrow<T>::of(0);
        if (unit < hidden && sequence_of(e) < step.running)
          layer.load_gates(step.row + e % 2, e / 2 * 8 + block * 16, lane, x[block][e]);
      });
    };
    load(now);
    synchronize();

    for (int64_t k = 0; k < tile.count(); k++) {
      const Shared<T> before = factors(k % 2), after = factors((k + 1) % 2);
      // One step ahead, so that reading overlaps with the products.
      float sums[BLOCKS][G][kElements], x_n[BLOCKS][kElements];  // GRU's n has its sums apart
      each([&](int block, int e, int) {
#pragma unroll
        for (int gate = 0; gate < G; gate++) sums[block][gate][e] = wide(x[block][e][gate]);
        if (CELL == Cell::gru) x_n[block][e] = sums[block][G - 1][e], sums[block][G - 1][e] = b_hn[block][e / 2];
      });
      const typename Tile::Step next = tile.step(k + 1);
      load(next);
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        multiply_all(weights, block, before, sums[block]);
#pragma unroll
        for (int e = 0; e < kElements; e++) {
          const int unit = Base::first_unit(block) + unit_of(e), sequence = sequence_of(e);
          float x_e[G] = {}, of_h[G], saved[4], h_e = h[block][e], c_e = c[block][e];
          if (CELL == Cell::gru) x_e[G - 1] = x_n[block][e];
#pragma unroll
          for (int gate = 0; gate < G; gate++) of_h[gate] = sums[block][gate][e];
          cell_forward<CELL>(x_e, of_h, h_e, c_e, saved);
          // Sequences that have ended, or (backwards in time) not yet begun, keep their state.
          if (sequence < now.running) {
            h[block][e] = wide(Narrow<T>::of(h_e)), c[block][e] = c_e;
            if (unit < hidden) {
              layer.store_y(now.row + e % 2, e / 2 * 8 + block * 16, lane, Narrow<T>::of(h_e));
              layer.store_saved(now.row + e % 2, e / 2 * 8 + block * 16, lane, saved, c_e);
            }
          }
          after.store(sequence * stride + unit, Product::factor(h[block][e]));
        }
      }
      now = next;
      synchronize();
    }

    const Global<T> h_n(static_cast<T*>(s.h_n), states), c_n(static_cast<T*>(s.c_n), states);
    each([&](int block, int e, int unit) {
      if (unit >= hidden || sequence_of(e) >= tile.sequences()) return;
      h_n.store(state_of(unit, e), Narrow<T>::of(h[block][e]));
      if (CELL == Cell::lstm) c_n.store(state_of(unit, e), Narrow<T>::of(c[block][e]));
    });
  }

 private:
  static DEVICE Shared<T> factors(int which) { return {which * buffer, buffer / static_cast<int>(sizeof(T))}; }

  template <class Do>
  static DEVICE void each(Do act) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int e = 0; e < kElements; e++) act(block, e, Base::first_unit(block) + unit_of(e));
  }

  // Adds the products to `result`.
  static DEVICE void multiply_all(const Held& weights, int block, Shared<T> h, float (&result)[G][kElements]) {
    float sum[G][Product::sums];
#pragma unroll
    for (int gate = 0; gate < G; gate++) Product::begin(result[gate], sum[gate]);
#pragma unroll
    for (int chunk = 0; chunk < Base::chunks; chunk++) {
      Fragment of[G];
#pragma unroll
      for (int gate = 0; gate < G; gate++) of[gate] = weights[(block * Base::chunks + chunk) * G + gate];
      Product::template add<G>(sum, of, h, stride, chunk * Base::chunk);
    }
#pragma unroll
    for (int gate = 0; gate < G; gate++) Product::finish(sum[gate], result[gate]);
  }
};

template <Cell CELL, class Product, int HIDDEN, int BLOCKS, int HELD>
struct SingleBlockBackward : Sizes<CELL, Product, HIDDEN, BLOCKS> {
  using Base = Sizes<CELL, Product, HIDDEN, BLOCKS>;
  using T = typename Product::T;
  using Parameters = Tiled<BackwardSweep>;
  using Held = Weights<T, Base::fragments, HELD, Base::threads>;
  static constexpr int G = Base::gates;
  static constexpr int width = G * HIDDEN;
  static constexpr int stride = Factors<T>::stride(width), buffer = Factors<T>::bytes(width);
  static constexpr int shared_bytes = 2 * buffer + Held::bytes;

  static DEVICE void run(const Parameters& p) {
    const BackwardSweep& s = p.arrays;
    const Tile tile(s, p.sequences);
    const int d = tile.direction(), hidden = static_cast<int>(s.hidden);
    const BackwardLayer<CELL, T> layer(s, d);

    // The transposed matrices of all gates, side by side.
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[d]), G * s.hidden * s.hidden);
    const Held weights(2 * buffer, [&](int fragment, int row, int column) {
      const int gate = fragment % G, chunk = fragment / G % Base::chunks, block = fragment / G / Base::chunks;
      const int unit = Base::first_unit(block) + row, of = chunk * Base::chunk + column;
      const bool there = unit < hidden && of < hidden;
      return Product::factor(there ? wide(w_hh.load((int64_t(gate) * hidden + of) * hidden + unit)) : 0);
    });

    Lane lane{sequence_of(0), Base::first_unit(0) + unit_of(0)};
    const int64_t states = s.directions * s.sequences * s.hidden;
    const Global<const T> grad_h_n(static_cast<const T*>(s.grad_h_n), states);
    const Global<const T> grad_c_n(static_cast<const T*>(s.grad_c_n), states);
    const auto state_of = [&](int unit, int e) {
      return (d * s.sequences + tile.first() + sequence_of(e)) * hidden + unit;
    };
    float grad_h[BLOCKS][kElements] = {}, grad_c[BLOCKS][kElements] = {};
    each([&](int block, int e, int unit) {
      if (unit >= hidden || sequence_of(e) >= tile.sequences()) return;
      if (grad_h_n) grad_h[block][e] = wide(grad_h_n.load(state_of(unit, e)));
      if (CELL == Cell::lstm && grad_c_n) grad_c[block][e] = wide(grad_c_n.load(state_of(unit, e)));
    });

    Past<T> past[BLOCKS][kElements];
    typename Tile::Step now = tile.step(tile.count() - 1), before = tile.step(tile.count() - 2);
    const auto load = [&] {
      each([&](int block, int e, int unit) {
        const int sequence = sequence_of(e);
        past[block][e] = {};
        if (unit < hidden && sequence < now.running)
          layer.load(now.row + e % 2, before.row + e % 2, sequence < before.running, tile.first() + e % 2,
                     e / 2 * 8 + block * 16, lane, past[block][e]);
      });
    };
    load();

    for (int64_t k = tile.count() - 1; k >= 0; k--) {
      const Shared<T> gradients = factors(k % 2);
      each([&](int block, int e, int unit) {
        const int sequence = sequence_of(e);
        const bool running = sequence < now.running;
        float grad[4] = {}, grad_h_e = grad_h[block][e], grad_c_e = grad_c[block][e];
        layer.step(past[block][e], grad_h_e, grad_c_e, grad);
        if (running) grad_h[block][e] = grad_h_e, grad_c[block][e] = grad_c_e;
        if (running && unit < hidden) layer.store_gates(now.row + e % 2, e / 2 * 8 + block * 16, lane, grad);
#pragma unroll
        for (int gate = 0; gate < G; gate++)
          gradients.store(sequence * stride + gate * HIDDEN + unit, Product::factor(running ? grad[gate] : 0));
      });
      synchronize();
      now = before, before = tile.step(k - 2);
      load();  // while the matrix cores multiply
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        multiply_all(weights, block, gradients, grad_h[block]);  // no more than zero for a sequence that did not run
      }
    }

    const Global<T> grad_h_0(static_cast<T*>(s.grad_h_0), states), grad_c_0(static_cast<T*>(s.grad_c_0), states);
    each([&](int block, int e, int unit) {
      if (unit >= hidden || sequence_of(e) >= tile.sequences()) return;
      grad_h_0.store(state_of(unit, e), Narrow<T>::of(grad_h[block][e]));
      if (CELL == Cell::lstm) grad_c_0.store(state_of(unit, e), Narrow<T>::of(grad_c[block][e]));
    });
  }

 private:
  static DEVICE Shared<T> factors(int which) { return {which * buffer, buffer / static_cast<int>(sizeof(T))}; }

  template <class Do>
  static DEVICE void each(Do act) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int e = 0; e < kElements; e++) act(block, e, Base::first_unit(block) + unit_of(e));
  }

  // Adds the products to `result`.
  static DEVICE void multiply_all(const Held& weights, int block, Shared<T> gradients, float (&result)[kElements]) {
    constexpr int sums = Product::splits_sums ? G : 1;
    float sum[sums][Product::sums], part[sums][kElements] = {};
    Product::begin(result, sum[0]);
#pragma unroll
    for (int i = 1; i < sums; i++) Product::begin(part[i], sum[i]);
#pragma unroll
    for (int chunk = 0; chunk < Base::chunks; chunk++)
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
        const Fragment of[1] = {weights[(block * Base::chunks + chunk) * G + gate]};
        Product::template add<1>(sum + gate % sums, of, gradients, stride, gate * HIDDEN + chunk * Base::chunk);
      }
    Product::finish(sum[0], result);
#pragma unroll
    for (int i = 1; i < sums; i++) {
      Product::finish(sum[i], part[i]);
#pragma unroll
      for (int e = 0; e < kElements; e++) result[e] += part[i][e];
    }
  }
};

}  // namespace seqkernels::device
