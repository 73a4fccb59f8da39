// The forward pass of a slice. The warps that have the same 16 units each multiply a part of the columns; the parts'
// sums meet in shared memory, where the threads that own the units add them up.
#pragma once
#include "rough.cuh"
#include "slice_rows.cuh"

namespace seqkernels::device {

template <class C, template <class> class Exchange_>
struct SliceForward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Exchange = Exchange_<C>;
  using Parameters = typename Exchange::template Parameters<ForwardArgs>;
  using Weights = SliceWeights<C, C::G>;
  static constexpr int G = C::G, UNITS = C::UNITS;
  static constexpr int PARTS = forward_parts(UNITS), all_sums = forward_sums(G, UNITS);
  static constexpr int sum_row = sums_stride(UNITS), part_sums = G * kMaxTile * sum_row;
  static_assert(PARTS * (UNITS / kMmaRows) == C::warps);
  // Behind the first row of sums, or behind all.
  static constexpr bool in_gaps = biases_in_gaps(C::CELL, UNITS, MathPolicy::math);
  static constexpr int first_bias = in_gaps ? UNITS : all_sums;
  using Biases = SharedBiases<C::CELL, T, UNITS, in_gaps ? sum_row * 4 : 16>;

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const int hidden = static_cast<int>(s.hidden), stride = s.stride;
    const auto states = [&](uint32_t n) { return factor_buffer<T>(n, stride); };  // that the n-th exchange follows
    const Shared<float> sums(s.exchange, all_sums);

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    const Weights weights = load_weights(s, exchange);
    const Biases biases(s, exchange.direction(), exchange.rank() * UNITS, C::threads, s.exchange + first_bias * 4);

    uint32_t n = 0;  // the next exchange
    exchange.each_tile(s, [&](const Tile& tile) {
      store_h_0(s, tile, hidden, stride);
      cluster_arrive();

      const OwnedUnits<C> mine(s, tile, exchange.rank());
      Pair<T> h = mine.load_state(s.h_0), x[G];
      float c[2];
      to_acc(mine.load_state(s.c_0), c);
      StepWindow<1> steps(s, tile, C::variant.backward);
      ForwardRows<C> rows(s, mine, exchange.direction(), steps.row());
      rows.load_gates(mine.present_of(steps.running()), x);
      cluster_wait();

      while (steps.running() > 0) {
        const int running = steps.running();
        const bool last = steps.running(1) == 0;
        // Multiply: one part of W h for 16 units; then the parts meet.
        multiply_all(weights, states(n), stride, running, sums);
        synchronize();
        if (mine.warp_runs(running)) {
          // Activate, for all sequences of the warp.
          const bool runs = mine.runs(running);
          float saved[2][kMaxBlocks];
          activate(sums, biases, mine, x, runs, h, c, saved);
          // Publish the new states first, once all lanes have read their sums: others may overwrite them after that.
          if (!last) exchange.publish(states(n + 1), stride, mine, MathPolicy::factors(h), runs, n);
          // Store y and what the backward pass needs.
          const int present = runs ? mine.present : 0;
          rows.store_y(present, h);
          rows.store_saved(present, saved, c);
        }
        // Load the gates of the next step, while states are on their way.
        rows.move_stores(steps.rows());
        rows.move_loads(steps.rows());
        steps.next();
        rows.load_gates(mine.present_of(steps.running()), x);
        if (last) break;
        // Wait for the states that the group has published.
        if (thread() == 0) exchange.expect(n, running);
        exchange.wait(n, running);
        n++;
      }

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

  // The step of two units of a sequence; h and c change in place, if the sequence runs.
  static DEVICE void activate(Shared<float> sums, const Biases& biases, const OwnedUnits<C>& mine,
                              const Pair<T> (&x)[G], bool runs, Pair<T>& h, float (&c)[2],
                              float (&saved)[2][kMaxBlocks]) {
    float x_i[2][G], of_h[2][G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      // Of gates that are only added up, the last part of W h alone is left to the cell.
      const bool apart = stays_apart<C::CELL>(gate);
      float of_x[2], b_x[2], b_h[2] = {};
      to_acc(x[gate], of_x);
      to_acc(biases.of_x(gate, mine.at), b_x);
      if (apart) to_acc(biases.of_h(gate, mine.at), b_h);
      of_x[0] += b_x[0], of_x[1] += b_x[1];
      float sum[2] = {apart ? b_h[0] : of_x[0], apart ? b_h[1] : of_x[1]};
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const Pair<float> of_part = sums.load_pair(place(part, gate, mine.sequence) + mine.at);
        if (!apart && part == PARTS - 1)
          of_h[0][gate] = first(of_part), of_h[1][gate] = second(of_part);
        else
          sum[0] += first(of_part), sum[1] += second(of_part);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        x_i[i][gate] = apart ? of_x[i] : sum[i];
        if (apart) of_h[i][gate] = sum[i];
      }
    }
    float h_new[2], c_new[2] = {c[0], c[1]};
    to_acc(h, h_new);
#pragma unroll
    for (int i = 0; i < 2; i++) forward_cell<C::CELL, T>(x_i[i], of_h[i], h_new[i], c_new[i], saved[i]);
    zero_absent(h_new, C::EVEN && mine.present ? 2 : mine.present);
    if (!runs) return;
    h = from_acc<T>(h_new), c[0] = c_new[0], c[1] = c_new[1];
  }
};

}  // namespace seqkernels::device
