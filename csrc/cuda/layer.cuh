// A layer as a kernel sees it: where its steps lie, and two hidden units of a sequence in one step.
#pragma once
#include "device.cuh"
//
#include "../cells.h"
#include "kernels.h"

namespace seqkernels::device {

// The k-th step that a direction takes, of those that a tile of sequences has.
DEVICE int64_t step_of(int64_t k, int64_t steps, int direction) { return direction == 0 ? k : steps - 1 - k; }

// Whether a gate keeps W_hh h + b_hh apart from W_ih x + b_ih.
template <Cell CELL>
DEVICE bool stays_apart(int gate) {
  return gate >= CellTraits<CELL>::gates - CellTraits<CELL>::apart;
}

template <Cell CELL>
constexpr bool kHasC = CellTraits<CELL>::states == 2;

// Blocks of what is saved, without c.
template <Cell CELL>
constexpr int kSavedGates = CellTraits<CELL>::saved_blocks - (kHasC<CELL> ? 1 : 0);

class Steps {
 public:
  DEVICE explicit Steps(const SweepArgs& s)
      : starts_(s.starts, s.steps), sizes_(s.sizes, s.steps), steps_(s.steps), sequences_(s.sequences) {}

  // The first row of step t.
  DEVICE int64_t start(int64_t t) const { return starts_ ? starts_.load(t) : t * sequences_; }

  // How many sequences run in step t; 0 before the first step and after the last.
  DEVICE int64_t size(int64_t t) const {
    if (t < 0 || t >= steps_) return 0;
    return sizes_ ? sizes_.load(t) : sequences_;
  }

  // How many steps a sequence has.
  DEVICE int64_t count(int64_t sequence) const {
    if (!sizes_) return steps_;
    int64_t low = 0, high = steps_;  // sizes never rise
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sizes_.load(middle) > sequence)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

 private:
  Global<const int64_t> starts_, sizes_;
  int64_t steps_, sequences_;
};

// How many of two neighbouring units exist, if `left` units are left.
DEVICE int two_of(int left) { return left < 0 ? 0 : left < 2 ? left : 2; }

// A thread takes two hidden units side by side: in one access where rows have an even length (EVEN), else one by one.
// `count` of them are there: 0, 1 or 2.
template <bool EVEN, class T>
DEVICE Pair<T> load_units(Global<const T> from, int64_t i, int count) {
  if constexpr (EVEN) return count ? from.load_pair(i) : Pair<T>{};
  const T zero = from_acc<T>(0);
  return pair(count > 0 ? from.load(i) : zero, count > 1 ? from.load(i + 1) : zero);
}
template <bool EVEN, class T>
DEVICE void store_units(Global<T> to, int64_t i, Pair<T> units, int count) {
  if constexpr (EVEN) {
    if (count) to.store_pair(i, units);
  } else {
    if (count > 0) to.store(i, first(units));
    if (count > 1) to.store(i + 1, second(units));
  }
}
template <class T>
DEVICE void to_acc(Pair<T> units, acc_t<T> (&acc)[2]) {
  acc[0] = to_acc(first(units)), acc[1] = to_acc(second(units));
}
template <class T>
DEVICE Pair<T> from_acc(const acc_t<T> (&units)[2]) {
  return pair(from_acc<T>(units[0]), from_acc<T>(units[1]));
}

// Zeros those of two units that the layer does not have. Their weights are zero, but zero times infinity is NaN, which
// would reach all units through the next product.
template <class T>
DEVICE void zero_absent(T (&units)[2], int present) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (i >= present) units[i] = 0;
}

struct Lane {
  int sequence, unit;
};

// The bias of a unit in block i of bias_blocks_of(): what is added to W_ih x of each gate, and behind these what is
// added to W_hh h of the gates that stay apart.
template <Cell CELL, class T>
DEVICE acc_t<T> bias(const ForwardArgs& s, int direction, int i, int unit) {
  constexpr int G = CellTraits<CELL>::gates, apart = CellTraits<CELL>::apart;
  const Global<const T> b_ih(static_cast<const T*>(s.b_ih[direction]), G * s.hidden);
  const Global<const T> b_hh(static_cast<const T*>(s.b_hh[direction]), G * s.hidden);
  if (!b_ih) return 0;
  const auto of_h = [&](int gate) { return to_acc(b_hh.load(gate * s.hidden + unit)); };
  if (i >= G) return of_h(i - apart);
  return to_acc(b_ih.load(i * s.hidden + unit)) + (stays_apart<CELL>(i) ? 0 : of_h(i));
}

