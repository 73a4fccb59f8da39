// A sweep in one launch by groups of blocks (compute capability 9.0): a group takes up to 8 sequences at a time through
// all their steps, each of its blocks a slice of the hidden units, with the recurrent weights of all gates of these in
// its registers and shared memory. Groups know nothing of each other; both directions run side by side (the second
// index of a block). Here is what a block does with its slice; how the blocks of a group tell each other of a step,
// once a step, is an Exchange: through the shared memory of a cluster (cluster.cuh), or through the L2 cache
// (persistent_grid.cuh).
#pragma once
#include "layer.cuh"
#include "mma.cuh"
#include "single_cta.cuh"

namespace seqkernels::device {

// How a block is made: of UNITS hidden units (a multiple of 16) and so many WARPS. A thread holds RESIDENT fragments of the
// weights in registers. EVEN: the layer has an even number of units.
template <Cell CELL_, class Product_, int UNITS_, int WARPS, int RESIDENT, bool EVEN_>
struct Slice {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr Cell CELL = CELL_;
  static constexpr int G = gates_of(CELL), UNITS = UNITS_, RESIDENT = RESIDENT;
  static constexpr bool EVEN = EVEN_;
  static constexpr int warps = WARPS, threads = warps * 32, owners = UNITS / 2 * kMaxTile / 32;  // warps with states
  static constexpr int chunk = Factors<T>::chunk;
  static_assert(UNITS % kMmaRows == 0 && UNITS / 2 * kMaxTile <= threads);
};

// A sweep, and how the memory of a block is laid out for it (byte offsets; the kernels' `of` says what for).
template <class Pass>
struct Sliced : Pass {
  int tile;    // sequences that a group takes at once: 1 to 8
  int stride;  // of a row of states, or of gates' gradients: factors
  int exchanged, weights, bytes;
};

constexpr int ceil_div(int64_t n, int divisor) { return static_cast<int>((n + divisor - 1) / divisor); }

DEVICE void words_of(Pair<float> pair, uint32_t (&words)[4]) {
  words[0] = bits(first(pair)), words[1] = bits(second(pair));
}
template <class T>
DEVICE void words_of(Pair<T> pair, uint32_t (&words)[4]) {
  words[0] = bits(pair);
}

// 16 bytes of a row, of which 4 lanes side by side (2 of float32) have two numbers each.
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

// What a thread has of either pass: two units side by side of one sequence. Threads beyond these have none, by warps.
template <class C>
struct Own {
  using T = typename C::T;
  static constexpr int pairs = C::UNITS / 2;

  bool any;      // whether it has some
  int sequence;  // of the tile
  int at, unit;  // the first unit in the slice, and in the layer
  int there;     // units that the layer has, of a sequence that the tile has

  DEVICE Own(const SweepArgs& s, const Tile& tile, int rank)
      : any(thread() < pairs * kMaxTile),
        sequence(thread() / pairs),
        at(thread() % pairs * 2),
        unit(rank * C::UNITS + at),
        sweep_(s),
        tile_(tile) {
    there = sequence < tile.sequences() ? two_of(static_cast<int>(s.hidden) - unit) : 0;
  }

  DEVICE Lane lane() const { return {sequence, unit}; }

  DEVICE Pair<T> load_state(const void* array) const {
    if (!array) return {};
    return load_units<false>(Global<const T>(static_cast<const T*>(array), states()), state(), there);
  }
  DEVICE void store_state(void* array, Pair<T> units) const {
    store_units<false>(Global<T>(static_cast<T*>(array), states()), state(), units, there);
  }

 private:
  // Computed where they are used, so that no register holds them through the steps.
  DEVICE int64_t states() const { return sweep_.directions * sweep_.sequences * sweep_.hidden; }
  DEVICE int64_t state() const {
    return (tile_.direction() * sweep_.sequences + tile_.first() + sequence) * sweep_.hidden + unit;
  }

  const SweepArgs& sweep_;
  const Tile& tile_;
};

// The arrivals of the n-th exchange: two mbarriers, at the begin of shared memory, take turns.
DEVICE Mbarrier arrivals(int64_t n) { return Mbarrier(static_cast<int>(n % 2) * 8); }
DEVICE int phase(int64_t n) { return static_cast<int>(n / 2 % 2); }

// To the same place of so many peers of a cluster, the first of them `first`: the lanes that have the same 16 bytes (4
// side by side, 2 of float32) share the peers, and each begins with another one.
template <class T>
DEVICE void push_to_all(Shared<T> array, int at, Vec16 words, int first, int peers, Mbarrier arrivals) {
  constexpr int lanes = 8 / sizeof(T);
#pragma unroll 1
  for (int i = lane() % lanes; i < peers; i += lanes)
    array.st_async(at, words, first + i < peers ? first + i : first + i - peers, arrivals);
}

template <class C, template <class> class Exchange_>
struct SliceForward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Exchange = Exchange_<C>;
  using Parameters = typename Exchange::template Parameters<ForwardArgs>;
  static constexpr int G = C::G, UNITS = C::UNITS, size = sizeof(T);
  static constexpr int PARTS = C::warps / (UNITS / kMmaRows);  // warps that share the columns of 16 units
  static_assert(C::warps % (UNITS / kMmaRows) == 0);
  using Held = Stationary<T, G, C::RESIDENT, C::threads>;

