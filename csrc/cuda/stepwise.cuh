// A sweep step by step: between two matrix products a kernel does the rest of a step, for both directions (the second
// index of a CTA). Besides, small kernels that prepare steps and gather rows. A thread has one element, or two hidden
// units side by side.
#pragma once
#include "masks.cuh"
#include "pieces.cuh"

namespace seqkernels::device {

constexpr int kThreads = 128;

// Element i of an array [rows, width], if there is one.
struct Element {
  int64_t row;
  int column;
};
DEVICE bool element(int64_t rows, int64_t width, Element& found) {
  const int64_t i = block() * kThreads + thread();
  if (i >= rows * width) return false;
  found.row = i / width;
  found.column = static_cast<int>(i % width);
  return true;
}

// The i-th two units of an array [rows, hidden], and how many of them there are.
struct TwoUnits {
  int64_t row;
  int unit, count;
};
DEVICE bool two_units(int64_t rows, int64_t hidden, TwoUnits& found) {
  Element at;
  if (!element(rows, (hidden + 1) / 2, at)) return false;
  found.row = at.row;
  found.unit = at.column * 2;
  found.count = found.unit + 1 < hidden ? 2 : 1;
  return true;
}

// A thread has one element.
template <class T>
struct MaskStatesKernel {
  static constexpr int threads = kThreads;
  using Parameters = MaskStates;

  static DEVICE void run(const MaskStates& p) {
    const int64_t i = block() * kThreads + thread();
    if (i < p.layer.directions * p.layer.sequences * p.layer.hidden) run(p, i);
  }

  static DEVICE void run(const MaskStates& p, int64_t i) {
    const int64_t states = p.layer.directions * p.layer.sequences * p.layer.hidden;
    const Global<const T> added(static_cast<const T*>(p.added), states);
    const acc_t<T> masked = Global<const acc_t<T>>(static_cast<const acc_t<T>*>(p.mask), states).load(i) *
                            to_acc(Global<const T>(static_cast<const T*>(p.states), states).load(i));
    Global<T>(static_cast<T*>(p.result), states).store(i, from_acc<T>(added ? to_acc(added.load(i)) + masked : masked));
  }
};

// A thread has one element.
template <class T>
struct CopyPiecesKernel {
  static constexpr int threads = kThreads;
  using Parameters = CopyPieces;

  static DEVICE void run(const CopyPieces& p) {
    const SweepArgs& s = p.layer;
    Element at;
    if (!element(s.sequences, s.hidden, at)) return;
    const int d = block_y();
    const int64_t state = Pieces(p.masks, s, d).outermost(at.row, p.last);
    const int64_t i = state * s.hidden + at.column, j = (d * s.sequences + at.row) * s.hidden + at.column;
    const Global<T> of_pieces(static_cast<T*>(p.of_pieces), s.directions * p.masks.states * s.hidden);
    const int64_t states = s.directions * s.sequences * s.hidden;
    const Global<T> of_sequences(static_cast<T*>(p.of_sequences), states);
    const Global<acc_t<T>> accumulated(static_cast<acc_t<T>*>(p.of_sequences), states);
    if (p.back) {
      if (state >= 0) of_pieces.store(i, p.accumulated ? from_acc<T>(accumulated.load(j)) : of_sequences.load(j));
      return;
    }
    const T given = state >= 0 && of_pieces ? of_pieces.load(i) : from_acc<T>(0);
    if (p.accumulated)
      accumulated.store(j, to_acc(given));
    else
      of_sequences.store(j, given);
  }
};

template <Cell CELL, class T, bool EVEN, bool MASKED = false>
struct StepForwardKernel {
  static constexpr int threads = kThreads, G = gates_of(CELL);
  using Parameters = std::conditional_t<MASKED, MaskedStepForward, StepForward>;

