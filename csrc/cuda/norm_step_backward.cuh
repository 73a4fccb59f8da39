// A step back through a layer with layer norm. What the forward pass has not saved is computed again.
#pragma once
#include "norm_step.cuh"

namespace seqkernels::device {

template <Cell CELL, class T>
class NormStepBackwardKernel : NormedStep<CELL, T> {
  using Step = NormedStep<CELL, T>;
  using Step::G, Step::S, Step::hidden_, Step::gates_, Step::of_c_, Step::means_;
  static constexpr int kApart = CellTraits<CELL>::apart;

 public:
  static constexpr int threads = kNormThreads;
  using Parameters = NormStepBackward;

  static DEVICE void run(const NormStepBackward& p) {
    const Steps steps(p);
    const int d = block_y();
    const int64_t t = step_of(p.k, p.steps, d), t_before = d == 0 ? t - 1 : t + 1;
    const bool runs = block() < steps.size(t), ran = block() < steps.size(t_before);
    const int64_t row_before = ran ? steps.start(t_before) + block() : -1;
    NormStepBackwardKernel(p, {p, d, block(), runs ? steps.start(t) + block() : 0}, row_before).run(runs);
  }

 private:
  DEVICE NormStepBackwardKernel(const NormStepBackward& p, const NormRow& at, int64_t row_before)
      : Step(p, at),
        h_before_(before(at.of_states<const T>(p.h_0, p.hidden), p.y, 1, 0, row_before)),
        c_before_(before(at.of_states<const T>(p.c_0, p.hidden), p.saved, S, G, row_before)),
        grad_y_(at.of_rows<const T>(p.grad_y, p.hidden)),
        saved_(at.of_rows<const T>(p.saved, S * p.hidden)),
        statistics_(at.of_rows<const T>(p.statistics, p.norms.statistics_of_row)),
        grad_factors_(at.of_states<const T>(p.grad_factors, p.hidden)),
        grad_h_(at.of_states<T>(p.grad_h, p.hidden)),
        grad_c_(at.of_states<T>(p.grad_c, p.hidden)),
        grad_step_(at.of_states<T>(p.grad_step, G * p.hidden)),
        grad_gates_x_(at.of_rows<T>(p.grad_gates_x, G * p.hidden)),
        grad_sums_(at.of_rows<T>(p.grad_sums, G * p.hidden)),
        factors_(at.of_rows<T>(p.factors, p.hidden)),
        grad_scale_(at.of_states<T>(p.grad_scale, G * p.hidden)),
        grad_shift_(at.of_states<T>(p.grad_shift, G * p.hidden)),
        grad_scale_c_(at.of_states<T>(p.grad_scale_c, p.hidden)),
        grad_shift_c_(at.of_states<T>(p.grad_shift_c, p.hidden)) {}

  // The initial state, or, where the sequence ran in the step before, block `block` of what that left.
  DEVICE Part<const T> before(Part<const T> initial, const void* left, int blocks, int block, int64_t row) const {
    if (row < 0) return initial;
    const NormRow at{this->p_, this->at_.direction, this->at_.sequence, row};
    Part<const T> part = at.template of_rows<const T>(left, blocks * this->p_.hidden);
    part.begin += block * hidden_;
    return part;
  }

  DEVICE void run(bool runs) {
    if (grad_factors_) for_units(hidden_, [&](int unit) { add_factors(unit); });
    if (!runs) return for_units(hidden_, [&](int unit) { store_zeros(unit); });
    T of_c[2] = {}, of_gates[2] = {};  // means
    if constexpr (kHasC<CELL>)
      if (of_c_) {
        for_units(hidden_, [&](int unit) { run_c(unit, of_c); });
        means_(of_c, hidden_);
      }
    for_units(hidden_, [&](int unit) { run_cell(unit, of_c, of_gates); });
    means_(of_gates, G * hidden_);
    for_units(hidden_, [&](int unit) { normalize(unit, of_gates); });
  }

  // What the last product gave, which the next one overwrites; also where a sequence does not run now.
  DEVICE void add_factors(int unit) const {
    grad_h_.store(unit, grad_h_.load(unit) + this->masked(unit).in_products(0, grad_factors_.load(unit)));
  }

