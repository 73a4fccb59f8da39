// The forward pass of a slice. The warps that have the same 16 units each multiply a part of the columns; the parts'
// sums meet in shared memory, where the threads that own the units add them up.
#pragma once
#include "slice.cuh"

namespace seqkernels::device {

template <class C, template <class> class Exchange_>
struct SliceForward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Exchange = Exchange_<C>;
  using Parameters = typename Exchange::template Parameters<ForwardArgs>;
  using Weights = SliceWeights<C, C::G>;
  using Arrays = ForwardArrays<C::CELL, T, C::EVEN>;
  static constexpr int G = C::G, UNITS = C::UNITS;
  static constexpr int PARTS = forward_parts(UNITS), all_sums = forward_sums(G, UNITS);
  static constexpr int sum_row = sums_stride(UNITS), part_sums = G * kMaxTile * sum_row;
  static_assert(PARTS * (UNITS / kMmaRows) == C::warps);

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const int hidden = static_cast<int>(s.hidden), stride = s.stride;
    const Arrays arrays(s, exchange.direction());
    const auto states = [&](int64_t n) { return factor_buffer<T>(n, stride); };  // that the n-th exchange follows
    const Shared<float> sums(s.exchange, all_sums);

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    const Weights weights = load_weights(s, exchange);