  // Of a part the sums of all gates and sequences; rows so far apart that 16 lanes store two each to different banks.
  static constexpr int sums_stride = UNITS + 4, part_sums = G * kMaxTile * sums_stride,
                       all_sums = PARTS * part_sums - 4;

  // For a group of so many blocks, in clusters of so many.
  static Sliced<ForwardArgs> of(const ForwardArgs& s, int tile, int blocks, int /*cluster*/) {
    const int stride = Factors<T>::stride(ceil_div(blocks * UNITS, C::chunk) * C::chunk);
    const int exchanged = 16 + 2 * kMaxTile * stride * size, weights = exchanged + all_sums * 4;
    return {s, tile, stride, exchanged, weights, weights + Held::bytes(ceil_div(ceil_div(s.hidden, C::chunk), PARTS))};
  }

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const int hidden = static_cast<int>(s.hidden), stride = s.stride;
    const ForwardArrays<C::CELL, T, C::EVEN> layer(s, exchange.direction());
    const auto states = [&](int64_t n) {  // that the n-th exchange follows
      return Shared<T>(16 + static_cast<int>(n % 2) * kMaxTile * stride * size, kMaxTile * stride);
    };
    const Shared<float> sums(s.exchanged, all_sums);

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    const int warp = thread() / 32, part = warp % PARTS, first_row = warp / PARTS * kMmaRows;
    const int chunks = (hidden + C::chunk - 1) / C::chunk;
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[exchange.direction()]), G * s.hidden * s.hidden);
    const Held weights(
        (chunks - part + PARTS - 1) / PARTS, s.weights, s.bytes, [&](int group, int gate, int row, int column) {
          const int unit = exchange.rank() * UNITS + first_row + row, of = (part + group * PARTS) * C::chunk + column;
          const int at = (gate * hidden + unit) * hidden + of;  // of at most 4 matrices of 2112 by 2112
          return Product::factors(load_units<C::EVEN>(w_hh, at, unit < hidden ? two_of(hidden - of) : 0));
        });

    int64_t before = 0;  // exchanges, for other tiles
    exchange.each_tile(s, [&](const Tile& tile) {
      // A sequence that begins later, backwards in time, finds its initial state in either buffer.
      const Global<const T> h_0(static_cast<const T*>(s.h_0), s.directions * s.sequences * s.hidden);
      for (int i = thread(); i < kMaxTile * stride / 2; i += C::threads) {
        const int sequence = i * 2 / stride, unit = i * 2 % stride;
        const int there = sequence < tile.sequences() ? two_of(hidden - unit) : 0;
        const int64_t row = tile.direction() * s.sequences + tile.first() + sequence;
        const Pair<T> h = Product::factors(load_units<false>(h_0, row * hidden + unit, there));
        states(0).store_pair(sequence * stride + unit, h);
        states(1).store_pair(sequence * stride + unit, h);
      }
      exchange.prepared();
      cluster_arrive();

      const Own<C> mine(s, tile, exchange.rank());
      Pair<T> h = mine.load_state(s.h_0), x[G];
      float c[2], b_hn[2];
      to_acc(mine.load_state(s.c_0), c);
      layer.load_b_hn(mine.unit, mine.there, b_hn);
      typename Tile::Step now = tile.step(tile.prefetch(0));
      typename Tile::Prefetched next = tile.prefetch(1);
      const auto load = [&] {
        if (mine.any) layer.load_gates(now.row, 0, mine.lane(), mine.sequence < now.running ? mine.there : 0, x);
      };
      load();
      cluster_wait();

      for (int64_t k = 0; k < tile.count(); k++) {
        const int64_t n = before + k;
        const bool last = k + 1 == tile.count();
        if (thread() == 0 && !last) arrivals(n).expect(now.running * exchange.blocks() * UNITS * size);
        if (k > 0) exchange.receive(n - 1);
        float result[G][kElements];
        multiply_all(weights, states(n), stride, part, now.running, result);
#pragma unroll
        for (int gate = 0; gate < G; gate++)
#pragma unroll
          for (int s_ = 0; s_ < 2; s_++)
            sums.store_pair(place(part, gate, sequence_of_lane() + s_) + first_row + unit_of_lane(),
                            pair(result[gate][s_], result[gate][2 + s_]));
        synchronize();
        if (mine.any) {
          const bool runs = mine.sequence < now.running;
          float saved[2][4];
          if (runs) {
            float h_new[2];
            to_acc(h, h_new);
            step(sums, mine, x, b_hn, h_new, c, saved);
            zero_absent(h_new, mine.there);
            h = from_acc<T>(h_new);
          }
          // Once all lanes have read their sums: others may overwrite them after that.
          if (!last) exchange.give(states(n + 1), stride, mine, Product::factors(h), runs, n);
          if (runs) {
            layer.store_y(now.row, 0, mine.lane(), mine.there, h);
            layer.store_saved(now.row, 0, mine.lane(), mine.there, saved, c);
          }
        }
        if (!last) exchange.pass_on(states(n + 1), stride, now.running, n);
        now = tile.step(next), next = tile.prefetch(k + 2);
        load();
      }
      if (tile.count() > 0) before += tile.count() - 1;

      if (!mine.any) return;
      mine.store_state(s.h_n, h);
      if (C::CELL == Cell::lstm) mine.store_state(s.c_n, from_acc<T>(c));
    });
  }

 private:
  static DEVICE int place(int part, int gate, int sequence) {
    return part * part_sums + (gate * kMaxTile + sequence) * sums_stride;
  }

  // One part of W h for the 16 units of a warp, of so many sequences.
  static DEVICE void multiply_all(const Held& weights, Shared<T> h, int stride, int part, int sequences,
                                  float (&result)[G][kElements]) {
#pragma unroll
    for (int gate = 0; gate < G; gate++)
#pragma unroll
      for (int e = 0; e < kElements; e++) result[gate][e] = 0;
    for_sequences<Product>(sequences, [&](auto product) {
      Accumulators<decltype(product), G> sums(result);
      weights.each([&](int group, auto of) { sums.add(of, h, stride, (part + group * PARTS) * C::chunk); });
      sums.finish(result);
    });
  }

  // The step of two units of a sequence; h and c change in place.
  static DEVICE void step(Shared<float> sums, const Own<C>& mine, const Pair<T> (&x)[G], const float (&b_hn)[2],
                          float (&h)[2], float (&c)[2], float (&saved)[2][4]) {
    float x_i[2][G] = {}, of_h[2][G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const bool apart = C::CELL == Cell::gru && gate == G - 1;  // GRU's n has its sums apart
      float of_x[2];
      to_acc(x[gate], of_x);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        of_h[i][gate] = apart ? b_hn[i] : of_x[i];
        if (apart) x_i[i][gate] = of_x[i];
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const Pair<float> sum = sums.load_pair(place(part, gate, mine.sequence) + mine.at);
        of_h[0][gate] += first(sum), of_h[1][gate] += second(sum);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) cell_forward<C::CELL>(x_i[i], of_h[i], h[i], c[i], saved[i]);
  }
};