  static DEVICE void run(const Parameters& p) {
    const ForwardArgs& s = p.layer;
    TwoUnits at;
    if (!two_units(p.running, s.hidden, at)) return;
    const int d = block_y();
    const Steps steps(s);
    const int64_t t = step_of(p.k, s.steps, d);
    if (at.row >= steps.size(t)) return;
    const int64_t row = steps.start(t) + at.row, state = d * s.sequences + at.row;
    const ForwardArrays<CELL, T, EVEN> arrays(s, d);

    const Global<const T> gates_h(static_cast<const T*>(p.gates_h), s.directions * s.sequences * G * s.hidden);
    const int64_t states = s.directions * s.sequences * s.hidden, place = state * s.hidden + at.unit;
    const Global<T> h(static_cast<T*>(p.h), states);
    const Global<acc_t<T>> c(static_cast<acc_t<T>*>(p.c), states);
    Pair<T> x[G];
    arrays.load_gates(row, at.unit, {}, at.count, x);
    acc_t<T> x_i[2][G], of_h[2][G], saved[2][kMaxBlocks], h_now[2] = {}, c_now[2] = {};
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      acc_t<T> units[2];
      to_acc(x[gate], units);
      x_i[0][gate] = units[0], x_i[1][gate] = units[1];
      to_acc(load_units<EVEN>(gates_h, (state * G + gate) * s.hidden + at.unit, at.count), units);
      of_h[0][gate] = units[0], of_h[1][gate] = units[1];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < at.count) add_biases(s, d, at.unit + i, x_i[i], of_h[i]);
    if (MASKED || CellTraits<CELL>::needs_h_prev) {
      to_acc(load_units<EVEN>(Global<const T>(static_cast<const T*>(p.h), states), place, at.count), h_now);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (kHasC<CELL> && i < at.count) c_now[i] = c.load(place + i);
      [[maybe_unused]] const acc_t<T> h_before = h_now[i], c_before = c_now[i];
      cell_forward<CELL>(x_i[i], of_h[i], h_now[i], c_now[i], saved[i]);
      if constexpr (MASKED)
        if (i < at.count) {
          const MaskedStep<CELL, T> masked(p.masks, s, d, at.row, row, at.unit, s.saved);
          masked.forward(i, saved[i], h_before, c_before, h_now[i], c_now[i]);
          const Global<T> factors(static_cast<T*>(p.factors), states);
          if (factors) factors.store(place + i, from_acc<T>(masked.in_products(i, h_now[i])));
        }
      if (kHasC<CELL> && i < at.count) c.store(place + i, c_now[i]);
    }
    store_units<EVEN>(h, place, from_acc<T>(h_now), at.count);
    if (!p.has_projection) arrays.store_y(row, at.unit, {}, at.count, from_acc<T>(h_now));
    arrays.store_saved(row, at.unit, {}, at.count, saved, c_now);
    if constexpr (MASKED)
      if (p.masks.pieces) change_piece(p, at, t, from_acc<T>(h_now), c_now);
  }

 private:
  static DEVICE void add_biases(const ForwardArgs& s, int d, int unit, acc_t<T> (&of_x)[G], acc_t<T> (&of_h)[G]) {
#pragma unroll
    for (int block = 0; block < G + CellTraits<CELL>::apart; block++)
      (block < G ? of_x[block] : of_h[block - CellTraits<CELL>::apart]) += bias<CELL, T>(s, d, block, unit);
  }

