// The rows of a layer as the owners of a slice walk over them. Addresses are computed before the first step; from step
// to step they are only added to, since all instructions of a step count (docs/kernels.md).
#pragma once
#include "slice.cuh"

namespace seqkernels::device {

// The step that a sweep is at, and so many steps after it: how many sequences run in each, and how far its rows are
// from those of the next. Rows of a step begin where those of the step before it in time end.
template <int AHEAD>
class StepWindow {
 public:
  // Of a backward pass: from the last step to the first.
  DEVICE StepWindow(const SweepArgs& s, const Tile& tile, bool backward)
      : sizes_(s.sizes, s.steps),
        all_(static_cast<int>(s.sequences)),
        first_(static_cast<int>(tile.first())),
        of_tile_(tile.sequences()),
        left_(static_cast<int>(tile.count())),
        rises_((tile.direction() == 0) != backward),
        ragged_(sizes_) {
    const int64_t t = rises_ ? 0 : tile.count() - 1;
    if (ragged_) sizes_ = sizes_.moved(t, kSizeBytes);
    row_ = left_ > 0 ? Steps(s).start(t) + first_ : 0;
#pragma unroll
    for (int i = 0; i <= AHEAD; i++) size_[i] = take();
  }

  DEVICE int64_t row() const { return row_; }  // the tile's first row in the first step

  // Sequences of the tile that run in the i-th step from here; none after the last step.
  DEVICE int running(int i = 0) const {
    const int running = size_[i] - first_;
    return running < of_tile_ ? running : of_tile_;
  }

  // Rows from the i-th step from here to the next; i is less than AHEAD.
  DEVICE int rows(int i = 0) const { return rises_ ? size_[i] : -size_[i + 1]; }

  // On to the next step.
  DEVICE void next() {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) size_[i] = size_[i + 1];
    size_[AHEAD] = take();
  }

 private:
  static constexpr int kSizeBytes = sizeof(int64_t);

  // The size of the next step that has not been taken yet, loaded long before it is used, so that no thread waits.
  DEVICE int take() {
    int size = left_ > 0 ? all_ : first_;
    if (ragged_ && left_ > 0) {
      size = static_cast<int>(sizes_.load(0));
      sizes_ = sizes_.moved(rises_ ? 1 : -1, kSizeBytes);
    }
    left_--;
    return size;
  }

  Global<const int64_t> sizes_;
  int all_, first_, of_tile_, left_;
  bool rises_, ragged_;
  int64_t row_;
  int size_[AHEAD + 1];
};

// What an owner reads and writes of the rows of a forward sweep.
template <class C>
class ForwardRows {
 public:
  using T = typename C::T;
  static constexpr int G = C::G, K = saved_blocks_of(C::CELL);

  // Before the first step, in which the tile has rows from `first` on.
  DEVICE ForwardRows(const SliceArgs<ForwardArgs>& s, const OwnedUnits<C>& mine, int direction, int64_t first)
      : s_(s),
        saves_(s.saved),
        gates_x_(mine.of_direction(static_cast<const T*>(s.gates_x), G, direction ^ s.first_direction, first)),
        y_(mine.of_row(static_cast<T*>(s.y), 1, direction, first)),
        saved_(mine.of_row(static_cast<T*>(s.saved), K, direction, first)) {}

  DEVICE void load_gates(int count, Pair<T> (&x)[G]) const {
#pragma unroll
    for (int gate = 0; gate < G; gate++) x[gate] = load_units<C::EVEN>(gates_x_.moved(gate, s_.block), 0, count);
  }

  DEVICE void store_y(int count, Pair<T> h) const { store_units<C::EVEN>(y_, 0, h, count); }

  // saved: of either unit all blocks but c.
  DEVICE void store_saved(int count, const float (&saved)[2][kMaxBlocks], const float (&c)[2]) const {
    if constexpr (K > 0) {
      if (!saves_) return;
#pragma unroll
      for (int block = 0; block < kSavedGates<C::CELL>; block++) {
        const float units[2] = {saved[0][block], saved[1][block]};
        store_units<C::EVEN>(saved_.moved(block, s_.block), 0, from_acc<T>(units), count);
      }
      if (kHasC<C::CELL>) store_units<C::EVEN>(saved_.moved(K - 1, s_.block), 0, from_acc<T>(c), count);
    }
  }