  DEVICE void store_zeros(int unit) const {
#pragma unroll
    for (int gate = 0; gate < G; gate++) grad_step_.store(gate * hidden_ + unit, 0);
  }

  DEVICE NormedUnit<CELL, T> computed(int unit) const {
    T x[G], recurrent[G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const int column = gate * hidden_ + unit;
      recurrent[gate] = gates_.of(column, saved_.load(column));
      x[gate] = this->x_apart(column);
    }
    return {this->masked(unit), x, recurrent, h_before_.load(unit), kHasC<CELL> ? c_before_.load(unit) : 0};
  }

  DEVICE StateGradients<CELL, T> gradients_of(int unit) const {
    const T grad_y = grad_y_ ? grad_y_.load(unit) : 0;
    return {this->masked(unit), grad_h_.load(unit) + grad_y, kHasC<CELL> ? grad_c_.load(unit) : 0};
  }

  DEVICE ReadC<T> read(int unit, const NormedUnit<CELL, T>& u, T grad_h) const {
    const T normalized = Moments<T>{statistics_.load(1), statistics_.load(2)}.of(u.c);
    return read_c(u, normalized, of_c_.of(unit, normalized), grad_h);
  }

  // Adds to the sums for the means of the gradient of c's norm.
  DEVICE void run_c(int unit, T (&sums)[2]) const {
    const ReadC<T> found = read(unit, computed(unit), gradients_of(unit).h);
    const T grad = found.grad * of_c_.scale.load(unit);
    sums[0] += grad, sums[1] += grad * found.normalized;
    add(grad_scale_c_, unit, found.grad * found.normalized);
    add(grad_shift_c_, unit, found.grad);
  }

  // Leaves the gradients of a unit's gates in grad_step, and adds to the sums for the means of their norm's.
  DEVICE void run_cell(int unit, const T (&of_c)[2], T (&sums)[2]) const {
    const auto masked = this->masked(unit);
    const NormedUnit<CELL, T> u = computed(unit);
    StateGradients<CELL, T> of = gradients_of(unit);
    T grad[kMaxBlocks] = {};
    if (of_c_) {
      const ReadC<T> found = read(unit, u, of.h);
      const T scaled = found.grad * of_c_.scale.load(unit);
      of.run(masked, u, &found, normalized_backward(scaled, found.normalized, of_c, statistics_.load(2)), grad);
    } else {
      of.run(masked, u, nullptr, 0, grad);
    }
    grad_h_.store(unit, of.h);
    if constexpr (kHasC<CELL>) grad_c_.store(unit, of.c);
    factors_.store(unit, masked.in_products(0, u.h_before));
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const int column = gate * hidden_ + unit;
      const T scaled = grad[gate] * gates_.scale.load(column);
      sums[0] += scaled, sums[1] += scaled * saved_.load(column);
      grad_step_.store(column, grad[gate]);
      if (grad_gates_x_) grad_gates_x_.store(column, grad[gate < G - kApart ? gate : gate + kApart]);
    }
  }

  DEVICE void normalize(int unit, const T (&means)[2]) const {
    const T inverse = statistics_.load(0);
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const int column = gate * hidden_ + unit;
      const T grad = grad_step_.load(column), normalized = saved_.load(column);
      const T of_sum = normalized_backward(grad * gates_.scale.load(column), normalized, means, inverse);
      grad_step_.store(column, of_sum);
      grad_sums_.store(column, of_sum);
      add(grad_scale_, column, grad * normalized);
      add(grad_shift_, column, grad);
    }
  }

  static DEVICE void add(const Part<T>& to, int i, T value) {
    if (to) to.store(i, to.load(i) + value);
  }

  const Part<const T> h_before_, c_before_, grad_y_, saved_, statistics_, grad_factors_;
  const Part<T> grad_h_, grad_c_, grad_step_, grad_gates_x_, grad_sums_, factors_;
  const Part<T> grad_scale_, grad_shift_, grad_scale_c_, grad_shift_c_;
};

}  // namespace seqkernels::device