template <class C, template <class> class Exchange_>
struct SliceBackward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Exchange = Exchange_<C>;
  using Parameters = typename Exchange::template Parameters<BackwardArgs>;
  static constexpr int G = C::G, UNITS = C::UNITS, size = sizeof(T);
  static constexpr int OF = Exchange::of_units;             // units whose gates' gradients are multiplied at once,
  static constexpr int chunks = ceil_div(G * OF, C::chunk);  // in so many chunks,
  static constexpr int rows = 2 * kMmaRows;  // for so many states, so that factors are read half as often
  using Held = Stationary<T, 2 * chunks, C::RESIDENT, C::threads>;

  // For a group of so many blocks, in clusters of so many.
  static Sliced<BackwardArgs> of(const BackwardArgs& s, int tile, int blocks, int cluster) {
    const int sets = Exchange::sets_of(cluster), states = Exchange::states_of(s.hidden, blocks, cluster);
    const int stride = Factors<T>::stride(sets * chunks * C::chunk);
    const int exchanged = 16 + 2 * kMaxTile * stride * size, weights = exchanged + Exchange::exchanged_bytes(blocks);
    return {s,         tile,    stride,
            exchanged, weights, weights + Held::bytes(ceil_div(ceil_div(states, rows), C::warps) * sets)};
  }

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const int hidden = static_cast<int>(s.hidden), stride = s.stride;
    const BackwardArrays<C::CELL, T, C::EVEN> layer(s, exchange.direction());
    const auto gradients = [&](int64_t n) {
      return Shared<T>(16 + static_cast<int>(n % 2) * kMaxTile * stride * size, kMaxTile * stride);
    };

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    for (int i = thread(); i < kMaxTile * stride / 2; i += C::threads)
      gradients(0).store_pair(i * 2, Pair<T>{}), gradients(1).store_pair(i * 2, Pair<T>{});
    cluster_arrive();
    // The n-th group of a warp's fragments is for 32 states, and for the gates of one set of units.
    const int warp = thread() / 32, sets = exchange.sets();
    const auto first_row = [&](int group) { return (warp + group / sets * C::warps) * rows; };
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[exchange.direction()]), G * s.hidden * s.hidden);
    const int row_groups = (exchange.states() + rows - 1) / rows;
    const Held weights(
        (row_groups - warp + C::warps - 1) / C::warps * sets, s.weights, s.bytes,
        [&](int group, int i, int row, int column) {
          const int of = i / 2 * C::chunk + column, gate = of / OF;
          const int own = exchange.first_of_set(group % sets) + of % OF;
          const int state = first_row(group) + i % 2 * kMmaRows + row;
          const int there = state < exchange.states() && gate < G ? two_of(hidden - own) : 0;
          const int at = (gate * hidden + own) * hidden + exchange.first_state() + state;
          const T zero = from_acc<T>(0);
          return Product::factors(pair(there > 0 ? w_hh.load(at) : zero, there > 1 ? w_hh.load(at + hidden) : zero));
        });
    cluster_wait();

    int64_t before_all = 0;  // exchanges, for other tiles
    exchange.each_tile(s, [&](const Tile& tile) {
      const Own<C> mine(s, tile, exchange.rank());
      float grad_h[2], grad_c[2];
      to_acc(mine.load_state(s.grad_h_n), grad_h);
      to_acc(mine.load_state(s.grad_c_n), grad_c);

      const int64_t count = tile.count();
      typename Tile::Step now = tile.step(tile.prefetch(count - 1));
      const auto load = [&](const typename Tile::Step& step, const typename Tile::Step& step_before) {
        StepInputs<T> read = {};
        if (mine.any && mine.sequence < step.running && mine.there)
          layer.load(step.row, step_before.row, mine.sequence < step_before.running, tile.first(), 0, mine.lane(),
                     mine.there, read);
        return read;
      };
      const typename Tile::Step second = tile.step(tile.prefetch(count - 2)), third = tile.step(tile.prefetch(count - 3));
      StepInputs<T> past = load(now, second), past_before = load(second, third);

      int ran = 0;  // sequences, in the exchange before
      for (int64_t i = 0; i < count; i++) {
        const int64_t n = before_all + i;
        const int running = now.running;
        if (thread() == 0) exchange.expect(n, running);
        if (i > 0) exchange.collect(n - 1, ran, mine, grad_h);
        const bool runs = mine.any && mine.sequence < running;
        float grad[2][4] = {};
        zero_absent(grad_h, mine.there);
        if (runs) layer.step(past, grad_h, grad_c, grad);
        exchange.give(gradients(n), stride, mine, grad, runs, n);
        exchange.receive(n);
        for_sequences<Product>(running, [&](auto product) {
          using HalfAccumulators = Accumulators<decltype(product), 2>;
          const float zero[2][kElements] = {};
          HalfAccumulators sums(zero);
          weights.each([&](int group, auto of) {
            const int set = group % sets;
            if (set == 0) sums = HalfAccumulators(zero);
#pragma unroll
            for (int chunk = 0; chunk < chunks; chunk++)
              sums.add([&](int half) { return of(chunk * 2 + half); }, gradients(n), stride,
                       (set * chunks + chunk) * C::chunk);
            if (set + 1 < sets) return;
            float result[2][kElements] = {};
            sums.finish(result);
#pragma unroll
            for (int half = 0; half < 2; half++)
              exchange.share(n, first_row(group) + half * kMmaRows, running, result[half]);
          });
        });
        exchange.announce(n);
        // The rest only now, while others wait for the shares; what is loaded has a whole step to come.
        // Which steps come is asked anew: no register holds it through the products.
        const int64_t k = count - 1 - i;
        const typename Tile::Prefetched before = tile.prefetch(k - 1), two_before = tile.prefetch(k - 2),
                                   three_before = tile.prefetch(k - 3);
        if (runs) layer.store_gates(now.row, 0, mine.lane(), mine.there, grad);
        past = past_before, past_before = load(tile.step(two_before), tile.step(three_before));
        now = tile.step(before);
        ran = running;
      }
      before_all += count;
      if (count > 0) exchange.collect(before_all - 1, ran, mine, grad_h);

      if (!mine.any) return;
      mine.store_state(s.grad_h_0, from_acc<T>(grad_h));
      if (C::CELL == Cell::lstm) mine.store_state(s.grad_c_0, from_acc<T>(grad_c));
    });
  }
};

}  // namespace seqkernels::device
