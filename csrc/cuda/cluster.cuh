// The exchange of blocks that are a cluster: they push what their peers need of a step into their shared memory, where
// an mbarrier counts the bytes. There are two buffers, so that one exchange a step is enough: nobody pushes to a buffer
// before all have read it, since each pushes a step only after it has got all of the step before, which its peers push
// after reading. Nothing else passes between the blocks, so that of the GPU's memory nobody has to see what peers have
// seen.
//
// Forward, the new states go to all peers: a step brings a block B H numbers of the layer's dtype, for B sequences.
// Backward there is a choice. If the gradients of the gates went to all peers, a step would bring G B H numbers of the
// dtype to a block, which has the weights' columns for its units. Instead a block multiplies its own gates' gradients
// by the weights' rows for its units, and what comes out, a share of the gradients of all states, goes to the blocks
// that own these: B H numbers of float32. The matrix cores and the memory for weights are as busy either way; what
// travels is G / 2 times less in 16 bits and G times less in float32: for B = 8, a GRU or an LSTM
//   H = 256:  8 KB a step, instead of 12 or 16 in 16 bits and 24 or 32 in float32
//   H = 512: 16 KB                    24 or 32                 48 or 64
//   H = 768: 24 KB                    36 or 48                 72 or 96
// at some 20 bytes a clock: at H = 512 about 800 clocks instead of 1200 or 1600, and 2400 or 3200. (An RNN, G = 1,
// would do better with the gradients in 16 bits, but has the least to send.) The owner adds up the shares in the order
// of the ranks, so that all runs give the same bits.
#pragma once
#include "slice.cuh"

namespace seqkernels::device {

// A cluster takes one tile of sequences.
template <class C>
class InCluster {
 public:
  template <class Pass>
  using Parameters = Sliced<Pass>;

  DEVICE InCluster() : rank_(cluster_rank()), blocks_(cluster_size()) {}

  static DEVICE int direction() { return block_y(); }
  DEVICE int rank() const { return rank_; }
  DEVICE int blocks() const { return blocks_; }

  template <class Pass, class Do>
  DEVICE void each_tile(const Sliced<Pass>& s, Do act) const {
    act(Tile(s, s.tile, block() / blocks_));
  }

 private:
  int rank_, blocks_;
};

template <class C>
struct ClusterStates : InCluster<C> {
  using T = typename C::T;
  DEVICE explicit ClusterStates(const Sliced<ForwardArgs>&) {}

  static DEVICE void prepared() {}

  // The states of two units of each lane, for the n-th exchange; all lanes of a warp take part.
  DEVICE void give(Shared<T> states, int stride, const Own<C>& mine, Pair<T> h, bool runs, int64_t n) const {
    constexpr int together = 16 / sizeof(T);
    const Vec16 words = gather(h);
    synchronize_warp();
    const int at = mine.sequence * stride + this->rank() * C::UNITS + mine.at / together * together;
    if (runs) push_to_all(states, at, words, this->rank(), this->blocks(), arrivals(n));
  }

  static DEVICE void pass_on(Shared<T>, int, int, int64_t) {}

  static DEVICE void receive(int64_t n) { arrivals(n).wait_for_shared(phase(n)); }
};

template <class C>
class ClusterShares : public InCluster<C> {
 public:
  using T = typename C::T;
  // The block multiplies the gates' gradients of its own units, for all states.
  static constexpr int of_units = C::UNITS;
  static constexpr int sets_of(int /*cluster*/) { return 1; }
  static constexpr int states_of(int64_t hidden, int /*blocks*/, int /*cluster*/) { return static_cast<int>(hidden); }
  static constexpr int exchanged_bytes(int blocks) { return 2 * blocks * kMaxTile * C::UNITS * 4; }

  DEVICE explicit ClusterShares(const Sliced<BackwardArgs>& s)
      : hidden_(static_cast<int>(s.hidden)), exchanged_(s.exchanged) {
    // The peers push for whole 16 units.
    const int left = (hidden_ + kMmaRows - 1) / kMmaRows * kMmaRows - this->rank() * C::UNITS;
    bytes_of_sequence_ = (left < 0 ? 0 : left < C::UNITS ? left : C::UNITS) * this->blocks() * 4;
  }

  static constexpr DEVICE int sets() { return 1; }
  DEVICE int first_of_set(int) const { return this->rank() * C::UNITS; }
  static constexpr DEVICE int first_state() { return 0; }
  DEVICE int states() const { return hidden_; }

  DEVICE void expect(int64_t n, int running) const { arrivals(n).expect(running * bytes_of_sequence_); }

  // Add to a thread's gradients of states what came in the n-th exchange, in which so many sequences ran.
  DEVICE void collect(int64_t n, int ran, const Own<C>& mine, float (&grad_h)[2]) const {
    arrivals(n).wait_for_shared(phase(n));
    if (!mine.any || mine.sequence >= ran || mine.there == 0) return;
    for (int of = 0; of < this->blocks(); of++) {
      const Pair<float> share = shares(n).load_pair((of * kMaxTile + mine.sequence) * C::UNITS + mine.at);
      grad_h[0] += first(share), grad_h[1] += second(share);
    }
  }

  DEVICE void give(Shared<T> gradients, int stride, const Own<C>& mine, const float (&grad)[2][4], bool runs,
                   int64_t) const {
    if (runs) {
#pragma unroll
      for (int gate = 0; gate < C::G; gate++)
        gradients.store_pair(mine.sequence * stride + gate * C::UNITS + mine.at,
                             C::Product::factors(grad[0][gate], grad[1][gate]));
    }
    synchronize();
  }

  static DEVICE void receive(int64_t) {}

  // To the block that owns 16 units. Two lanes with the next units each put together 4 units, one of either sequence.
  DEVICE void share(int64_t n, int unit, int running, const float (&result)[kElements]) const {
    const bool upper = lane() / 4 % 2;
    const float given[2] = {shfl_xor(upper ? result[0] : result[1], 4), shfl_xor(upper ? result[2] : result[3], 4)};
    const Vec16 words = upper ? Vec16{{bits(given[0]), bits(given[1]), bits(result[1]), bits(result[3])}}
                              : Vec16{{bits(result[0]), bits(result[2]), bits(given[0]), bits(given[1])}};
    const int sequence = sequence_of_lane() + upper;
    if (unit >= hidden_ || sequence >= running) return;
    shares(n).st_async((this->rank() * kMaxTile + sequence) * C::UNITS + unit % C::UNITS + lane() / 8 * 4, words,
                         unit / C::UNITS, arrivals(n));
  }

  static DEVICE void announce(int64_t) {}

 private:
  // [rank, sequence, unit] of the n-th exchange.
  DEVICE Shared<float> shares(int64_t n) const {
    const int size = this->blocks() * kMaxTile * C::UNITS;
    return {exchanged_ + static_cast<int>(n % 2) * size * 4, size};
  }

  int hidden_, exchanged_, bytes_of_sequence_;
};

template <class C>
using ClusterForward = SliceForward<C, ClusterStates>;
template <class C>
using ClusterBackward = SliceBackward<C, ClusterShares>;

}  // namespace seqkernels::device