    int64_t before = 0;  // exchanges, for other tiles
    exchange.each_tile(s, [&](const Tile& tile) {
      store_h_0(s, tile, hidden, stride);
      cluster_arrive();

      const OwnedUnits<C> mine(s, tile, exchange.rank());
      Pair<T> h = mine.load_state(s.h_0), x[G];
      float c[2], b_apart[2];
      to_acc(mine.load_state(s.c_0), c);
      arrays.load_b_apart(mine.unit, mine.present, b_apart);
      typename Tile::Step now = tile.step(tile.prefetch(0));
      typename Tile::Prefetched next = tile.prefetch(1);
      load(arrays, mine, now, x);
      cluster_wait();

      int ran = 0;  // sequences, in the step before
      for (int64_t k = 0; k < tile.count(); k++) {
        const int64_t n = before + k;
        const bool last = k + 1 == tile.count();
        // Wait for the states that the group has published.
        if (thread() == 0 && !last) exchange.expect(n, now.running);
        if (k > 0) exchange.wait(n - 1, ran);
        // Multiply: one part of W h for 16 units; then the parts meet.
        multiply_all(weights, states(n), stride, now.running, sums);
        synchronize();
        if (mine.any) {
          // Activate.
          const bool runs = mine.sequence < now.running;
          float saved[2][kMaxBlocks];
          if (runs) activate(sums, mine, x, b_apart, h, c, saved);
          // Publish the new states first, once all lanes have read their sums: others may overwrite them after that.
          if (!last) exchange.publish(states(n + 1), stride, mine, MathPolicy::factors(h), runs, n);
          // Store y and what the backward pass needs.
          if (runs) {
            arrays.store_y(now.row, 0, mine.lane(), mine.present, h);
            arrays.store_saved(now.row, 0, mine.lane(), mine.present, saved, c);
          }
        }
        // Load the gates of the next step.
        ran = now.running;
        now = tile.step(next), next = tile.prefetch(k + 2);
        load(arrays, mine, now, x);
      }
      if (tile.count() > 0) before += tile.count() - 1;

      if (!mine.any) return;
      mine.store_state(s.h_n, h);
      if (kHasC<C::CELL>) mine.store_state(s.c_n, from_acc<T>(c));
    });
  }

 private:
  // What a warp multiplies: a part of the columns, for 16 units of the slice.
  static DEVICE int part_of_warp() { return thread() / kWarpSize % PARTS; }
  static DEVICE int first_row_of_warp() { return thread() / kWarpSize / PARTS * kMmaRows; }

  static DEVICE Weights load_weights(const Parameters& s, const Exchange& exchange) {
    const int part = part_of_warp(), first_row = first_row_of_warp();
    const int hidden = static_cast<int>(s.hidden), k_blocks = (hidden + C::k_width - 1) / C::k_width;
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[exchange.direction()]), G * s.hidden * s.hidden);
    return Weights(
        (k_blocks - part + PARTS - 1) / PARTS, s.weights, s.bytes, [&](int group, int gate, int row, int column) {
          const int unit = exchange.rank() * UNITS + first_row + row, of = (part + group * PARTS) * C::k_width + column;
          const int at = (gate * hidden + unit) * hidden + of;  // of at most 4 matrices of 2112 by 2112
          return MathPolicy::factors(load_units<C::EVEN>(w_hh, at, unit < hidden ? two_of(hidden - of) : 0));
        });
  }

  // The initial states, into both buffers: a sequence that begins later, backwards in time, finds them in either.
  static DEVICE void store_h_0(const Parameters& s, const Tile& tile, int hidden, int stride) {
    const Global<const T> h_0(static_cast<const T*>(s.h_0), s.directions * s.sequences * s.hidden);
    for (int i = thread(); i < kMaxTile * stride / 2; i += C::threads) {
      const int sequence = i * 2 / stride, unit = i * 2 % stride;
      const int count = sequence < tile.sequences() ? two_of(hidden - unit) : 0;
      const int64_t row = tile.direction() * s.sequences + tile.first() + sequence;
      const Pair<T> h = MathPolicy::factors(load_units<false>(h_0, row * hidden + unit, count));
      factor_buffer<T>(0, stride).store_pair(sequence * stride + unit, h);
      factor_buffer<T>(1, stride).store_pair(sequence * stride + unit, h);
    }
  }

  // Where the sums of a part are.
  static DEVICE int place(int part, int gate, int sequence) {
    return part * part_sums + (gate * kMaxTile + sequence) * sum_row;
  }

  // The gates of x of a step.
  static DEVICE void load(const Arrays& arrays, const OwnedUnits<C>& mine, const typename Tile::Step& step,
                          Pair<T> (&x)[G]) {
    if (mine.any) arrays.load_gates(step.row, 0, mine.lane(), mine.sequence < step.running ? mine.present : 0, x);
  }

  // A warp's part of W h for the first `sequences` sequences, into `sums`.
  static DEVICE void multiply_all(const Weights& weights, Shared<T> h, int stride, int sequences, Shared<float> sums) {
    const int part = part_of_warp(), first_row = first_row_of_warp();
    float result[G][kElements] = {};
    for_sequences<MathPolicy>(sequences, [&](auto policy) {
      Accumulators<decltype(policy), G> accumulators(result);
      weights.each([&](int group, auto of) { accumulators.add(of, h, stride, (part + group * PARTS) * C::k_width); });
      accumulators.finish(result);
    });
#pragma unroll
    for (int gate = 0; gate < G; gate++)
#pragma unroll
      for (int s_ = 0; s_ < 2; s_++)
        sums.store_pair(place(part, gate, sequence_of_lane() + s_) + first_row + unit_of_lane(),
                        pair(result[gate][s_], result[gate][2 + s_]));
  }

  // The step of two units of a sequence; h and c change in place.
  static DEVICE void activate(Shared<float> sums, const OwnedUnits<C>& mine, const Pair<T> (&x)[G],
                              const float (&b_apart)[2], Pair<T>& h, float (&c)[2], float (&saved)[2][kMaxBlocks]) {
    float h_new[2];
    to_acc(h, h_new);
    float x_i[2][G] = {}, of_h[2][G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const bool apart = stays_apart<C::CELL>(gate);
      float of_x[2];
      to_acc(x[gate], of_x);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        of_h[i][gate] = apart ? b_apart[i] : of_x[i];
        if (apart) x_i[i][gate] = of_x[i];
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const Pair<float> sum = sums.load_pair(place(part, gate, mine.sequence) + mine.at);
        of_h[0][gate] += first(sum), of_h[1][gate] += second(sum);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) cell_forward<C::CELL>(x_i[i], of_h[i], h_new[i], c[i], saved[i]);
    zero_absent(h_new, mine.present);
    h = from_acc<T>(h_new);
  }
};

}  // namespace seqkernels::device