// The biases of some units, from the layer's `first` on, in a CTA's shared memory: [block, unit]. 16 bytes of them lie
// side by side, the next ones STRIDE bytes behind.
template <Cell CELL, class T, int UNITS, int STRIDE = 16>
class SharedBiases {
 public:
  // A barrier makes them known.
  DEVICE SharedBiases(const ForwardArgs& s, int direction, int first, int threads, int at)
      : all_(at, place(0, count) - (STRIDE / size - piece)) {
    for (int i = thread(); i < count; i += threads) {
      const int unit = first + i % UNITS;
      const acc_t<T> found = unit < s.hidden ? bias<CELL, T>(s, direction, i / UNITS, unit) : 0;
      all_.store(place(0, i), from_acc<T>(found));
    }
  }

  // Of a gate of two units: what is added to W_ih x, and of one that stays apart to W_hh h.
  DEVICE Pair<T> of_x(int gate, int unit) const { return all_.load_pair(place(gate, unit)); }
  DEVICE Pair<T> of_h(int gate, int unit) const { return of_x(gate + CellTraits<CELL>::apart, unit); }

 private:
  static constexpr int size = sizeof(T), piece = 16 / size, count = bias_blocks_of(CELL) * UNITS;

  static DEVICE int place(int block, int unit) {
    return (block * (UNITS / piece) + unit / piece) * (STRIDE / size) + unit % piece;
  }

  Shared<T> all_;
};

// The arrays of a forward sweep. The address of two units is that of a row of y and a unit, plus the lane's sequence
// and unit. The lane's part is the same for all units of a thread, so it is computed once.
template <Cell CELL, class T, bool EVEN>
class ForwardArrays {
 public:
  static constexpr int G = gates_of(CELL), K = saved_blocks_of(CELL);

  DEVICE ForwardArrays(const ForwardArgs& s, int direction)
      : gates_x_(static_cast<const T*>(s.gates_x), s.directions * s.rows * G * s.hidden),
        y_(static_cast<T*>(s.y), s.rows * s.directions * s.hidden),
        saved_(static_cast<T*>(s.saved), s.rows * s.directions * K * s.hidden),
        rows_(s.rows),
        hidden_(static_cast<int>(s.hidden)),
        directions_(s.directions),
        direction_(direction),
        of_gates_(direction ^ s.first_direction) {}

  DEVICE void load_gates(int64_t row, int unit, Lane lane, int count, Pair<T>* x) const {
    const int64_t base = (of_gates_ * rows_ + row) * G * hidden_ + unit;
#pragma unroll
    for (int gate = 0; gate < G; gate++)
      x[gate] = load_units<EVEN>(gates_x_, base + gate * hidden_ + (lane.sequence * G * hidden_ + lane.unit), count);
  }

  DEVICE void store_y(int64_t row, int unit, Lane lane, int count, Pair<T> h) const {
    const int64_t base = (row * directions_ + direction_) * hidden_ + unit;
    store_units<EVEN>(y_, base + (lane.sequence * directions_ * hidden_ + lane.unit), h, count);
  }

  // saved: of either unit all blocks but c.
  DEVICE void store_saved(int64_t row, int unit, Lane lane, int count, const acc_t<T> (&saved)[2][kMaxBlocks],
                          const acc_t<T> (&c)[2]) const {
    if constexpr (K > 0) {
      if (!saved_) return;
      const int64_t base = (row * directions_ + direction_) * K * hidden_ + unit;
      const int at = lane.sequence * directions_ * K * hidden_ + lane.unit;
#pragma unroll
      for (int block = 0; block < kSavedGates<CELL>; block++) {
        const acc_t<T> units[2] = {saved[0][block], saved[1][block]};
        store_units<EVEN>(saved_, base + block * hidden_ + at, from_acc<T>(units), count);
      }
      if (kHasC<CELL>) store_units<EVEN>(saved_, base + (K - 1) * hidden_ + at, from_acc<T>(c), count);
    }
  }

 private:
  Global<const T> gates_x_;
  Global<T> y_, saved_;
  int64_t rows_;
  int hidden_, directions_, direction_, of_gates_;
};

// What the backward step of two units reads: h of the step or of the one before, or both of c, as the cell needs.
template <class T>
struct StepInputs {
  Pair<T> grad_y, saved[kMaxBlocks], now, before;
};

// From the gradient of h after the step, the gradients of the gates. `grad_h` becomes the part of the gradient of h
// before the step that goes past the gates. Without `grad_y` that of the inputs is not read.
template <Cell CELL, class T>
DEVICE void backward_step(const StepInputs<T>& inputs, bool grad_y, acc_t<T> (&grad_h)[2], acc_t<T> (&grad_c)[2],
                          acc_t<T> (&grad)[2][kMaxBlocks]) {
  acc_t<T> saved[2][kMaxBlocks] = {}, now[2] = {}, before[2] = {}, of_y[2] = {};
#pragma unroll
  for (int block = 0; block < kSavedGates<CELL>; block++)
    saved[0][block] = to_acc(first(inputs.saved[block])), saved[1][block] = to_acc(second(inputs.saved[block]));
  if (kHasC<CELL> || CellTraits<CELL>::needs_h_prev) to_acc(inputs.before, before);
  if (kHasC<CELL> || CellTraits<CELL>::needs_h) to_acc(inputs.now, now);
  if (grad_y) to_acc(inputs.grad_y, of_y);
#pragma unroll
  for (int i = 0; i < 2; i++)
    grad_h[i] = cell_backward<CELL>(grad_h[i] + of_y[i], grad_c[i], saved[i], now[i], before[i], grad[i]);
}

