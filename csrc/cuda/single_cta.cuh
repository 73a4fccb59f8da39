// A sweep in one launch: a block takes up to 8 sequences through all their steps, with the recurrent weights in its
// registers and shared memory, as far as these go. Blocks know nothing of each other; both directions run side by side
// (the second index of a block). A thread keeps the same units and sequences for all steps, and their states in
// registers; what the other threads need of them goes through shared memory, in two buffers, so that one barrier a step
// is enough.
#pragma once
#include "layer.cuh"
#include "mma.cuh"

namespace seqkernels::device {

// A kernel for layers of up to HIDDEN units (a multiple of a chunk), of which a warp takes BLOCKS times 16, and a
// thread holds HELD groups of fragments of the weights in registers. EVEN: the layer has an even number of units.
template <Cell CELL_, class Product_, int HIDDEN_, int BLOCKS_, int HELD, bool EVEN_>
struct Configuration {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr Cell CELL = CELL_;
  static constexpr int G = gates_of(CELL), HIDDEN = HIDDEN_, BLOCKS = BLOCKS_;
  static constexpr bool EVEN = EVEN_;
  static constexpr int threads = HIDDEN / kUnits / BLOCKS * 32;
  static constexpr int chunk = Factors<T>::chunk, chunks = HIDDEN / chunk;
  static_assert(HIDDEN % chunk == 0 && HIDDEN % (kUnits * BLOCKS) == 0);
  using Held = Weights<G, BLOCKS, chunks, HELD, threads>;
};

// The steps of one block's sequences, in the order of a direction.
class Tile {
 public:
  DEVICE Tile(const SweepArgs& s, int sequences, int64_t number = block(), int direction = block_y())
      : steps_(s), direction_(direction), first_(number * sequences), count_(steps_.count(first_)) {
    const int64_t left = s.sequences - first_;
    sequences_ = left < sequences ? static_cast<int>(left) : sequences;
  }

  DEVICE int64_t count() const { return count_; }  // steps of the longest sequence
  DEVICE int64_t first() const { return first_; }  // its number, and that of the first
  DEVICE int sequences() const { return sequences_; }
  DEVICE int direction() const { return direction_; }

  // What memory says of the k-th step: asked for a step before it is used, so that nobody waits for it.
  struct Asked {
    int64_t start, size;
  };
  DEVICE Asked ask(int64_t k) const {
    if (k < 0 || k >= count_) return {0, first_};  // none run
    const int64_t t = step_of(k, count_, direction_);
    return {steps_.start(t), steps_.size(t)};
  }

  // The row of the block's first sequence in a step, and how many run in it.
  struct Step {
    int64_t row;
    int running;
  };
  DEVICE Step step(Asked asked) const {
    const int64_t running = asked.size - first_;
    return {asked.start + first_, running < sequences_ ? static_cast<int>(running) : sequences_};
  }

 private:
  Steps steps_;
  int direction_;
  int64_t first_, count_;
  int sequences_;
};

// What a thread of either pass has: in each of its BLOCKS two units side by side, in two sequences. Element e of them
// is unit e / 2 in sequence e % 2. WIDTH: how many factors of a sequence the threads exchange.
template <class C, int WIDTH>
struct Share {
  using T = typename C::T;
  static constexpr int stride = Factors<T>::stride(WIDTH), buffer = Factors<T>::bytes(WIDTH);

  static DEVICE Shared<T> factors(int which) { return {which * buffer, buffer / static_cast<int>(sizeof(T))}; }

  const Tile& tile;
  int64_t hidden, states;  // of all directions and sequences
  int64_t first_state;     // where element 0 of block 0 is among them
  Lane lane;               // its sequence and unit
  int there[C::BLOCKS];    // units of a block that the layer has, 0 to 2

  DEVICE Share(const SweepArgs& s, const Tile& tile)
      : tile(tile),
        hidden(s.hidden),
        states(s.directions * s.sequences * s.hidden),
        lane{sequence_of_lane(), thread() / 32 * C::BLOCKS * kUnits + unit_of_lane()} {
    first_state = (tile.direction() * s.sequences + tile.first() + lane.sequence) * hidden + lane.unit;
#pragma unroll
    for (int block = 0; block < C::BLOCKS; block++)
      there[block] = two_of(static_cast<int>(hidden) - lane.unit - block * kUnits);
  }

  template <class Do>
  DEVICE void each(Do act) const {
#pragma unroll
    for (int block = 0; block < C::BLOCKS; block++)
#pragma unroll
      for (int s = 0; s < 2; s++) act(block, s);
  }

  // How many of the two units take part, if so many sequences do.
  DEVICE int count(int block, int s, int sequences) const { return lane.sequence + s < sequences ? there[block] : 0; }
  DEVICE int place(int block, int s) const { return (lane.sequence + s) * stride + lane.unit + block * kUnits; }

