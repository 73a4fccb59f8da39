// A sweep in one launch by clusters of blocks (compute capability 9.0): a cluster takes up to 8 sequences through all
// their steps, each of its blocks a slice of the hidden units, with the recurrent weights of all gates of these in its
// registers and shared memory. Clusters know nothing of each other; both directions run side by side (the second index
// of a block). Within a cluster blocks push what their peers need of a step into their shared memory, where an mbarrier
// counts the bytes. There are two buffers, so that one exchange a step is enough: nobody pushes to a buffer before all
// have read it, since each pushes a step only after it has got all of the step before, which its peers push after
// reading.
//
// Forward, the new states go to all peers: a step brings a block B H numbers of the layer's dtype, for B sequences.
// Backward there is a choice. If the gradients of the gates went to all peers, a step would bring G B H numbers of the
// dtype to a block, which has the weights' columns for its units. Instead a block multiplies its own gates' gradients
// by the weights' rows for its units, and what comes out, a share of the gradients of all states, goes to the blocks
// that own these: B H numbers of float32. The matrix cores and the memory for weights are as busy either way; what
// travels is G / 2 times less in 16 bits and G times less in float32: for B = 8, a GRU or an LSTM
//   H = 256:  8 KB a step, instead of 12 or 16 in 16 bits and 24 or 32 in float32
//   H = 512: 16 KB                    24 or 32                 48 or 64
//   H = 768: 24 KB                    36 or 48                 72 or 96
// at some 20 bytes a clock: at H = 512 about 800 clocks instead of 1200 or 1600, and 2400 or 3200. (An RNN, G = 1,
// would do better with the gradients in 16 bits, but has the least to send.) The owner adds up the shares in the order
// of the ranks, so that all runs give the same bits.
#pragma once
#include "layer.h"
#include "product.h"
#include "single_block.h"

namespace seqkernels::device {

// How a block is made: of UNITS hidden units (a multiple of 16) and so many WARPS. A thread holds HELD fragments of the
// weights in registers. EVEN: the layer has an even number of units.
template <Cell CELL_, class Product_, int UNITS_, int WARPS, int HELD_, bool EVEN_>
struct Slice {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr Cell CELL = CELL_;
  static constexpr int G = gates_of(CELL), UNITS = UNITS_, HELD = HELD_;
  static constexpr bool EVEN = EVEN_;
  static constexpr int warps = WARPS, threads = warps * 32;
  static constexpr int chunk = Factors<T>::chunk;
  static_assert(UNITS % kUnits == 0 && UNITS / 2 * kSequences <= threads);
};

// A sweep, and how the memory of a block is laid out for it (byte offsets; the kernels' `of` says what for).
template <class Pass>
struct Clustered : Pass {
  int tile;    // sequences that a cluster takes: 1 to 8
  int stride;  // of a row of states: factors
  int exchanged, weights, bytes;
};

constexpr int ceiling(int64_t n, int divisor) { return static_cast<int>((n + divisor - 1) / divisor); }

// The fragments of a thread, in `count` groups of N: the first HELD fragments in registers, the others in shared memory
// from byte `begin` on, to `end`.
template <class T, int N, int HELD, int THREADS>
class Stationary {
 public:
  static constexpr int held_groups = ceiling(HELD, N);  // of which some fragments are in registers

  static constexpr int bytes(int count) {
    const int others = count * N - HELD;
    return others > 0 ? others * THREADS * static_cast<int>(sizeof(Fragment)) : 0;
  }

  // at(group, i, row of 16, column of a chunk) are two elements of fragment i of a group: of the column and the next.
  template <class At>
  DEVICE Stationary(int count, int begin, int end, At at) : others_(begin, (end - begin) / 4), count_(count) {
#pragma unroll
    for (int i = 0; i < HELD; i++) held_[i] = i / N < count ? read(i, at) : Fragment{};
#pragma unroll 1
    for (int i = HELD; i < count * N; i++) {
      const Fragment fragment = read(i, at);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t* word = fragment.word + half * 4;
        others_.store_words(place(i, half), {{word[0], word[1], word[2], word[3]}});
      }
    }
  }

  // use(group, of) for all groups: of(i) is a fragment.
  template <class Use>
  DEVICE void each(Use use) const {
#pragma unroll
    for (int group = 0; group < held_groups; group++)
      if (group < count_)
        use(group, [&](int i) { return group * N + i < HELD ? held_[group * N + i] : other(group * N + i); });
#pragma unroll 1
    for (int group = held_groups; group < count_; group++) use(group, [&](int i) { return other(group * N + i); });
  }

