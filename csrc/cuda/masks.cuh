// What the masks of cells with options (StepMasks) change about a step of two neighbouring units.
#pragma once
#include "layer.cuh"

namespace seqkernels::device {

// An RNN saves nothing, so that its backward pass could not do without the state that zoneout has replaced; its
// candidate is the state. So it has the mask `recurrent` alone.
template <Cell CELL, class T>
class MaskedStep {
  using A = acc_t<T>;
  static constexpr bool kHasCandidate = CellTraits<CELL>::saved_blocks > 0;

 public:
  // `row`: of y, where the sequence runs.
  DEVICE MaskedStep(const StepMasks& masks, const SweepArgs& s, int direction, int64_t sequence, int64_t row, int unit)
      : recurrent_(static_cast<const A*>(masks.recurrent), s.directions * s.sequences * s.hidden),
        candidate_(static_cast<const A*>(masks.candidate), s.directions * s.sequences * s.hidden),
        zoneout_h_(static_cast<const A*>(masks.zoneout_h), s.rows * s.directions * s.hidden),
        zoneout_c_(static_cast<const A*>(masks.zoneout_c), s.rows * s.directions * s.hidden),
        in_states_((direction * s.sequences + sequence) * s.hidden + unit),
        in_rows_((row * s.directions + direction) * s.hidden + unit) {}

  // h of unit i, or a gradient of it, where it goes through the products.
  DEVICE A in_products(int i, A h) const { return recurrent_ ? h * recurrent_.load(in_states_ + i) : h; }

  // The states of unit i after the step, from what cell_forward() gave for those before.
  DEVICE void forward(int i, const A* saved, A h_before, A c_before, A& h, A& c) const {
    if constexpr (kHasCandidate)
      if (candidate_) drop_candidate<CELL>(candidate_.load(in_states_ + i), saved, h_before, c_before, h, c);
    if (zoneout_h_) h += zoneout_h_.load(in_rows_ + i) * (h_before - h);
    if (kHasC<CELL> && zoneout_c_) c += zoneout_c_.load(in_rows_ + i) * (c_before - c);
  }

  // As BackwardArrays::step().
  DEVICE void backward(const StepInputs<T>& inputs, int count, A (&grad_h)[2], A (&grad_c)[2],
                       A (&grad)[2][kMaxBlocks]) const {
    A saved[2][kMaxBlocks] = {}, now[2], before[2], grad_y[2];
#pragma unroll
    for (int block = 0; block < kSavedGates<CELL>; block++)
      saved[0][block] = to_acc(first(inputs.saved[block])), saved[1][block] = to_acc(second(inputs.saved[block]));
    to_acc(inputs.now, now), to_acc(inputs.before, before), to_acc(inputs.grad_y, grad_y);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < count) backward(i, saved[i], now[i], before[i], grad_y[i], grad_h[i], grad_c[i], grad[i]);
  }

 private:
  // Of what zones out, the gradient goes to the state before, and not to the step.
  DEVICE void backward(int i, const A* saved, A now, A before, A grad_y, A& grad_h, A& grad_c, A* grad) const {
    const A mask = candidate_ ? candidate_.load(in_states_ + i) : 1;
    const A new_h = grad_h + grad_y, stays_h = zoneout_h_ ? new_h * zoneout_h_.load(in_rows_ + i) : 0;
    A stays_c = 0;
    if (kHasC<CELL> && zoneout_c_) {
      stays_c = grad_c * zoneout_c_.load(in_rows_ + i);
      grad_c -= stays_c;
      now = lstm_c(saved, before, mask);  // that h came from
    }
    if constexpr (kHasCandidate)
      grad_h = dropped_backward<CELL>(mask, new_h - stays_h, grad_c, saved, now, before, grad) + stays_h;
    else
      grad_h = cell_backward<CELL>(new_h, grad_c, saved, now, before, grad);
    grad_c += stays_c;
  }

  Global<const A> recurrent_, candidate_, zoneout_h_, zoneout_c_;
  int64_t in_states_, in_rows_;
};

}  // namespace seqkernels::device
