// The backward pass of a slice. A CTA multiplies the gradients of some gates by the weights' rows for their units, and
// gets partial gradients of states, which go to the CTAs that own these. The Exchange says whose gates and which
// states.
#pragma once
#include "slice_rows.cuh"

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
  static_assert(halves == 2);

  static DEVICE void run(const Parameters& s) {
    const Exchange exchange(s);
    const auto gradients = [&](uint32_t n) { return factor_buffer<T>(n, s.stride); };

    if (thread() == 0) arrivals(0).init(), arrivals(1).init();
    clear_buffers(s.stride);
    cluster_arrive();
    const Weights weights = load_weights(s, exchange);
    cluster_wait();

    uint32_t n = 0;  // the next exchange
    exchange.each_tile(s, [&](const Tile& tile) {
      const OwnedUnits<C> mine(s, tile, exchange.rank());
      float grad_h[2], grad_c[2];
      to_acc(mine.load_state(s.grad_h_n), grad_h);
      to_acc(mine.load_state(s.grad_c_n), grad_c);

      // A step's inputs are loaded two steps before it: they are what it begins with.
      StepWindow<3> steps(s, tile, C::variant.backward);
      BackwardRows<C> rows(s, mine, exchange.direction(), steps.row());
      const auto load = [&](int i) {
        return rows.load(mine.present_of(steps.running(i)), steps.rows(i), mine.runs(steps.running(i + 1)));
      };
      StepInputs<T> inputs = load(0);
      rows.move_loads(steps.rows(0));
      StepInputs<T> next_inputs = load(1);

      for (; steps.running() > 0; n++) {
        const int running = steps.running();
        const bool runs = mine.runs(running);
        if (thread() == 0) exchange.expect(n, running);
        // Gradients of the gates; publish them to all who multiply them.
        float grad[2][kMaxBlocks] = {};
        if (!C::EVEN) zero_absent(grad_h, mine.present);  // an even number has both or none, which stay zero
        if (mine.warp_runs(running)) {
          if (runs) backward_step<C::CELL>(inputs, true, grad_h, grad_c, grad);
          exchange.publish(gradients(n), s.stride, mine, grad, runs, n);
        }
        exchange.wait(n);
        // Multiply, for 32 states at a time, and send the partial gradients to their owners.
        multiply_and_send(weights, exchange, gradients(n), s.stride, running, n);
        // Store and load only now, after the partials that others wait for; the loads have a whole step to arrive.
        inputs = next_inputs;
        rows.move_loads(steps.rows(1));
        next_inputs = load(2);
        rows.store_gates(runs ? mine.present : 0, grad);
        rows.move_stores(steps.rows(0));
        steps.next();
        // Wait for the partial gradients of this thread's states, and add them up.
        exchange.reduce_partials(n, running, mine, grad_h);
      }

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

  // Computes partial gradients of 32 states at a time, and sends them to the CTAs that own these.
  static DEVICE void multiply_and_send(const Weights& weights, const Exchange& exchange, Shared<T> gradients,
                                       int stride, int sequences, uint32_t n) {
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