  // Behind step t: where a piece ended, its states leave, and those of the next begin.
  static DEVICE void change_piece(const MaskedStepForward& p, const TwoUnits& at, int64_t t, Pair<T> h,
                                  const acc_t<T> (&c)[2]) {
    const ForwardArgs& s = p.layer;
    const int d = block_y();
    const Pieces pieces(p.masks, s, d);
    const int64_t ended = pieces.in_step(t, at.row), next = pieces.in_step(d == 0 ? t + 1 : t - 1, at.row);
    if (ended == next) return;
    const int64_t of_pieces = s.directions * p.masks.states * s.hidden,
                  of_sequences = s.directions * s.sequences * s.hidden;
    const auto place = [&](int64_t state) { return state * s.hidden + at.unit; };
    const int64_t mine = place(d * s.sequences + at.row);
    store_units<false>(Global<T>(static_cast<T*>(s.h_n), of_pieces), place(ended), h, at.count);
    if constexpr (kHasC<CELL>)
      store_units<false>(Global<T>(static_cast<T*>(s.c_n), of_pieces), place(ended), from_acc<T>(c), at.count);
    if (next < 0) return;
    const Global<const T> h_0(static_cast<const T*>(s.h_0), of_pieces), c_0(static_cast<const T*>(s.c_0), of_pieces);
    store_units<false>(Global<T>(static_cast<T*>(p.h), of_sequences), mine,
                       load_units<false>(h_0, place(next), at.count), at.count);
    for (int i = 0; kHasC<CELL> && i < at.count; i++)
      Global<acc_t<T>>(static_cast<acc_t<T>*>(p.c), of_sequences).store(mine + i, to_acc(c_0.load(place(next) + i)));
  }
};

template <Cell CELL, class T, bool EVEN, bool MASKED = false>
struct StepBackwardKernel {
  static constexpr int threads = kThreads, G = gates_of(CELL);
  using Parameters = std::conditional_t<MASKED, MaskedStepBackward, StepBackward>;

  static DEVICE void run(const Parameters& p) {
    const BackwardArgs& s = p.layer;
    TwoUnits at;
    if (!two_units(p.running, s.hidden, at)) return;
    const int d = block_y();
    const Steps steps(s);
    const int64_t t = step_of(p.k, s.steps, d), t_before = d == 0 ? t - 1 : t + 1;
    const int64_t state = d * s.sequences + at.row, place = state * s.hidden + at.unit;
    const int64_t states = s.directions * s.sequences * s.hidden;
    const Global<T> grad_step(static_cast<T*>(p.grad_step), states * G), grad_h(static_cast<T*>(p.grad_h), states);
    const Global<acc_t<T>> grad_c(static_cast<acc_t<T>*>(p.grad_c), states);
    if constexpr (MASKED) {
      add_factors(p, place, at.count);
      if (p.masks.pieces) change_piece(p, at, t);
    }
    acc_t<T> grad[2][kMaxBlocks] = {};
    if (at.row < steps.size(t)) {
      const BackwardArrays<CELL, T, EVEN> arrays(s, d, states_of(p));
      const int64_t row = steps.start(t) + at.row;
      bool ran = at.row < steps.size(t_before);
      int64_t first = at.row;  // state
      const int64_t row_before = ran ? steps.start(t_before) + at.row : 0;
      if constexpr (MASKED)
        if (p.masks.pieces) {
          const Pieces pieces(p.masks, s, d);
          first = pieces.state(row, true) - d * p.masks.states;
          ran = pieces.state(row_before, ran) == pieces.state(row, true);
        }
      StepInputs<T> inputs = {};
      arrays.load(row, row_before, ran, first, at.unit, {}, at.count, inputs);
      acc_t<T> of_h[2], of_c[2] = {};
      to_acc(load_units<EVEN>(Global<const T>(static_cast<const T*>(p.grad_h), states), place, at.count), of_h);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (kHasC<CELL> && i < at.count) of_c[i] = grad_c.load(place + i);
      if constexpr (MASKED)
        MaskedStep<CELL, T>(p.masks, s, d, at.row, row, at.unit, const_cast<void*>(s.saved))
            .backward(inputs, at.count, of_h, of_c, grad);
      else
        arrays.step(inputs, of_h, of_c, grad);
      arrays.store_gates(row, at.unit, {}, at.count, grad);
      if (!p.has_projection) store_units<EVEN>(grad_h, place, from_acc<T>(of_h), at.count);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (kHasC<CELL> && i < at.count) grad_c.store(place + i, of_c[i]);
    }
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const acc_t<T> units[2] = {grad[0][gate], grad[1][gate]};
      store_units<EVEN>(grad_step, (state * G + gate) * s.hidden + at.unit, from_acc<T>(units), at.count);
    }
  }

 private:
  // How many initial states a direction has.
  static DEVICE int64_t states_of(const Parameters& p) {
    if constexpr (MASKED)
      if (p.masks.pieces) return p.masks.states;
    return p.layer.sequences;
  }

  // Where step t is the last of its piece and another follows: the gradients of states become that other's, and begin
  // as those of its own final states.
  static DEVICE void change_piece(const MaskedStepBackward& p, const TwoUnits& at, int64_t t) {
    const BackwardArgs& s = p.layer;
    const int d = block_y();
    const Pieces pieces(p.masks, s, d);
    const int64_t later = pieces.in_step(d == 0 ? t + 1 : t - 1, at.row), now = pieces.in_step(t, at.row);
    if (later < 0 || now < 0 || later == now) return;
    const int64_t of_pieces = s.directions * p.masks.states * s.hidden,
                  of_sequences = s.directions * s.sequences * s.hidden;
    const int64_t from = now * s.hidden + at.unit, to = later * s.hidden + at.unit;
    const int64_t mine = (d * s.sequences + at.row) * s.hidden + at.unit;
    const Global<const T> grad_h_n(static_cast<const T*>(s.grad_h_n), of_pieces);
    const Global<const T> grad_c_n(static_cast<const T*>(s.grad_c_n), of_pieces);
    const Global<T> grad_h_0(static_cast<T*>(s.grad_h_0), of_pieces), grad_c_0(static_cast<T*>(s.grad_c_0), of_pieces);
    const Global<T> grad_h(static_cast<T*>(p.grad_h), of_sequences);
    const Global<acc_t<T>> grad_c(static_cast<acc_t<T>*>(p.grad_c), of_sequences);
    for (int i = 0; i < at.count; i++) {
      grad_h_0.store(to + i, grad_h.load(mine + i));
      grad_h.store(mine + i, grad_h_n ? grad_h_n.load(from + i) : from_acc<T>(0));
      if constexpr (kHasC<CELL>) {
        grad_c_0.store(to + i, from_acc<T>(grad_c.load(mine + i)));
        grad_c.store(mine + i, grad_c_n ? to_acc(grad_c_n.load(from + i)) : 0);
      }
    }
  }

  // Adds to grad_h what the last product gave, which the next one overwrites; also where a sequence does not run now.
  static DEVICE void add_factors(const MaskedStepBackward& p, int64_t place, int count) {
    MaskStates of_h{};
    of_h.layer = p.layer;
    of_h.mask = p.masks.recurrent, of_h.states = p.grad_factors, of_h.added = of_h.result = p.grad_h;
    for (int i = 0; p.grad_factors && i < count; i++) MaskStatesKernel<T>::run(of_h, place + i);
  }
};