 private:
  static DEVICE int place(int i, int half) { return (((i - HELD) * 2 + half) * THREADS + thread()) * 4; }

  template <class At>
  static DEVICE Fragment read(int i, At at) {
    Fragment fragment;
#pragma unroll
    for (int word = 0; word < 8; word++) {
      if (sizeof(T) == 4 && word % 4 >= 2) continue;  // it came with the word two before
      const Pair<T> columns = at(i / N, i % N, row_of_word(lane(), word), column_of_word<T>(lane(), word));
      if constexpr (sizeof(T) == 2)
        fragment.word[word] = bits(columns);
      else
        fragment.word[word] = bits(first(columns)), fragment.word[word + 2] = bits(second(columns));
    }
    return fragment;
  }

  DEVICE Fragment other(int i) const {
    return fragment_of(others_.load_words(place(i, 0)), others_.load_words(place(i, 1)));
  }

  Fragment held_[HELD];
  Shared<uint32_t> others_;
  int count_;
};

DEVICE void words_of(Pair<float> pair, uint32_t (&words)[4]) {
  words[0] = bits(first(pair)), words[1] = bits(second(pair));
}
template <class T>
DEVICE void words_of(Pair<T> pair, uint32_t (&words)[4]) {
  words[0] = bits(pair);
}

// 16 bytes of a row, of which 4 lanes side by side (2 of float32) have two numbers each.
template <class T>
DEVICE Words gather(Pair<T> mine) {
  Words all;
  words_of(mine, all.word);
#pragma unroll
  for (int count = sizeof(mine) / 4, mask = 1; count < 4; count *= 2, mask *= 2) {
    const bool upper = lane() & mask;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i >= count) continue;
      const uint32_t own = all.word[i], other = bits(exchange(from_bits(own), mask));
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

  DEVICE Own(const Sweep& s, const Tile& tile, int rank)
      : any(thread() < pairs * kSequences),
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

  const Sweep& sweep_;
  const Tile& tile_;
};

// The arrivals of the n-th exchange: two mbarriers, at the begin of shared memory, take turns.
DEVICE Mbarrier arrivals(int64_t n) { return Mbarrier(static_cast<int>(n % 2) * 8); }
DEVICE int phase(int64_t n) { return static_cast<int>(n / 2 % 2); }

// What the threads of a cluster do before its steps: `prepare` the block's memory so that peers may push to it, and
// `load` what is for the block alone.
template <class Prepare, class Load>
DEVICE auto begin_cluster(Prepare prepare, Load load) {
  if (thread() == 0) arrivals(0).init(), arrivals(1).init();
  prepare();
  cluster_arrive();
  auto loaded = load();
  cluster_wait();
  return loaded;
}

