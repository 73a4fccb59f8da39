// The exchange of the CTAs of a cluster: they send what their peers need of a step into their shared memory, where an
// mbarrier counts the bytes. There are two buffers, so that one exchange a step is enough: no CTA sends to a buffer
// before all have read it. A CTA sends a step only after it has all of the step before, which its peers send after
// reading. Nothing else passes between the CTAs, so what peers have seen of global memory need not be seen.
//
// Forward, the new states go to all peers: a step brings a CTA B H numbers of the layer's dtype, for B sequences.
// Backward there is a choice. If the gradients of the gates went to all peers, a step would bring G B H numbers of the
// dtype to a CTA, which would need the weights' columns for its units. Instead a CTA multiplies its own gates'
// gradients by the weights' rows for its units. The result, partial gradients of all states, goes to the CTAs that own
// these: B H numbers of float32. Tensor cores and the memory for weights are as busy either way, but G / 2 times less
// travels in 16 bits and G times less in float32. For B = 8, a GRU or an LSTM:
//   H = 256:  8 KB a step, instead of 12 or 16 in 16 bits and 24 or 32 in float32
//   H = 512: 16 KB                    24 or 32                 48 or 64
//   H = 768: 24 KB                    36 or 48                 72 or 96
// at some 20 bytes a clock: at H = 512 about 800 clocks instead of 1200 or 1600, and 2400 or 3200. (An RNN, G = 1,
// would do better with the gradients in 16 bits, but has little to send.) The owner adds up the partial gradients in
// the order of the ranks, so that all runs give the same bits.
#pragma once
#include "slice_backward.cuh"
#include "slice_forward.cuh"

namespace seqkernels::device {

// A cluster takes one tile of sequences.
template <class C>
class InCluster {
 public:
  template <class Pass>
  using Parameters = SliceArgs<Pass>;

  DEVICE InCluster() : rank_(cluster_rank()), blocks_(cluster_size()) {}

  static DEVICE int direction() { return block_y(); }
  DEVICE int rank() const { return rank_; }
  DEVICE int blocks() const { return blocks_; }

  template <class Pass, class Do>
  DEVICE void each_tile(const SliceArgs<Pass>& s, Do act) const {
    act(Tile(s, s.tile, block() / blocks_));
  }

 private:
  int rank_, blocks_;
};

template <class C>
struct ClusterForwardExchange : InCluster<C> {
  using T = typename C::T;
  DEVICE explicit ClusterForwardExchange(const SliceArgs<ForwardArgs>&) {}

  DEVICE void expect(uint32_t n, int running) const {
    arrivals(n).expect(running * this->blocks() * C::UNITS * static_cast<int>(sizeof(T)));
  }

  // Sends the states of two units of each lane to all peers, in the n-th exchange; all lanes of a warp take part.
  DEVICE void publish(Shared<T> states, int stride, const OwnedUnits<C>& mine, Pair<T> h, bool runs, uint32_t n) const {
    constexpr int gathered = 16 / sizeof(T);
    const Vec16 words = gather(h);
    synchronize_warp();
    const int at = mine.sequence * stride + this->rank() * C::UNITS + mine.at / gathered * gathered;
    if (runs) st_async_to_all(states, at, words, this->rank(), this->blocks(), arrivals(n));
  }

  static DEVICE void wait(uint32_t n, int) { arrivals(n).wait_for_shared(phase(n)); }
};

template <class C>
class ClusterBackwardExchange : public InCluster<C> {
 public:
  using T = typename C::T;

  DEVICE explicit ClusterBackwardExchange(const SliceArgs<BackwardArgs>& s)
      : hidden_(static_cast<int>(s.hidden)), exchange_(s.exchange) {
    // The peers send for whole 16 units.
    const int left = (hidden_ + kMmaRows - 1) / kMmaRows * kMmaRows - this->rank() * C::UNITS;
    bytes_of_sequence_ = (left < 0 ? 0 : left < C::UNITS ? left : C::UNITS) * this->blocks() * 4;
  }

  // The CTA multiplies the gates' gradients of its own units, for all states.
  static constexpr DEVICE int sets() { return 1; }
  DEVICE int first_of_set(int) const { return this->rank() * C::UNITS; }
  static constexpr DEVICE int first_state() { return 0; }
  DEVICE int states() const { return hidden_; }

  DEVICE void expect(uint32_t n, int running) const { arrivals(n).expect(running * bytes_of_sequence_); }

  // Adds to a thread's gradients of states what came in the n-th exchange, in which so many sequences ran.
  DEVICE void reduce_partials(uint32_t n, int ran, const OwnedUnits<C>& mine, float (&grad_h)[2]) const {
    arrivals(n).wait_for_shared(phase(n));
    if (!mine.any || mine.sequence >= ran || mine.present == 0) return;
    constexpr int at_once = 4;  // loads
#pragma unroll 1
    for (int first_of = 0; first_of < this->blocks(); first_of += at_once) {
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        const int of = first_of + i;
        if (of >= this->blocks()) continue;
        const Pair<float> partial = partials(n).load_pair((of * kMaxTile + mine.sequence) * C::UNITS + mine.at);
        grad_h[0] += first(partial), grad_h[1] += second(partial);
      }
    }
  }

  // Stores the gates' gradients for all threads of the CTA, which then wait for each other.
  DEVICE void publish(Shared<T> gradients, int stride, const OwnedUnits<C>& mine, const float (&grad)[2][kMaxBlocks],
                      bool runs, uint32_t) const {
    if (runs) {
#pragma unroll
      for (int gate = 0; gate < C::G; gate++)
        gradients.store_pair(mine.sequence * stride + gate * C::UNITS + mine.at,
                             C::MathPolicy::factors(grad[0][gate], grad[1][gate]));
    }
  }

  static DEVICE void wait(uint32_t) { synchronize(); }

  // Sends to the CTA that owns 16 units. Two lanes with neighbouring units each gather 4 units, one of either sequence.
  DEVICE void send_partials(uint32_t n, int unit, int running, const float (&result)[kElements]) const {
    const bool upper = lane() / 4 % 2;
    const float received[2] = {shfl_xor(upper ? result[0] : result[1], 4), shfl_xor(upper ? result[2] : result[3], 4)};
    const Vec16 words = upper ? Vec16{{bits(received[0]), bits(received[1]), bits(result[1]), bits(result[3])}}
                              : Vec16{{bits(result[0]), bits(result[2]), bits(received[0]), bits(received[1])}};
    const int sequence = sequence_of_lane() + upper;
    if (unit >= hidden_ || sequence >= running) return;
    partials(n).st_async((this->rank() * kMaxTile + sequence) * C::UNITS + unit % C::UNITS + lane() / 8 * 4, words,
                         unit / C::UNITS, arrivals(n));
  }

 private:
  // [rank, sequence, unit] of the n-th exchange.
  DEVICE Shared<float> partials(uint32_t n) const {
    const int size = this->blocks() * kMaxTile * C::UNITS;
    return {exchange_ + static_cast<int>(n % 2) * size * 4, size};
  }

  int hidden_, exchange_, bytes_of_sequence_;
};

template <class C>
using ClusterForward = SliceForward<C, ClusterForwardExchange>;
template <class C>
using ClusterBackward = SliceBackward<C, ClusterBackwardExchange>;

}  // namespace seqkernels::device