template <class T>
struct StepProjectKernel {
  static constexpr int threads = kThreads;
  using Parameters = StepProject;

  static DEVICE void run(const StepProject& p) {
    const SweepArgs& s = p.layer;
    Element at;
    if (!element(p.running, s.projected, at)) return;
    const int d = block_y();
    const Steps steps(s);
    const int64_t t = step_of(p.k, s.steps, d), states = s.directions * s.sequences * s.projected;
    if (at.row >= steps.size(t)) return;
    const int64_t place = (d * s.sequences + at.row) * s.projected + at.column;
    const T h = Global<const T>(static_cast<const T*>(p.result), states).load(place);
    Global<T>(static_cast<T*>(p.h), states).store(place, h);
    Global<T>(static_cast<T*>(p.y), s.rows * s.directions * s.projected)
        .store(((steps.start(t) + at.row) * s.directions + d) * s.projected + at.column, h);
  }
};

template <class T>
struct StepProjectBackwardKernel {
  static constexpr int threads = kThreads;
  using Parameters = StepProjectBackward;

  static DEVICE void run(const StepProjectBackward& p) {
    const SweepArgs& s = p.layer;
    Element at;
    if (!element(p.running, s.projected, at)) return;
    const int d = block_y();
    const Steps steps(s);
    const int64_t t = step_of(p.k, s.steps, d), states = s.directions * s.sequences * s.projected;
    const int64_t place = (d * s.sequences + at.row) * s.projected + at.column;
    acc_t<T> grad = 0;
    if (at.row < steps.size(t)) {
      const int64_t row = steps.start(t) + at.row, values = s.rows * s.directions * s.projected;
      const Global<const T> grad_y(static_cast<const T*>(p.grad_y), values);
      const Global<T> grad_h(static_cast<T*>(p.grad_h), states);
      grad = to_acc(grad_h.load(place));
      if (grad_y) grad += to_acc(grad_y.load((row * s.directions + d) * s.projected + at.column));
      grad_h.store(place, from_acc<T>(0));
      Global<T>(static_cast<T*>(p.grad_projected), values)
          .store((d * s.rows + row) * s.projected + at.column, from_acc<T>(grad));
    }
    Global<T>(static_cast<T*>(p.grad_step), states).store(place, from_acc<T>(grad));
  }
};