template <class C>
struct ClusterForward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Parameters = Clustered<ForwardSweep>;
  static constexpr int G = C::G, UNITS = C::UNITS, size = sizeof(T);
  static constexpr int PARTS = C::warps / (UNITS / kUnits);  // warps that share the columns of 16 units
  static_assert(C::warps % (UNITS / kUnits) == 0);
  using Held = Stationary<T, G, C::HELD, C::threads>;

  // Of a part the sums of all gates and sequences; rows so far apart that 16 lanes store two each to different banks.
  static constexpr int sums_stride = UNITS + 4, part_sums = G * kSequences * sums_stride,
                       all_sums = PARTS * part_sums - 4;

  static Parameters of(const ForwardSweep& s, int tile) {
    const int chunks = ceiling(ceiling(s.hidden, UNITS) * UNITS, C::chunk);
    const int stride = Factors<T>::stride(chunks * C::chunk), exchanged = 16 + 2 * kSequences * stride * size;
    const int weights = exchanged + all_sums * 4;
    return {s, tile, stride, exchanged, weights, weights + Held::bytes(ceiling(ceiling(s.hidden, C::chunk), PARTS))};
  }

  static DEVICE void run(const Parameters& s) {
    const int rank = cluster_rank(), blocks = cluster_size(), hidden = static_cast<int>(s.hidden), stride = s.stride;
    const Tile tile(s, s.tile, block() / blocks);
    const Own<C> mine(s, tile, rank);
    const ForwardLayer<C::CELL, T, C::EVEN> layer(s, tile.direction());
    const auto states = [&](int64_t k) {
      return Shared<T>(16 + static_cast<int>(k % 2) * kSequences * stride * size, kSequences * stride);
    };
    const Shared<float> sums(s.exchanged, all_sums);

    const int warp = thread() / 32, part = warp % PARTS, first_row = warp / PARTS * kUnits;
    const int chunks = (hidden + C::chunk - 1) / C::chunk;
    // A sequence that begins later, backwards in time, finds its initial state in either buffer.
    const auto prepare = [&] {
      const Global<const T> h_0(static_cast<const T*>(s.h_0), s.directions * s.sequences * s.hidden);
      for (int i = thread(); i < kSequences * stride / 2; i += C::threads) {
        const int sequence = i * 2 / stride, unit = i * 2 % stride;
        const int there = sequence < tile.sequences() ? two_of(hidden - unit) : 0;
        const int64_t row = tile.direction() * s.sequences + tile.first() + sequence;
        const Pair<T> h = Product::factors(load_units<false>(h_0, row * hidden + unit, there));
        states(0).store_pair(sequence * stride + unit, h);
        states(1).store_pair(sequence * stride + unit, h);
      }
    };
    const Held weights = begin_cluster(prepare, [&] {
      const Global<const T> w_hh(static_cast<const T*>(s.w_hh[tile.direction()]), G * s.hidden * s.hidden);
      return Held((chunks - part + PARTS - 1) / PARTS, s.weights, s.bytes,
                  [&](int group, int gate, int row, int column) {
                    const int unit = rank * UNITS + first_row + row, of = (part + group * PARTS) * C::chunk + column;
                    const int at = (gate * hidden + unit) * hidden + of;  // of at most 4 matrices of 1024 by 1024
                    return Product::factors(load_units<C::EVEN>(w_hh, at, unit < hidden ? two_of(hidden - of) : 0));
                  });
    });

    Pair<T> h = mine.load_state(s.h_0), x[G];
    float c[2], b_hn[2];
    widen(mine.load_state(s.c_0), c);
    layer.load_b_hn(mine.unit, mine.there, b_hn);
    typename Tile::Step now = tile.step(0), next = tile.step(1);
    const auto load = [&](const typename Tile::Step& step) {
      if (mine.any) layer.load_gates(step.row, 0, mine.lane(), mine.sequence < step.running ? mine.there : 0, x);
    };
    load(now);

    for (int64_t k = 0; k < tile.count(); k++) {
      const bool last = k + 1 == tile.count();
      if (thread() == 0 && !last) arrivals(k).expect(now.running * blocks * UNITS * size);
      if (k > 0) arrivals(k - 1).wait(phase(k - 1));
      float result[G][kElements];
      multiply_all(weights, states(k), stride, part, result);
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
          widen(h, h_new);
          step(sums, mine, x, b_hn, h_new, c, saved);
          h = narrow<T>(h_new);
        }
        if (!last) {
          const Words words = gather(Product::factors(h));
          synchronize_warp();  // all have read their sums, before a push lets others overwrite them
          if (runs) push(states(k + 1), mine, stride, rank, blocks, words, arrivals(k));
        }
        if (runs) {
          layer.store_y(now.row, 0, mine.lane(), mine.there, h);
          layer.store_saved(now.row, 0, mine.lane(), mine.there, saved, c);
        }
      }
      load(next);
      now = next, next = tile.step(k + 2);  // asked for a step before it is used
    }

    if (!mine.any) return;
    mine.store_state(s.h_n, h);
    if (C::CELL == Cell::lstm) mine.store_state(s.c_n, narrow<T>(c));
  }

 private:
  static DEVICE int place(int part, int gate, int sequence) {
    return part * part_sums + (gate * kSequences + sequence) * sums_stride;
  }

  // One part of W h for the 16 units of a warp.
  static DEVICE void multiply_all(const Held& weights, Shared<T> h, int stride, int part,
                                  float (&result)[G][kElements]) {
    float sum[G][Product::sums];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
#pragma unroll
      for (int e = 0; e < kElements; e++) result[gate][e] = 0;
      Product::begin(result[gate], sum[gate]);
    }
    weights.each(
        [&](int group, auto of) { Product::template add<G>(sum, of, h, stride, (part + group * PARTS) * C::chunk); });
