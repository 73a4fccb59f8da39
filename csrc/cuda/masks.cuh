// What the masks of cells with options (StepMasks) change about a step of two neighbouring units.
#pragma once
#include "layer.cuh"

namespace seqkernels::device {

// An RNN, which saves nothing else, saves the h that zoneout may replace, as its backward pass needs it.
template <Cell CELL, class T>
class MaskedStep {
  using A = acc_t<T>;
  static constexpr bool kHasCandidate = CellTraits<CELL>::saved_blocks > 0;

 public:
  // `row`: of y, where the sequence runs. `new_h`: what an RNN saves, [N, D, H], if it does.
  DEVICE MaskedStep(const StepMasks& masks, const SweepArgs& s, int direction, int64_t sequence, int64_t row, int unit,
                    void* new_h = nullptr)
      : recurrent_(static_cast<const A*>(masks.recurrent), s.directions * s.sequences * s.hidden),
        candidate_(static_cast<const A*>(masks.candidate), s.directions * s.sequences * s.hidden),
        zoneout_h_(static_cast<const A*>(masks.zoneout_h), s.rows * s.directions * s.hidden),
        zoneout_c_(static_cast<const A*>(masks.zoneout_c), s.rows * s.directions * s.hidden),
        new_h_(static_cast<T*>(kHasCandidate || !masks.zoneout_h ? nullptr : new_h), s.rows * s.directions * s.hidden),
        in_states_((direction * s.sequences + sequence) * s.hidden + unit),
        in_rows_((row * s.directions + direction) * s.hidden + unit) {}

  // h of unit i, or a gradient of it, where it goes through the products.
  DEVICE A in_products(int i, A h) const { return recurrent_ ? h * recurrent_.load(in_states_ + i) : h; }

  // The states of unit i after the step, from what cell_forward() gave for those before.
  DEVICE void forward(int i, const A* saved, A h_before, A c_before, A& h, A& c) const {
    drop(i, saved, h_before, c_before, h, c);
    if constexpr (!kHasCandidate)
      if (new_h_) new_h_.store(in_rows_ + i, from_acc<T>(h));
    zone_h(i, h_before, h);
    if constexpr (kHasC<CELL>) zone_c(i, c_before, c);
  }

  // The parts of forward().
  DEVICE void drop(int i, const A* saved, A h_before, A c_before, A& h, A& c) const {
    if constexpr (kHasCandidate)
      if (candidate_) drop_candidate<CELL>(candidate_.load(in_states_ + i), saved, h_before, c_before, h, c);
  }
  DEVICE void zone_h(int i, A before, A& h) const {
    if (zoneout_h_) h += zoneout_h_.load(in_rows_ + i) * (before - h);
  }
  DEVICE void zone_c(int i, A before, A& c) const {
    if (zoneout_c_) c += zoneout_c_.load(in_rows_ + i) * (before - c);
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

  // What of a gradient of unit i's h or c goes past the step.
  DEVICE A stays_h(int i, A grad) const { return zoneout_h_ ? grad * zoneout_h_.load(in_rows_ + i) : 0; }
  DEVICE A stays_c(int i, A grad) const { return zoneout_c_ ? grad * zoneout_c_.load(in_rows_ + i) : 0; }

  // What multiplies the candidate of unit i.
  DEVICE A candidate(int i) const { return candidate_ ? candidate_.load(in_states_ + i) : 1; }

  // As cell_backward(), with what multiplies the candidate.
  static DEVICE A cell_back(A mask, A grad_h, A& grad_c, const A* saved, A now, A before, A* grad) {
    if constexpr (kHasCandidate)
      return dropped_backward<CELL>(mask, grad_h, grad_c, saved, now, before, grad);
    else
      return cell_backward<CELL>(grad_h, grad_c, saved, now, before, grad);
  }

 private:
  // Of what zones out, the gradient goes to the state before, and not to the step.
  DEVICE void backward(int i, const A* saved, A now, A before, A grad_y, A& grad_h, A& grad_c, A* grad) const {
    const A mask = candidate(i), grad_new_h = grad_h + grad_y, past_h = stays_h(i, grad_new_h);
    A past_c = 0;
    if constexpr (!kHasCandidate)
      if (new_h_) now = to_acc(new_h_.load(in_rows_ + i));
    if (kHasC<CELL> && zoneout_c_) {
      past_c = stays_c(i, grad_c);
      grad_c -= past_c;
      now = lstm_c(saved, before, mask);  // that h came from
    }
    grad_h = cell_back(mask, grad_new_h - past_h, grad_c, saved, now, before, grad) + past_h;
    grad_c += past_c;
  }

  Global<const A> recurrent_, candidate_, zoneout_h_, zoneout_c_;
  Global<T> new_h_;
  int64_t in_states_, in_rows_;
};

}  // namespace seqkernels::device