// The first CTAs add up gradients of biases, the others gather states, a thread one element; a direction is the second
// index of a CTA.
template <class T, bool MASKED = false>
struct FinishSweepKernel {
  static constexpr int threads = 512;
  using Parameters = std::conditional_t<MASKED, MaskedFinishSweep, FinishSweep>;

  static constexpr int strip = 16;  // columns of grad_gates that a CTA adds up: 32 bytes of a row, or more
  static constexpr int shared_bytes = threads / kWarpSize * strip * static_cast<int>(sizeof(acc_t<T>));
  static int64_t blocks(const FinishSweep& p) {
    return ceil_div(p.columns, strip) + ceil_div(p.layer.rows * p.layer.projected, threads);
  }

  static DEVICE void run(const Parameters& p) {
    const SweepArgs& s = p.layer;
    const int d = block_y();
    const int64_t strips = (p.columns + strip - 1) / strip;
    if (block() < strips) return add_up(p, static_cast<int>(block()) * strip, d);
    const int64_t i = (block() - strips) * threads + thread();
    if (i < s.rows * s.projected) gather(p, {i / s.projected, static_cast<int>(i % s.projected)}, d);
  }

 private:
  // Two columns a thread, of every 64th row; then the threads with the same columns add up theirs.
  static DEVICE void add_up(const FinishSweep& p, int first_column, int d) {
    constexpr int pairs = strip / 2, warps = threads / kWarpSize;
    const int own = thread() % pairs * 2, column = first_column + own, columns = static_cast<int>(p.columns);
    acc_t<T> sum[2] = {};
    if (columns % 2)
      add_rows<false>(p, d, column, sum);
    else
      add_rows<true>(p, d, column, sum);
    const Shared<acc_t<T>> of_warps(0, warps * strip);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int mask = pairs; mask < kWarpSize; mask *= 2) sum[i] += shfl_xor(sum[i], mask);
      if (thread() % kWarpSize < pairs) of_warps.store(thread() / kWarpSize * strip + own + i, sum[i]);
    }
    synchronize();
    const int mine = first_column + thread();
    if (thread() >= strip || mine >= columns) return;
    acc_t<T> all = 0;
    for (int warp = 0; warp < warps; warp++) all += of_warps.load(warp * strip + thread());
    const Global<T> of_x(static_cast<T*>(p.grad_b_ih[d]), p.gates), of_h(static_cast<T*>(p.grad_b_hh[d]), p.gates);
    if (mine < p.gates) of_h.store(mine, from_acc<T>(all));
    if (mine >= columns - p.gates) of_x.store(mine - (columns - p.gates), from_acc<T>(all));
  }

  template <bool EVEN>
  static DEVICE void add_rows(const FinishSweep& p, int d, int column, acc_t<T> (&sum)[2]) {
    const int64_t rows = p.layer.rows;
    const Global<const T> grads(static_cast<const T*>(p.grad_gates) + d * rows * p.columns, rows * p.columns);
    const int count = two_of(static_cast<int>(p.columns) - column);
#pragma unroll 16
    for (int64_t row = thread() / (strip / 2); row < rows; row += threads / (strip / 2)) {
      acc_t<T> units[2];
      to_acc(load_units<EVEN>(grads, row * p.columns + column, count), units);
      sum[0] += units[0], sum[1] += units[1];
    }
  }

  // Of all directions.
  static DEVICE int64_t initial_states(const Parameters& p) {
    if constexpr (MASKED)
      if (p.masks.pieces) return p.layer.directions * p.masks.states;
    return p.layer.directions * p.layer.sequences;
  }

  static DEVICE void gather(const Parameters& p, Element at, int d) {
    const SweepArgs& s = p.layer;
    const Steps steps(s);
    int64_t low = 0, high = s.steps;  // the last step that begins at this row or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (steps.start(middle) <= at.row ? low : high) = middle;
    }
    const int64_t sequence = at.row - steps.start(low), before = d == 0 ? low - 1 : low + 1;
    const Global<const T> y(static_cast<const T*>(p.y), s.rows * s.directions * s.projected);
    const Global<const T> h_0(static_cast<const T*>(p.h_0), initial_states(p) * s.projected);
    T h = from_acc<T>(0);
    if (sequence < steps.size(low)) {
      if constexpr (MASKED) {
        const Pieces pieces(p.masks, s, d);
        const int64_t state = d * s.sequences + sequence, first = pieces ? pieces.in_step(low, sequence) : state;
        const bool ran = sequence < steps.size(before) && (!pieces || pieces.in_step(before, sequence) == first);
        h = ran ? y.load(((steps.start(before) + sequence) * s.directions + d) * s.projected + at.column)
                : h_0.load(first * s.projected + at.column);
        const Global<const acc_t<T>> mask(static_cast<const acc_t<T>*>(p.masks.recurrent),
                                          s.directions * s.sequences * s.projected);
        if (mask) h = from_acc<T>(to_acc(h) * mask.load(state * s.projected + at.column));
      } else {
        h = sequence < steps.size(before)
                ? y.load(((steps.start(before) + sequence) * s.directions + d) * s.projected + at.column)
                : h_0.load((d * s.sequences + sequence) * s.projected + at.column);
      }
    }
    Global<T>(static_cast<T*>(p.previous), s.directions * s.rows * s.projected)
        .store((d * s.rows + at.row) * s.projected + at.column, h);
  }
};