  // Go on by so many rows: where gates are loaded, and where results are stored.
  DEVICE void move_loads(int rows) { gates_x_ = gates_x_.moved(rows, s_.gates_row); }
  DEVICE void move_stores(int rows) {
    y_ = y_.moved(rows, s_.y_row);
    if (K > 0) saved_ = saved_.moved(rows, s_.saved_row);
  }

 private:
  const SliceArgs<ForwardArgs>& s_;
  bool saves_;
  Global<const T> gates_x_;
  Global<T> y_, saved_;
};

// What an owner reads and writes of the rows of a backward sweep.
template <class C>
class BackwardRows {
 public:
  using T = typename C::T;
  static constexpr int K = saved_blocks_of(C::CELL), F = stored_gradients_of(C::CELL), S = kSavedGates<C::CELL>;
  static constexpr bool has_c = kHasC<C::CELL>,
                        has_y = CellTraits<C::CELL>::needs_h || CellTraits<C::CELL>::needs_h_prev;

  DEVICE BackwardRows(const SliceArgs<BackwardArgs>& s, const OwnedUnits<C>& mine, int direction, int64_t first)
      : s_(s),
        mine_(mine),
        reads_grad_y_(s.grad_y),
        grad_y_(mine.of_row(static_cast<const T*>(s.grad_y), 1, direction, first)),
        saved_(mine.of_row(static_cast<const T*>(s.saved), K, direction, first)),
        y_(mine.of_row(static_cast<const T*>(s.y), 1, direction, first)),
        grad_gates_(mine.of_direction(static_cast<T*>(s.grad_gates), F, direction, first)) {}

  // What the step reads, where loads are; `rows` from there is the step before it in time, in which the sequence `ran`
  // or not.
  DEVICE StepInputs<T> load(int count, int rows, bool ran) const {
    StepInputs<T> inputs = {};
    const auto units = [&](Global<const T> from) { return load_units<C::EVEN>(from, 0, count); };
    inputs.grad_y = load_units<C::EVEN>(grad_y_, 0, reads_grad_y_ ? count : 0);
#pragma unroll
    for (int block = 0; block < S; block++) inputs.saved[block] = units(saved_.moved(block, s_.block));
    const auto before = [&](Global<const T> from, int row_bytes, const void* at_first) {
      if (ran) return units(from.moved(rows, row_bytes));
      return count ? mine_.load_state(at_first) : Pair<T>{};
    };
    if constexpr (has_c) {
      const Global<const T> c = saved_.moved(S, s_.block);
      inputs.now = units(c);
      inputs.before = before(c, s_.saved_row, s_.c_0);
    } else {
      if constexpr (CellTraits<C::CELL>::needs_h) inputs.now = units(y_);
      if constexpr (CellTraits<C::CELL>::needs_h_prev) inputs.before = before(y_, s_.y_row, s_.h_0);
    }
    return inputs;
  }

  DEVICE void store_gates(int count, const float (&grad)[2][kMaxBlocks]) const {
#pragma unroll
    for (int block = 0; block < F; block++) {
      const int of = gradient_of<C::CELL>(block);
      const float units[2] = {grad[0][of], grad[1][of]};
      store_units<C::EVEN>(grad_gates_.moved(block, s_.block), 0, from_acc<T>(units), count);
    }
  }

  DEVICE void move_loads(int rows) {
    grad_y_ = grad_y_.moved(rows, s_.y_row);
    if (K > 0) saved_ = saved_.moved(rows, s_.saved_row);
    if (has_y) y_ = y_.moved(rows, s_.y_row);
  }
  DEVICE void move_stores(int rows) { grad_gates_ = grad_gates_.moved(rows, s_.gates_row); }

 private:
  const SliceArgs<BackwardArgs>& s_;
  const OwnedUnits<C>& mine_;
  bool reads_grad_y_;
  Global<const T> grad_y_, saved_, y_;
  Global<T> grad_gates_;
};

}  // namespace seqkernels::device