// Which of the gradients that backward_step() gives is block i of stored_gradients_of().
template <Cell CELL>
DEVICE int gradient_of(int i) {
  constexpr int G = CellTraits<CELL>::gates;
  return i < G ? i : i - G + (stays_apart<CELL>(i - G) ? CellTraits<CELL>::apart : 0);
}

// The arrays of a backward sweep.
template <Cell CELL, class T, bool EVEN>
class BackwardArrays {
 public:
  static constexpr int G = gates_of(CELL), K = saved_blocks_of(CELL), F = stored_gradients_of(CELL);
  static constexpr int S = kSavedGates<CELL>;

  DEVICE BackwardArrays(const BackwardArgs& s, int direction) : BackwardArrays(s, direction, s.sequences) {}

  // Of other initial states than one for each sequence.
  DEVICE BackwardArrays(const BackwardArgs& s, int direction, int64_t states)
      : grad_y_(static_cast<const T*>(s.grad_y), s.rows * s.directions * s.hidden),
        h_0_(static_cast<const T*>(s.h_0), s.directions * states * s.hidden),
        c_0_(static_cast<const T*>(s.c_0), s.directions * states * s.hidden),
        y_(static_cast<const T*>(s.y), s.rows * s.directions * s.hidden),
        saved_(static_cast<const T*>(s.saved), s.rows * s.directions * K * s.hidden),
        grad_gates_(static_cast<T*>(s.grad_gates), s.directions * s.rows * F * s.hidden),
        rows_(s.rows),
        states_(states),
        hidden_(static_cast<int>(s.hidden)),
        directions_(s.directions),
        direction_(direction) {}

  // `row_before`: the row of the same sequence in the step before, if it `ran` there. `state`: its place among the
  // initial states.
  DEVICE void load(int64_t row, int64_t row_before, bool ran, int64_t state, int unit, Lane lane, int count,
                   StepInputs<T>& inputs) const {
    const int64_t place = (row * directions_ + direction_) * hidden_;
    const int64_t place_before = (row_before * directions_ + direction_) * hidden_;
    const int at = lane.sequence * directions_ * hidden_ + lane.unit;
    const int at_saved = lane.sequence * directions_ * K * hidden_ + lane.unit;
    const int at_state = lane.sequence * hidden_ + lane.unit;
    const auto units = [&](Global<const T> from, int64_t i) { return load_units<EVEN>(from, i, count); };
    state = (direction_ * states_ + state) * hidden_;
    if (grad_y_) inputs.grad_y = units(grad_y_, place + unit + at);
#pragma unroll
    for (int block = 0; block < S; block++)
      inputs.saved[block] = units(saved_, place * K + unit + block * hidden_ + at_saved);
    if constexpr (kHasC<CELL>) {
      inputs.now = units(saved_, place * K + unit + S * hidden_ + at_saved);
      inputs.before =
          ran ? units(saved_, place_before * K + unit + S * hidden_ + at_saved) : units(c_0_, state + unit + at_state);
    } else {
      if constexpr (CellTraits<CELL>::needs_h) inputs.now = units(y_, place + unit + at);
      if constexpr (CellTraits<CELL>::needs_h_prev)
        inputs.before = ran ? units(y_, place_before + unit + at) : units(h_0_, state + unit + at_state);
    }
  }

  DEVICE void step(const StepInputs<T>& inputs, acc_t<T> (&grad_h)[2], acc_t<T> (&grad_c)[2],
                   acc_t<T> (&grad)[2][kMaxBlocks]) const {
    backward_step<CELL>(inputs, static_cast<bool>(grad_y_), grad_h, grad_c, grad);
  }

  DEVICE void store_gates(int64_t row, int unit, Lane lane, int count, const acc_t<T> (&grad)[2][kMaxBlocks]) const {
    const int64_t base = (direction_ * rows_ + row) * F * hidden_ + unit;
    const int at = lane.sequence * F * hidden_ + lane.unit;
#pragma unroll
    for (int block = 0; block < F; block++) {
      const int of = gradient_of<CELL>(block);
      const acc_t<T> units[2] = {grad[0][of], grad[1][of]};
      store_units<EVEN>(grad_gates_, base + block * hidden_ + at, from_acc<T>(units), count);
    }
  }

 private:
  Global<const T> grad_y_, h_0_, c_0_, y_, saved_;
  Global<T> grad_gates_;
  int64_t rows_, states_;
  int hidden_, directions_, direction_;
};

}  // namespace seqkernels::device