template <class T>
struct UnprojectedKernel {
  static constexpr int threads = kThreads;
  using Parameters = Unprojected;

  static DEVICE void run(const Unprojected& p) {
    const SweepArgs& s = p.layer;
    Element at;
    if (!element(s.rows, s.hidden, at)) return;
    constexpr int K = CellTraits<Cell::lstm>::saved_blocks;  // the last two are o and c
    const Global<const T> saved(static_cast<const T*>(p.saved), s.rows * s.directions * K * s.hidden);
    const int64_t o = ((at.row * s.directions + p.direction) * K + K - 2) * s.hidden + at.column, c = o + s.hidden;
    const acc_t<T> h = to_acc(saved.load(o)) * tanh(to_acc(saved.load(c)));
    Global<T>(static_cast<T*>(p.result), s.rows * s.hidden).store(at.row * s.hidden + at.column, from_acc<T>(h));
  }
};

struct WriteStepsKernel {
  static constexpr int threads = kThreads;
  using Parameters = WriteSteps;

  static DEVICE void run(const WriteSteps& p) {
    const int64_t t = p.begin + block() * kThreads + thread();
    if (t >= p.end[p.count - 1]) return;
    int run = 0;
    while (p.end[run] <= t) run++;
    const int64_t first = run ? p.end[run - 1] : p.begin;
    Global<int64_t>(p.starts, p.steps).store(t, p.start[run] + (t - first) * p.size[run]);
    Global<int64_t>(p.sizes, p.steps).store(t, p.size[run]);
  }
};

}  // namespace seqkernels::device
