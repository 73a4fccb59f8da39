// A step of a layer with layer norm.
#pragma once
#include "norm_step.cuh"

namespace seqkernels::device {

template <Cell CELL, class T>
class NormStepForwardKernel : NormedStep<CELL, T> {
  using Step = NormedStep<CELL, T>;
  using Step::G, Step::S, Step::hidden_, Step::gates_, Step::of_c_, Step::means_;

 public:
  static constexpr int threads = kNormThreads;
  using Parameters = NormStepForward;

  static DEVICE void run(const NormStepForward& p) {
    const Steps steps(p);
    const int d = block_y();
    const int64_t t = step_of(p.k, p.steps, d);
    if (block() < steps.size(t)) NormStepForwardKernel(p, {p, d, block(), steps.start(t) + block()}).run();
  }

 private:
  DEVICE NormStepForwardKernel(const NormStepForward& p, const NormRow& at)
      : Step(p, at),
        gates_h_(at.of_states<T>(p.gates_h, G * p.hidden)),
        h_(at.of_states<T>(p.h, p.hidden)),
        c_(at.of_states<T>(p.c, p.hidden)),
        factors_(at.of_states<T>(p.factors, p.hidden)),
        y_(at.of_rows<T>(p.y, p.hidden)),
        saved_(at.of_rows<T>(p.saved, S * p.hidden)),
        statistics_(at.of_rows<T>(p.statistics, p.norms.statistics_of_row)) {}

  DEVICE void run() {
    const auto moments =
        moments_of<G>(means_, hidden_, [&](int unit, int gate) { return sum_of(gate * hidden_ + unit); });
    if (statistics_ && thread() == 0) statistics_.store(0, moments.inverse);
    for_units(hidden_, [&](int unit) { run_cell(unit, moments); });
    if constexpr (kHasC<CELL>)
      if (of_c_) read_c();
  }

  // What is normalized.
  DEVICE T sum_of(int column) const {
    const T of_h = gates_h_.load(column);
    return this->p_.norms.of_sum ? of_h + this->gates_x_.load(column) : of_h;
  }

  // An LSTM whose c is normalized leaves c and o where its products were.
  DEVICE void run_cell(int unit, const Moments<T>& moments) const {
    T x[G], recurrent[G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const int column = gate * hidden_ + unit;
      const T normalized = moments.of(sum_of(column));
      if (saved_) saved_.store(column, normalized);
      recurrent[gate] = gates_.of(column, normalized);
      x[gate] = this->x_apart(column);
    }
    const auto masked = this->masked(unit);
    NormedUnit<CELL, T> u(masked, x, recurrent, h_.load(unit), kHasC<CELL> ? c_.load(unit) : 0);
    if constexpr (kHasC<CELL>) {
      if (of_c_) gates_h_.store(unit, u.c), gates_h_.store(hidden_ + unit, u.blocks[3]);
      masked.zone_c(0, u.c_before, u.c);
      c_.store(unit, u.c);
      if (saved_) saved_.store(G * hidden_ + unit, u.c);
    }
    if (!of_c_) put_h(unit, u.h_before, u.h);
  }

  DEVICE void read_c() {
    const auto moments = moments_of<1>(means_, hidden_, [&](int unit, int) { return gates_h_.load(unit); });
    if (statistics_ && thread() == 0) statistics_.store(1, moments.mean), statistics_.store(2, moments.inverse);
    for_units(hidden_, [&](int unit) {
      const T read = tanh(of_c_.of(unit, moments.of(gates_h_.load(unit))));
      put_h(unit, h_.load(unit), gates_h_.load(hidden_ + unit) * read);
    });
  }

  DEVICE void put_h(int unit, T h_before, T h) const {
    const auto masked = this->masked(unit);
    masked.zone_h(0, h_before, h);
    h_.store(unit, h);
    y_.store(unit, h);
    if (factors_) factors_.store(unit, masked.in_products(0, h));
  }

  const Part<T> gates_h_, h_, c_, factors_, y_, saved_, statistics_;
};

}  // namespace seqkernels::device
