// The backward pass of a slice. A CTA multiplies the gradients of some gates by the weights' rows for their units, and
// gets partial gradients of states, which go to the CTAs that own these. The Exchange says whose gates and which
// states.
#pragma once
#include "slice.cuh"

namespace seqkernels::device {

template <class C, template <class> class Exchange_>
struct SliceBackward : C {
  using T = typename C::T;
  using MathPolicy = typename C::MathPolicy;
  using Exchange = Exchange_<C>;
  using Parameters = typename Exchange::template Parameters<BackwardArgs>;
  static constexpr int G = C::G;
  static constexpr int set_units = backward_set_units(C::PATH, C::UNITS);
  static constexpr int k_blocks = backward_k_blocks(C::PATH, G, C::UNITS, MathPolicy::math);  // of a set
  static constexpr int halves = kBackwardRows / kMmaRows;                                     // of a warp's rows
  using Weights = SliceWeights<C, halves * k_blocks>;
  using Arrays = BackwardArrays<C::CELL, T, C::EVEN>;
  using Step = typename Tile::Step;
  static_assert(halves == 2);

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const Arrays arrays(s, exchange.direction());
    const auto gradients = [&](int64_t n) { return factor_buffer<T>(n, s.stride); };

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    clear_buffers(s.stride);
    cluster_arrive();
    const Weights weights = load_weights(s, exchange);
    cluster_wait();

    int64_t before_all = 0;  // exchanges, for other tiles
    exchange.each_tile(s, [&](const Tile& tile) {
      const OwnedUnits<C> mine(s, tile, exchange.rank());
      float grad_h[2], grad_c[2];
      to_acc(mine.load_state(s.grad_h_n), grad_h);
      to_acc(mine.load_state(s.grad_c_n), grad_c);

      const int64_t count = tile.count();
      Step now = tile.step(tile.prefetch(count - 1));
      const Step second = tile.step(tile.prefetch(count - 2)), third = tile.step(tile.prefetch(count - 3));
      StepInputs<T> inputs = load(arrays, tile, mine, now, second);
      StepInputs<T> inputs_before = load(arrays, tile, mine, second, third);

      int ran = 0;  // sequences, in the exchange before
      for (int64_t i = 0; i < count; i++) {
        const int64_t n = before_all + i;
        const int running = now.running;
        // Wait for the partial gradients of this thread's states, and add them up.
        if (thread() == 0) exchange.expect(n, running);
        if (i > 0) exchange.reduce_partials(n - 1, ran, mine, grad_h);
        // Gradients of the gates; publish them to all who multiply them.
        const bool runs = mine.any && mine.sequence < running;
        float grad[2][kMaxBlocks] = {};
        zero_absent(grad_h, mine.present);
        if (runs) arrays.step(inputs, grad_h, grad_c, grad);
        exchange.publish(gradients(n), s.stride, mine, grad, runs, n);
        exchange.wait(n);
        // Multiply, for 32 states at a time, and send the partial gradients to their owners.
        multiply_and_send(weights, exchange, gradients(n), s.stride, running, n);
        // Store and load only now, after the partials that others wait for; the loads have a whole step to arrive.
        // Which steps come is read again, so that it takes no register during the products.
        const int64_t k = count - 1 - i;
        const typename Tile::Prefetched before = tile.prefetch(k - 1), two_before = tile.prefetch(k - 2),
                                        three_before = tile.prefetch(k - 3);
        if (runs) arrays.store_gates(now.row, 0, mine.lane(), mine.present, grad);
        inputs = inputs_before;
        inputs_before = load(arrays, tile, mine, tile.step(two_before), tile.step(three_before));
        now = tile.step(before);
        ran = running;
      }
      before_all += count;
      if (count > 0) exchange.reduce_partials(before_all - 1, ran, mine, grad_h);

      if (!mine.any) return;
      mine.store_state(s.grad_h_0, from_acc<T>(grad_h));
      if (kHasC<C::CELL>) mine.store_state(s.grad_c_0, from_acc<T>(grad_c));
    });
  }

 private:
  static DEVICE void clear_buffers(int stride) {
    const Shared<T> even = factor_buffer<T>(0, stride), odd = factor_buffer<T>(1, stride);
    for (int i = thread(); i < kMaxTile * stride / 2; i += C::threads)
      even.store_pair(i * 2, Pair<T>{}), odd.store_pair(i * 2, Pair<T>{});
  }

  // The n-th group of a warp's fragments is for 32 states, from this one on, and for the gates of one set of units.
  static DEVICE int first_row(int group, int sets) {
    return (thread() / kWarpSize + group / sets * C::warps) * kBackwardRows;
  }

  static DEVICE Weights load_weights(const Parameters& s, const Exchange& exchange) {
    const int hidden = static_cast<int>(s.hidden), warp = thread() / kWarpSize, sets = exchange.sets();
    const Global<const T> w_hh(static_cast<const T*>(s.w_hh[exchange.direction()]), G * s.hidden * s.hidden);
    const int row_groups = (exchange.states() + kBackwardRows - 1) / kBackwardRows;
    return Weights(
        (row_groups - warp + C::warps - 1) / C::warps * sets, s.weights, s.bytes,
        [&](int group, int i, int row, int column) {
          const int of = i / halves * C::k_width + column, gate = of / set_units;
          const int own = exchange.first_of_set(group % sets) + of % set_units;
          const int state = first_row(group, sets) + i % halves * kMmaRows + row;
          const int count = state < exchange.states() && gate < G ? two_of(hidden - own) : 0;
          const int at = (gate * hidden + own) * hidden + exchange.first_state() + state;
          const T zero = from_acc<T>(0);
          return MathPolicy::factors(pair(count > 0 ? w_hh.load(at) : zero, count > 1 ? w_hh.load(at + hidden) : zero));
        });
  }

  // What a thread reads of a step and of the step before.
  static DEVICE StepInputs<T> load(const Arrays& arrays, const Tile& tile, const OwnedUnits<C>& mine, const Step& step,
                                   const Step& before) {
    StepInputs<T> read = {};
    if (mine.any && mine.sequence < step.running && mine.present)
      arrays.load(step.row, before.row, mine.sequence < before.running, tile.first(), 0, mine.lane(), mine.present,
                  read);
    return read;
  }

  // Computes partial gradients of 32 states at a time, and sends them to the CTAs that own these.
  static DEVICE void multiply_and_send(const Weights& weights, const Exchange& exchange, Shared<T> gradients,
                                       int stride, int sequences, int64_t n) {
    const int sets = exchange.sets();
    for_sequences<MathPolicy>(sequences, [&](auto policy) {
      using HalfAccumulators = Accumulators<decltype(policy), halves>;
      const float zero[halves][kElements] = {};
      HalfAccumulators accumulators(zero);
      weights.each([&](int group, auto of) {
        const int set = group % sets;
        if (set == 0) accumulators = HalfAccumulators(zero);
#pragma unroll
        for (int k_block = 0; k_block < k_blocks; k_block++)
          accumulators.add([&](int half) { return of(k_block * halves + half); }, gradients, stride,
                           (set * k_blocks + k_block) * C::k_width);
        if (set + 1 < sets) return;
        float result[halves][kElements] = {};
        accumulators.finish(result);
#pragma unroll
        for (int half = 0; half < halves; half++)
          exchange.send_partials(n, first_row(group, sets) + half * kMmaRows, sequences, result[half]);
      });
    });
  }
};

}  // namespace seqkernels::device