  DEVICE Pair<T> load_state(const void* array, int block, int s) const {
    if (!array) return {};
    const Global<const T> from(static_cast<const T*>(array), states);
    return load_units<false>(from, state(block, s), count(block, s, tile.sequences()));
  }
  DEVICE void store_state(void* array, int block, int s, Pair<T> units) const {
    const Global<T> to(static_cast<T*>(array), states);
    store_units<false>(to, state(block, s), units, count(block, s, tile.sequences()));
  }

 private:
  DEVICE int64_t state(int block, int s) const { return first_state + s * hidden + block * kUnits; }
};

template <class C>
struct SingleCtaForward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Mine = Share<C, C::HIDDEN>;
  using Parameters = SingleCta<ForwardArgs>;
  static constexpr int G = C::G, BLOCKS = C::BLOCKS, buffers = 2 * Mine::buffer;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const Mine mine(s, tile);
    const ForwardLayer<C::CELL, T, C::EVEN> layer(s, tile.direction());
    const typename C::Held weights(s.arranged, tile.direction(), buffers, s.shared);

    Pair<T> h[BLOCKS][2];
    float c[BLOCKS][2][2], b_hn[BLOCKS][2];
    mine.each([&](int block, int s_) {
      h[block][s_] = mine.load_state(s.h_0, block, s_);
      widen(mine.load_state(s.c_0, block, s_), c[block][s_]);
      if (s_ == 0) layer.load_b_hn(mine.lane.unit + block * kUnits, mine.there[block], b_hn[block]);
      Mine::factors(0).store_pair(mine.place(block, s_), Product::factors(h[block][s_]));
    });

    // Gates are read one step ahead, so that reading overlaps with the products, and where they lie two steps ahead.
    Pair<T> x[BLOCKS][2][G];
    typename Tile::Step now = tile.step(tile.ask(0)), next = tile.step(tile.ask(1));
    const auto load = [&](int block, const typename Tile::Step& step) {
#pragma unroll
      for (int s_ = 0; s_ < 2; s_++)
        layer.load_gates(step.row + s_, block * kUnits, mine.lane, mine.count(block, s_, step.running), x[block][s_]);
    };
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) load(block, now);
    synchronize();

    for (int64_t k = 0; k < tile.count(); k++) {
      const Shared<T> before = Mine::factors(k % 2), after = Mine::factors((k + 1) % 2);
      const typename Tile::Asked after_next = tile.ask(k + 2);
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        float sums[G][kElements], x_n[kElements];  // GRU's n has its sums apart
#pragma unroll
        for (int s_ = 0; s_ < 2; s_++)
#pragma unroll
          for (int gate = 0; gate < G; gate++) {
            float units[2];
            widen(x[block][s_][gate], units);
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const bool apart = C::CELL == Cell::gru && gate == G - 1;
              sums[gate][i * 2 + s_] = apart ? b_hn[block][i] : units[i];
              if (apart) x_n[i * 2 + s_] = units[i];
            }
          }
        load(block, next);
        multiply_all(weights, block, before, now.running, sums);
#pragma unroll
        for (int s_ = 0; s_ < 2; s_++) {
          float saved[2][4], h_new[2], c_new[2] = {c[block][s_][0], c[block][s_][1]};
          widen(h[block][s_], h_new);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float x_i[G] = {}, of_h[G];
            if (C::CELL == Cell::gru) x_i[G - 1] = x_n[i * 2 + s_];
#pragma unroll
            for (int gate = 0; gate < G; gate++) of_h[gate] = sums[gate][i * 2 + s_];
            cell_forward<C::CELL>(x_i, of_h, h_new[i], c_new[i], saved[i]);
          }
          // Sequences that have ended, or (backwards in time) not yet begun, keep their state.
          if (mine.lane.sequence + s_ < now.running) {
            const int there = mine.there[block];
            zero_absent(h_new, there);
            h[block][s_] = narrow<T>(h_new), c[block][s_][0] = c_new[0], c[block][s_][1] = c_new[1];
            layer.store_y(now.row + s_, block * kUnits, mine.lane, there, h[block][s_]);
            layer.store_saved(now.row + s_, block * kUnits, mine.lane, there, saved, c_new);
          }
          after.store_pair(mine.place(block, s_), Product::factors(h[block][s_]));
        }
      }
      now = next, next = tile.step(after_next);
      synchronize();
    }

    mine.each([&](int block, int s_) {
      mine.store_state(s.h_n, block, s_, h[block][s_]);
      if (C::CELL == Cell::lstm) mine.store_state(s.c_n, block, s_, narrow<T>(c[block][s_]));
    });
  }

 private:
  // Adds the products of so many sequences to `result`.
  static DEVICE void multiply_all(const typename C::Held& weights, int block, Shared<T> h, int sequences,
                                  float (&result)[G][kElements]) {
    for_sequences<Product>(sequences, [&](auto product) {
      Sums<decltype(product), G> sums(result);
      weights.each(block, [&](int chunk, auto of) { sums.add(of, h, Mine::stride, chunk * C::chunk); });
      sums.finish(result);
    });
  }
};