#pragma unroll
    for (int gate = 0; gate < G; gate++) Product::finish(sum[gate], result[gate]);
  }

  // The step of two units of a sequence; h and c change in place.
  static DEVICE void step(Shared<float> sums, const Own<C>& mine, const Pair<T> (&x)[G], const float (&b_hn)[2],
                          float (&h)[2], float (&c)[2], float (&saved)[2][4]) {
    float x_i[2][G] = {}, of_h[2][G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const bool apart = C::CELL == Cell::gru && gate == G - 1;  // GRU's n has its sums apart
      float of_x[2];
      widen(x[gate], of_x);
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

  // The lanes that have the same 16 bytes share the peers, and begin with different ones.
  static DEVICE void push(Shared<T> states, const Own<C>& mine, int stride, int rank, int blocks, Words words,
                          Mbarrier arrivals) {
    constexpr int lanes = 8 / size;
    const int at = mine.sequence * stride + rank * UNITS + mine.at / (2 * lanes) * (2 * lanes);
#pragma unroll 1
    for (int i = lane() % lanes; i < blocks; i += lanes) {
      const int peer = rank + i < blocks ? rank + i : rank + i - blocks;
      states.push_words(at, words, peer, arrivals);
    }
  }
};

template <class C>
struct ClusterBackward : C {
  using T = typename C::T;
  using Product = typename C::Product;
  using Parameters = Clustered<BackwardSweep>;
  static constexpr int G = C::G, UNITS = C::UNITS, size = sizeof(T);
  static constexpr int chunks = ceiling(G * UNITS, C::chunk), stride = Factors<T>::stride(chunks * C::chunk);
  static constexpr int rows = 2 * kUnits;  // that a warp multiplies at once, so that it reads factors half as often
  using Held = Stationary<T, 2 * chunks, C::HELD, C::threads>;

  static Parameters of(const BackwardSweep& s, int tile) {
    const int blocks = ceiling(s.hidden, UNITS);
    const int exchanged = 16 + 2 * kSequences * stride * size,
              weights = exchanged + 2 * blocks * kSequences * UNITS * 4;
    return {s, tile, stride, exchanged, weights, weights + Held::bytes(ceiling(ceiling(s.hidden, rows), C::warps))};
  }

  static DEVICE void run(const Parameters& s) {
    const int rank = cluster_rank(), blocks = cluster_size(), hidden = static_cast<int>(s.hidden);
    const Tile tile(s, s.tile, block() / blocks);
    const Own<C> mine(s, tile, rank);
    const BackwardLayer<C::CELL, T, C::EVEN> layer(s, tile.direction());
    const auto gradients = [&](int64_t k) {
      return Shared<T>(16 + static_cast<int>(k % 2) * kSequences * stride * size, kSequences * stride);
    };
    // [rank, sequence, unit] of the n-th exchange.
    const int shares_size = blocks * kSequences * UNITS;
    const auto shares = [&](int64_t n) {
      return Shared<float>(s.exchanged + static_cast<int>(n % 2) * shares_size * 4, shares_size);
    };

    const int warp = thread() / 32, row_groups = (hidden + rows - 1) / rows;
    const auto prepare = [&] {
      for (int i = thread(); i < kSequences * stride / 2; i += C::threads)
        gradients(0).store_pair(i * 2, Pair<T>{}), gradients(1).store_pair(i * 2, Pair<T>{});
    };
    const Held weights = begin_cluster(prepare, [&] {
      const Global<const T> w_hh(static_cast<const T*>(s.w_hh[tile.direction()]), G * s.hidden * s.hidden);
      const int count = (row_groups - warp + C::warps - 1) / C::warps;
      return Held(count, s.weights, s.bytes, [&](int group, int i, int row, int column) {
        const int unit = (warp + group * C::warps) * rows + i % 2 * kUnits + row, of = i / 2 * C::chunk + column;
        const int gate = of / UNITS, own = rank * UNITS + of % UNITS;
        const int there = unit < hidden && gate < G ? two_of(hidden - own) : 0;
        const int at = (gate * hidden + own) * hidden + unit;
        const T zero = Narrow<T>::of(0);
        return Product::factors(pair(there > 0 ? w_hh.load(at) : zero, there > 1 ? w_hh.load(at + hidden) : zero));
      });
    });

    // The peers push for whole 16 units.
    const int left = (hidden + kUnits - 1) / kUnits * kUnits - rank * UNITS;
    const int bytes_of_sequence = (left < 0 ? 0 : left < UNITS ? left : UNITS) * blocks * 4;
    float grad_h[2], grad_c[2];
    widen(mine.load_state(s.grad_h_n), grad_h);
    widen(mine.load_state(s.grad_c_n), grad_c);
    const auto collect = [&](int64_t n, int ran) {
      arrivals(n).wait(phase(n));
      if (!mine.any || mine.sequence >= ran || mine.there == 0) return;
      for (int of = 0; of < blocks; of++) {
        const Pair<float> share = shares(n).load_pair((of * kSequences + mine.sequence) * UNITS + mine.at);
        grad_h[0] += first(share), grad_h[1] += second(share);
      }
    };

    Past<T> past;
    const int64_t count = tile.count();
    typename Tile::Step now = tile.step(count - 1), before = tile.step(count - 2), earlier = tile.step(count - 3);
    const auto load = [&] {
      past = {};
      const bool runs = mine.any && mine.sequence < now.running;
      if (runs && mine.there)
        layer.load(now.row, before.row, mine.sequence < before.running, tile.first(), 0, mine.lane(), mine.there, past);
    };
    load();

    int ran = 0;  // sequences, in the exchange before
    for (int64_t n = 0; n < count; n++) {
      const int64_t k = count - 1 - n;
      const int running = now.running;
      if (thread() == 0) arrivals(n).expect(running * bytes_of_sequence);
      if (n > 0) collect(n - 1, ran);
      const bool runs = mine.any && mine.sequence < running;
      float grad[2][4] = {};
      if (runs) {
        layer.step(past, grad_h, grad_c, grad);
#pragma unroll
        for (int gate = 0; gate < G; gate++)
          gradients(n).store_pair(mine.sequence * stride + gate * UNITS + mine.at,
                                  Product::factors(grad[0][gate], grad[1][gate]));
      }
      synchronize();
      if (runs) layer.store_gates(now.row, 0, mine.lane(), mine.there, grad);
      now = before, before = earlier, earlier = tile.step(k - 3);
      load();  // while the matrix cores multiply
      weights.each([&](int group, auto of) {
        float result[2][kElements];
        multiply_all(of, gradients(n), result);
#pragma unroll
        for (int half = 0; half < 2; half++)
          push(shares(n), (warp + group * C::warps) * rows + half * kUnits, hidden, rank, running, result[half],
               arrivals(n));
      });
      ran = running;
    }
    if (count > 0) collect(count - 1, ran);

    if (!mine.any) return;
    mine.store_state(s.grad_h_0, narrow<T>(grad_h));
    if (C::CELL == Cell::lstm) mine.store_state(s.grad_c_0, narrow<T>(grad_c));
  }

 private:
  // This block's share of the gradients of 32 states.
  template <class Of>
  static DEVICE void multiply_all(Of of, Shared<T> gradients, float (&result)[2][kElements]) {
    float sum[2][Product::sums];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int e = 0; e < kElements; e++) result[half][e] = 0;
      Product::begin(result[half], sum[half]);
    }
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk++)
      Product::template add<2>(
          sum, [&](int half) { return of(chunk * 2 + half); }, gradients, stride, chunk * C::chunk);
#pragma unroll
    for (int half = 0; half < 2; half++) Product::finish(sum[half], result[half]);
  }

  // To the block that owns 16 units. Two lanes with the next units each put together 4 units, one of either sequence.
  static DEVICE void push(Shared<float> shares, int unit, int hidden, int rank, int running,
                          const float (&result)[kElements], Mbarrier arrivals) {
    const bool upper = lane() / 4 % 2;
    const float given[2] = {exchange(upper ? result[0] : result[1], 4), exchange(upper ? result[2] : result[3], 4)};
    const Words words = upper ? Words{{bits(given[0]), bits(given[1]), bits(result[1]), bits(result[3])}}
                              : Words{{bits(result[0]), bits(result[2]), bits(given[0]), bits(given[1])}};
    const int sequence = sequence_of_lane() + upper;
    if (unit >= hidden || sequence >= running) return;
    shares.push_words((rank * kSequences + sequence) * UNITS + unit % UNITS + lane() / 8 * 4, words, unit / UNITS,
                      arrivals);
  }
};

}  // namespace seqkernels::device
