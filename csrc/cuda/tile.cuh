// A tile of sequences: which of them run in which step, and where their rows are.
#pragma once
#include "layer.cuh"

namespace seqkernels::device {

// The steps of the sequences that a CTA, a cluster or a group takes at once, in the order of a direction.
class Tile {
 public:
  DEVICE Tile(const SweepArgs& s, int sequences, int64_t number = block(), int direction = block_y())
      : steps_(s), direction_(direction), first_(number * sequences), count_(steps_.count(first_)) {
    const int64_t left = s.sequences - first_;
    sequences_ = left < sequences ? static_cast<int>(left) : sequences;
  }

  DEVICE int64_t count() const { return count_; }  // steps of the longest sequence, which is the first
  DEVICE int64_t first() const { return first_; }  // its number
  DEVICE int sequences() const { return sequences_; }
  DEVICE int direction() const { return direction_; }

  // The first row and the size of the k-th step, loaded a step before they are used, so that no thread waits.
  struct Prefetched {
    int64_t start, size;
  };
  DEVICE Prefetched prefetch(int64_t k) const {
    if (k < 0 || k >= count_) return {0, first_};  // none run
    const int64_t t = step_of(k, count_, direction_);
    return {steps_.start(t), steps_.size(t)};
  }

  // The row of the first sequence in a step, and how many of the tile's sequences run in it.
  struct Step {
    int64_t row;
    int running;
  };
  DEVICE Step step(Prefetched read) const {
    const int64_t running = read.size - first_;
    return {read.start + first_, running < sequences_ ? static_cast<int>(running) : sequences_};
  }

 private:
  Steps steps_;
  int direction_;
  int64_t first_, count_;
  int sequences_;
};

}  // namespace seqkernels::device
