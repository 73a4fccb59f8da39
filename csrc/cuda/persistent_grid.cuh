// The exchange of a group of CTAs that may be the whole grid, more than a cluster can be, through the L2 cache. All
// CTAs of the grid run at the same time. A CTA writes what it has computed in a step to global memory, in vectors that
// carry the number of the exchange as a tag, and others poll just those vectors that they need (Tagged in device.cuh).
// There is no flag, no fence and no barrier of the grid.
//
// Forward, a step's new states go to all CTAs, and each reads them all: with tags, tile * H * 3 bytes in 16 bits. A
// CTA could read a part only, for its cluster, but what was polled is in registers, and to push it to the peers costs
// more than that they read it: a multiprocessor gets 6 to 13 bytes a clock of its peers, and some 30 of L2.
//
// Backward, as in cluster.cuh, partial gradients of the states go to the CTAs that own these, not the gates' gradients
// to all. But first the CTAs of a cluster (of 2 or 4) send their gates' gradients to each other, and each multiplies
// those of all of them for its part of the states. A partial gradient is then a cluster's, not a CTA's, and there are 2
// or 4 times fewer: with 128 CTAs of 16 units, H = 2048 and 8 sequences 32 KB a CTA to write and to read, with clusters
// of 4.
//
// Tags only grow, over all tiles that a group takes, and begin as zeros in each launch, so that no vector is taken for
// one of another exchange. There are two buffers, of which exchange n has the (n % 2)-th, and that is enough: exchange
// n + 1 overwrites n - 1, and is sent only by CTAs that know of all others that they have read n - 1. What a thread of
// a CTA has read is known to all of its threads after the barrier that follows.
// * Forward, a CTA sends n + 1 after it has all of n. Each CTA sent its part of n after it had all of n - 1. (With one
//   sequence at least, as the longest runs in every step of a tile. In a tile's first step, which waits for nothing, it
//   has what the last step of the tile before waited for.)
// * Backward, a CTA sends partials of n + 1 after it has the gates' gradients of its cluster. Its CTAs send these after
//   reducing n of every cluster; and those clusters sent it after they had the gates' gradients of all their CTAs,
//   which sent them when all of their threads had reduced n - 1. (A cluster has a CTA with units, which reduces.) So
//   what has been read passes through the mbarriers of a cluster as well.
#pragma once
#include "slice_backward.cuh"
#include "slice_forward.cuh"

namespace seqkernels::device {

template <class Pass>
struct GridArgs : SliceArgs<Pass> {
  int first_of_launch;  // the direction of CTAs with second index 0
  int groups;           // of a direction; they take the tiles in waves
  int blocks, cluster;  // CTAs of a group, of a cluster
  int clusters;         // of a group
  Vec16* buffers;       // [D, groups, 2, vectors], which begin as 0
  int vectors;          // of an exchange
};

template <class C, class Pass>
class InGroup {
 public:
  template <class Of>
  using Parameters = GridArgs<Of>;

  DEVICE explicit InGroup(const GridArgs<Pass>& s)
      : s(s), group_(static_cast<int>(block()) / s.blocks), rank_(static_cast<int>(block()) % s.blocks) {}

  DEVICE int direction() const { return s.first_of_launch + block_y(); }
  DEVICE int rank() const { return rank_; }
  DEVICE int blocks() const { return s.blocks; }

  template <class Do>
  DEVICE void each_tile(const SweepArgs&, Do act) const {
    for (int64_t i = group_; i * s.tile < s.sequences; i += s.groups) act(Tile(s, s.tile, i, direction()));
  }

 protected:
  // The buffer of the n-th exchange, and its tag.
  DEVICE Tagged buffer(uint32_t n) const {
    const int64_t number = (direction() * s.groups + group_) * 2 + n % 2;
    return {s.buffers + number * s.vectors, s.vectors};
  }
  static DEVICE uint32_t tag(uint32_t n) { return n + 1; }

  const GridArgs<Pass>& s;

 private:
  int group_, rank_;
};

// A buffer is [sequence, CTA, vector].
template <class C>
class GridForwardExchange : public InGroup<C, ForwardArgs> {
 public:
  using T = typename C::T;

