// Sequences that consist of pieces (StepMasks::pieces): which state is whose.
#pragma once
#include "layer.cuh"

namespace seqkernels::device {

// Arrays of states are [D, C, *]; a state is a number of D*C. -1: there is none.
class Pieces {
 public:
  DEVICE Pieces(const StepMasks& masks, const SweepArgs& s, int direction)
      : of_rows_(masks.pieces, s.rows), steps_(s), direction_(direction), states_(masks.states) {}

  DEVICE explicit operator bool() const { return static_cast<bool>(of_rows_); }

  // Of the piece that a row is of, if the row's sequence runs.
  DEVICE int64_t state(int64_t row, bool runs) const { return runs ? direction_ * states_ + of_rows_.load(row) : -1; }

  // The state of a sequence in step t; none where it does not run.
  DEVICE int64_t in_step(int64_t t, int64_t sequence) const {
    return sequence < steps_.size(t) ? state(steps_.start(t) + sequence, true) : -1;
  }

  // That of a sequence's first piece, in the order of the direction, or of its last.
  DEVICE int64_t outermost(int64_t sequence, bool last) const {
    return in_step(last == (direction_ == 0) ? steps_.count(sequence) - 1 : 0, sequence);
  }

 private:
  Global<const int64_t> of_rows_;
  Steps steps_;
  int direction_;
  int64_t states_;
};

}  // namespace seqkernels::device