template <class C>
struct SingleCtaBackward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Mine = Share<C, C::G * C::HIDDEN>;
  using Parameters = SingleCta<BackwardArgs>;
  static constexpr int G = C::G, BLOCKS = C::BLOCKS, buffers = 2 * Mine::buffer;

  static DEVICE void run(const Parameters& s) {
    const Tile tile(s, s.tile);
    const Mine mine(s, tile);
    const BackwardLayer<C::CELL, T, C::EVEN> layer(s, tile.direction());
    const typename C::Held weights(s.arranged, tile.direction(), buffers, s.shared);  // transposed

    float grad_h[BLOCKS][1][kElements], grad_c[BLOCKS][2][2];
    mine.each([&](int block, int s_) {
      float units[2];
      widen(mine.load_state(s.grad_h_n, block, s_), units);
      grad_h[block][0][s_] = units[0], grad_h[block][0][2 + s_] = units[1];
      widen(mine.load_state(s.grad_c_n, block, s_), grad_c[block][s_]);
    });

    Past<T> past[BLOCKS][2];
    const int64_t last = tile.count() - 1;
    typename Tile::Step now = tile.step(tile.ask(last)), before = tile.step(tile.ask(last - 1)),
                        earlier = tile.step(tile.ask(last - 2));
    const auto load = [&] {
      mine.each([&](int block, int s_) {
        past[block][s_] = {};
        const int count = mine.count(block, s_, now.running);
        if (count)
          layer.load(now.row + s_, before.row + s_, mine.lane.sequence + s_ < before.running, tile.first() + s_,
                     block * kUnits, mine.lane, count, past[block][s_]);
      });
    };
    load();

    for (int64_t k = last; k >= 0; k--) {
      const Shared<T> gradients = Mine::factors(k % 2);
      const typename Tile::Asked asked = tile.ask(k - 3);
      mine.each([&](int block, int s_) {
        const bool running = mine.lane.sequence + s_ < now.running;
        float grad[2][4] = {}, h_new[2] = {grad_h[block][0][s_], grad_h[block][0][2 + s_]};
        float c_new[2] = {grad_c[block][s_][0], grad_c[block][s_][1]};
        zero_absent(h_new, mine.there[block]);
        layer.step(past[block][s_], h_new, c_new, grad);
        if (running) {
#pragma unroll
          for (int i = 0; i < 2; i++) grad_h[block][0][i * 2 + s_] = h_new[i], grad_c[block][s_][i] = c_new[i];
          layer.store_gates(now.row + s_, block * kUnits, mine.lane, mine.there[block], grad);
        }
#pragma unroll
        for (int gate = 0; gate < G; gate++) {
          const Pair<T> factors = running ? Product::factors(grad[0][gate], grad[1][gate]) : Pair<T>{};
          gradients.store_pair(mine.place(block, s_) + gate * C::HIDDEN, factors);
        }
      });
      synchronize();
      const int running = now.running;
      now = before, before = earlier, earlier = tile.step(asked);
      load();  // while the matrix cores multiply
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        // No more than zero for a sequence that did not run.
        multiply_all(weights, block, gradients, running, grad_h[block]);
      }
    }

    mine.each([&](int block, int s_) {
      const float units[2] = {grad_h[block][0][s_], grad_h[block][0][2 + s_]};
      mine.store_state(s.grad_h_0, block, s_, narrow<T>(units));
      if (C::CELL == Cell::lstm) mine.store_state(s.grad_c_0, block, s_, narrow<T>(grad_c[block][s_]));
    });
  }

 private:
  // Adds the products of so many sequences to `result`.
  static DEVICE void multiply_all(const typename C::Held& weights, int block, Shared<T> gradients, int sequences,
                                  float (&result)[1][kElements]) {
    for_sequences<Product>(sequences, [&](auto product) {
      Sums<decltype(product), 1, (G < 2 ? 2 : G)> sums(result);
      weights.each(block, [&](int chunk, auto of) {
#pragma unroll
        for (int gate = 0; gate < G; gate++)
          sums.add([&](int) { return of(gate); }, gradients, Mine::stride, gate * C::HIDDEN + chunk * C::chunk,
                   gate * 2);
      });
      sums.finish(result);
    });
  }
};

}  // namespace seqkernels::device