  DEVICE explicit GridForwardExchange(const GridArgs<ForwardArgs>& s) : InGroup<C, ForwardArgs>(s) {}

  static DEVICE void expect(int64_t, int) {}

  // Stores the states of two units of each lane for all CTAs, in the n-th exchange; all lanes of a warp take part. Of
  // the lanes that have a sequence the first store a vector each.
  DEVICE void publish(Shared<T>, int, const OwnedUnits<C>& mine, Pair<T> h, bool runs, uint32_t n) const {
    constexpr int lanes = OwnedUnits<C>::pairs, of_lane = words / lanes;
    uint32_t own[4], sent[kVectorWords] = {};
    words_of(h, own);
    const int vector = lane() % lanes;
#pragma unroll
    for (int i = 0; i < kVectorWords; i++) {
      const int word = vector * kVectorWords + i;
#pragma unroll
      for (int of = 0; of < of_lane; of++) {
        const uint32_t received = shfl(own[of], lane() - vector + word / of_lane % lanes);
        if (word % of_lane == of && word < words) sent[i] = received;
      }
    }
    if (runs && vector < vectors)
      this->buffer(n).store(mine.sequence * row() + this->rank() * vectors + vector, sent[0], sent[1], sent[2],
                            this->tag(n));
  }

  // Waits for the states of the n-th exchange, in which so many sequences ran. Each thread polls some vectors of every
  // sequence, and stores their words for all threads.
  DEVICE void wait(uint32_t n, int ran) const {
    const Tagged sent = this->buffer(n);
    const int stride = this->s.stride / (4 / static_cast<int>(sizeof(T)));
    const Shared<uint32_t> states = factor_buffer<uint32_t>(n + 1, stride);
#pragma unroll 1
    for (int at = thread(); at < row(); at += C::threads) {
      const int first = at % vectors * kVectorWords, place = at / vectors * words + first;
#pragma unroll 1
      for (int from = 0; from < ran; from += polled) {
        Vec16 found[polled];
        sent.wait(from * row() + at, row(), ran * row(), this->tag(n), found);
#pragma unroll
        for (int i = 0; i < polled; i++)
#pragma unroll
          for (int word = 0; word < kVectorWords; word++)
            if (from + i < ran && first + word < words)
              states.store((from + i) * stride + place + word, found[i].word[word]);
      }
    }
    synchronize();
  }

 private:
  // Vectors that a thread loads side by side: as many as there are registers for.
  static constexpr int polled = C::MathPolicy::math == Math::tf32 ? 3 : 4;
  static constexpr int words = grid_words(C::MathPolicy::math), vectors = grid_vectors(C::MathPolicy::math);

  DEVICE int row() const { return this->s.blocks * vectors; }  // vectors of a sequence
};

// A buffer is [cluster, sequence, two units].
template <class C>
class GridBackwardExchange : public InGroup<C, BackwardArgs> {
 public:
  using T = typename C::T;

  DEVICE explicit GridBackwardExchange(const GridArgs<BackwardArgs>& s)
      : InGroup<C, BackwardArgs>(s),
        peer_(cluster_rank()),
        first_(place(this->rank() / this->s.cluster, sequence_of_lane()) + (first_state() + unit_of_lane()) / 2) {}

  // A CTA multiplies the gates' gradients of its cluster, those of two CTAs at once, for its part of the states.
  DEVICE int sets() const { return this->s.cluster / 2; }
  DEVICE int first_of_set(int set) const { return (this->rank() - peer_ + set * 2) * C::UNITS; }
  DEVICE int first_state() const { return peer_ * clusters() * C::UNITS; }
  DEVICE int states() const {
    const int part = clusters() * C::UNITS, left = static_cast<int>(this->s.hidden) - first_state();
    return left < 0 ? 0 : left < part ? left : part;
  }

  DEVICE void expect(uint32_t n, int running) const {
    arrivals(n).expect(running * this->s.cluster * C::G * C::UNITS * static_cast<int>(sizeof(T)));
  }

