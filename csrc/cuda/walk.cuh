// The way of a tile through its steps, without a product of 64 bits: how many sequences run in a step and how far its
// rows are from those of the next, and what a thread reads and writes there.
#pragma once
#include "tile.cuh"

namespace seqkernels::device {

// Goes from step to step in the order of a direction, or (backward) against it. Knows AHEAD steps more, and fetches the
// size of the one behind these, so that no thread waits for it.
template <int AHEAD>
class Walk {
 public:
  DEVICE Walk(const SweepArgs& s, const Tile& tile, bool backward)
      : sizes_(s.sizes, s.steps),
        left_(tile.count()),
        first_(static_cast<int>(tile.first())),
        of_tile_(tile.sequences()),
        all_(static_cast<int>(s.sequences)),
        forth_((tile.direction() == 0) != backward) {
    t_ = forth_ ? 0 : left_ - 1;
    row_ = left_ > 0 ? Steps(s).start(t_) + first_ : 0;
#pragma unroll
    for (int i = 0; i <= AHEAD; i++) size_[i] = size(i);
  }

  DEVICE bool any() const { return left_ > 0; }

  // How many of the tile's sequences run, and the row of its first one.
  DEVICE int running(int ahead = 0) const {
    const int running = size_[ahead] - first_;
    return running < of_tile_ ? running : of_tile_;
  }
  DEVICE int64_t row() const { return row_; }

  // How many rows there are from a step to the next.
  DEVICE int rows(int ahead = 0) const { return forth_ ? size_[ahead] : -size_[ahead + 1]; }

  DEVICE void fetch() { fetched_ = size(AHEAD + 1); }
  DEVICE void advance() {
    row_ += rows();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) size_[i] = size_[i + 1];
    size_[AHEAD] = fetched_;
    left_--;
    t_ += forth_ ? 1 : -1;
  }

 private:
  // 0 behind the last step.
  DEVICE int size(int ahead) const {
    if (left_ <= ahead) return 0;
    return sizes_ ? static_cast<int>(sizes_.load(forth_ ? t_ + ahead : t_ - ahead)) : all_;
  }

  Global<const int64_t> sizes_;
  int64_t left_, t_, row_;
  int first_, of_tile_, all_;
  bool forth_;
  int size_[AHEAD + 1], fetched_ = 0;
};

}  // namespace seqkernels::device