  // Adds to a thread's gradients of states the partials of the n-th exchange, in which `ran` sequences ran. In each
  // cluster the CTA of the same number has those for the states of this CTA. All warps take part, so that as many loads
  // as possible are in flight: the owners, and the other reducers, which add up other clusters' partials for the same
  // states and give the owners their sums.
  DEVICE void reduce_partials(uint32_t n, int ran, const OwnedUnits<C>& mine, float (&grad_h)[2]) const {
    const int reducer = thread() / reducer_threads, of_owner = thread() % reducer_threads;
    const int sequence = of_owner / pairs, at = this->rank() * pairs + of_owner % pairs;
    float sum[2] = {};
    if (sequence < ran && at * 2 < this->s.hidden) {
      const Tagged sent = this->buffer(n);
      const int stride = place(reducers, 0), end = place(clusters(), 0);
#pragma unroll 1
      for (int i = place(reducer, sequence) + at; i < end; i += stride * polled) {
        Vec16 found[polled];
        sent.wait(i, stride, end, this->tag(n), found);
#pragma unroll
        for (int of = 0; of < polled; of++)
          sum[0] += from_bits(found[of].word[0]), sum[1] += from_bits(found[of].word[1]);
      }
    }
    // Two arrays of sums, as others may store those of the next exchange while owners read these.
    const Shared<float> sums(this->s.exchange + static_cast<int>(n % 2) * reducer_sums * 4, reducer_sums);
    if (reducer > 0) sums.store_pair((thread() - reducer_threads) * 2, pair(sum[0], sum[1]));
    synchronize();  // then the CTA may send what lets others overwrite what it has read
    if (!mine.any || mine.sequence >= ran || mine.present == 0) return;
    grad_h[0] += sum[0], grad_h[1] += sum[1];
#pragma unroll
    for (int i = 0; i < reducers - 1; i++) {
      const Pair<float> others = sums.load_pair((i * reducer_threads + thread()) * 2);
      grad_h[0] += first(others), grad_h[1] += second(others);
    }
  }

  // Sends the gates' gradients to all CTAs of the cluster; all lanes of a warp take part.
  DEVICE void publish(Shared<T> gradients, int stride, const OwnedUnits<C>& mine, const float (&grad)[2][kMaxBlocks],
                      bool runs, uint32_t n) const {
    if (!mine.any) return;
    constexpr int gathered = 16 / sizeof(T);
    const int set = peer_ / 2, at = peer_ % 2 * C::UNITS + mine.at / gathered * gathered;
#pragma unroll
    for (int gate = 0; gate < C::G; gate++) {
      const Vec16 words = gather(C::MathPolicy::factors(grad[0][gate], grad[1][gate]));
      if (runs)
        st_async_to_all(gradients, mine.sequence * stride + (set * C::G + gate) * set_units + at, words, peer_,
                        this->s.cluster, arrivals(n));
    }
  }

  static DEVICE void wait(uint32_t n) { arrivals(n).wait_for_shared(phase(n)); }

  // Stores those of 16 units of the CTA's part.
  DEVICE void send_partials(uint32_t n, int unit, int running, const float (&result)[kElements]) const {
    if (unit >= states()) return;
#pragma unroll
    for (int s_ = 0; s_ < 2; s_++)
      if (sequence_of_lane() + s_ < running)
        this->buffer(n).store(first_ + s_ * row() + unit / 2, bits(result[s_]), bits(result[2 + s_]), 0, this->tag(n));
  }

 private:
  static constexpr int reducers = grid_reducers(), reducer_threads = C::threads / reducers;  // that reduce
  static constexpr int reducer_sums = grid_reducer_sums(), set_units = backward_set_units(C::PATH, C::UNITS);

  static constexpr int polled = 4;  // vectors that a thread loads side by side: as many as there are registers for
  static constexpr int pairs = OwnedUnits<C>::pairs;

  DEVICE int row() const { return this->s.blocks * pairs; }  // vectors of a sequence
  DEVICE int place(int cluster, int sequence) const { return (cluster * this->s.tile + sequence) * row(); }

  DEVICE int clusters() const { return this->s.clusters; }

  int peer_;   // which of its cluster this CTA is
  int first_;  // of the vectors for which this thread has partials
};

template <class C>
using PersistentGridForward = SliceForward<C, GridForwardExchange>;
template <class C>
using PersistentGridBackward = SliceBackward<C, GridBackwardExchange>;

}  // namespace seqkernels::device
