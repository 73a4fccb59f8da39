// The exchange of a group of CTAs that may be the whole grid, more than a cluster can be, through the L2 cache. All
// CTAs of the grid run at the same time. A CTA writes what it has computed in a step to global memory and raises a flag
// of its own; others wait for the flags of just those CTAs that they need something of, and there is no barrier of the
// grid. A flag only grows, by one with every exchange. The CTAs of a cluster (of 2 or 4) share the work:
//
// Forward, a step's new states go to all CTAs, and reading them from L2 would cost most: with 128 CTAs of 16 units, H =
// 2048 and 8 sequences in 16 bits each of them needs 32 KB, 4 MB a step together. So a CTA reads only its part of them,
// for the whole cluster: a bulk copy multicasts it to the shared memory of all its CTAs, where an mbarrier counts the
// bytes.
//
// Backward, as in cluster.cuh, partial gradients of the states go to the CTAs that own these, not the gates' gradients
// to all. But first the CTAs of a cluster send their gates' gradients to each other, and each multiplies those of all
// of them for its part of the states. A partial gradient is then a cluster's, not a CTA's, and there are 2 or 4 times
// fewer: for the layer above 16 KB a CTA to write and to read, with clusters of 4.
//
// Either exchange has two buffers, both in global and in shared memory, which is enough. Forward, a CTA publishes the
// states of exchange n + 1 after it has all of exchange n. By then all CTAs have published these, and so have read
// exchange n - 1, whose buffer it overwrites. And it copies a part of exchange n + 1 to its peers after it has a part
// of exchange n from each of them, who copy it after reading exchange n - 1. Backward, a CTA sends partials of exchange
// n + 1 after it has the gates' gradients of its cluster. Its CTAs send these after reducing exchange n of every
// cluster; and those clusters sent it after they had the gates' gradients of all their CTAs, which sent them when all
// of their threads had reduced exchange n - 1, whose buffer is overwritten. So what peers have seen of global memory
// passes through the mbarriers of a cluster as well.
#pragma once
#include "slice_backward.cuh"
#include "slice_forward.cuh"

namespace seqkernels::device {

template <class Pass>
struct GridArgs : SliceArgs<Pass> {
  int first_direction;  // of the CTAs with second index 0
  int groups;           // of a direction; they take the tiles in waves
  int blocks;           // CTAs of a group
  void* buffers;        // [D, groups, 2, values]
  int64_t values;       // of an exchange
  uint32_t* flags;      // [D, groups, blocks, flags of a CTA], which begin as 0
};

template <class C, class Pass>
class InGroup {
 public:
  static constexpr int FLAGS = grid_flags_of_block(C::variant.backward);  // of a CTA
  template <class Of>
  using Parameters = GridArgs<Of>;

  DEVICE explicit InGroup(const GridArgs<Pass>& s)
      : s(s),
        group_(static_cast<int>(block()) / s.blocks),
        rank_(static_cast<int>(block()) % s.blocks),
        cluster_(cluster_size()),
        clusters_(s.blocks / cluster_),
        peer_(cluster_rank()) {}

  DEVICE int direction() const { return s.first_direction + block_y(); }
  DEVICE int rank() const { return rank_; }
  DEVICE int blocks() const { return s.blocks; }

  template <class Do>
  DEVICE void each_tile(const SweepArgs&, Do act) const {
    for (int64_t i = group_; i * s.tile < s.sequences; i += s.groups) act(Tile(s, s.tile, i, direction()));
  }

 protected:
  DEVICE int cluster() const { return cluster_; }         // CTAs of a cluster
  DEVICE int clusters() const { return clusters_; }       // of the group
  DEVICE int number() const { return rank_ / cluster_; }  // of this CTA's cluster
  DEVICE int peer() const { return peer_; }               // which of its CTAs this one is
  DEVICE int width() const { return s.blocks * C::UNITS; }

  // Which of its group, over all directions.
  DEVICE int group() const { return direction() * s.groups + group_; }

  DEVICE Flags flags() const { return {s.flags + group() * s.blocks * FLAGS, s.blocks * FLAGS}; }

  // The buffer of the n-th exchange.
  template <class T>
  DEVICE Global<T> buffer(int64_t n) const {
    return {static_cast<T*>(s.buffers) + (group() * 2 + static_cast<int>(n % 2)) * s.values, s.values};
  }

  const GridArgs<Pass>& s;

 private:
  int group_, rank_, cluster_, clusters_, peer_;
};

// Each warp that owns states has a flag. A buffer is [sequence, unit].
template <class C>
struct GridForwardExchange : InGroup<C, ForwardArgs> {
  using T = typename C::T;
  static constexpr int owners = C::owners;
  using InGroup<C, ForwardArgs>::InGroup;

  // The CTA's initial states are in its shared memory before copies may follow.
  static DEVICE void fence_buffers() { fence_copies_to_shared(); }

  // Stores the states of two units of each lane for all CTAs, in the n-th exchange; all lanes of a warp take part.
  DEVICE void publish(Shared<T>, int, const OwnedUnits<C>& mine, Pair<T> h, bool runs, int64_t n) const {
    if (runs) states(n).store_pair(mine.sequence * this->width() + mine.unit, h);
    synchronize_warp();
    if (lane() == 0) this->flags().raise(this->rank() * owners + thread() / kWarpSize, static_cast<uint32_t>(n + 1));
  }

  // Copies to all CTAs of the cluster what this CTA's part of the CTAs publishes. The warps that own nothing divide the
  // work by sequences, that is by their owners, and by CTAs, so that a lane waits for one flag.
  DEVICE void multicast(Shared<T> copies, int stride, int running, int64_t n) const {
    constexpr int warps = C::warps / owners - 1, sequences = kMaxTile / owners;  // for, and of, each owner
    static_assert(warps > 0);
    const int warp = thread() / kWarpSize - owners, owner = thread() / kWarpSize % owners, shard = warp / owners;
    const int first = owner * sequences, rows = running - first < sequences ? running - first : sequences;
    if (warp < 0 || rows <= 0) return;
    const int blocks = this->clusters(), part = this->peer() * blocks;
    const int begin = part + blocks * shard / warps, end = part + blocks * (shard + 1) / warps;
    if (begin == end) return;
    for (int i = begin + lane(); i < end; i += kWarpSize)
      this->flags().wait(i * owners + owner, static_cast<uint32_t>(n + 1));
    synchronize_warp();
    if (lane() >= rows) return;
    fence_copies_from_global();
    const int row = first + lane(), unit = begin * C::UNITS;
    copies.copy_to_cluster(row * stride + unit, states(n), row * this->width() + unit, (end - begin) * C::UNITS,
                           arrivals(n));
  }

  static DEVICE void wait(int64_t n) { arrivals(n).wait(phase(n)); }

 private:
  DEVICE Global<T> states(int64_t n) const { return this->template buffer<T>(n); }
};

// A CTA has one flag. A buffer is [cluster, sequence, unit].
template <class C>
struct GridBackwardExchange : InGroup<C, BackwardArgs> {
  using T = typename C::T;
  using InGroup<C, BackwardArgs>::InGroup;

  static constexpr int reducers = grid_reducers(), reducer_threads = C::threads / reducers;  // that reduce
  static constexpr int reducer_sums = grid_reducer_sums(), set_units = backward_set_units(C::PATH, C::UNITS);

  // A CTA multiplies the gates' gradients of its cluster, those of two CTAs at once, for its part of the states.
  DEVICE int sets() const { return this->cluster() / 2; }
  DEVICE int first_of_set(int set) const { return (this->rank() - this->peer() + set * 2) * C::UNITS; }
  DEVICE int first_state() const { return this->peer() * this->clusters() * C::UNITS; }
  DEVICE int states() const {
    const int part = this->clusters() * C::UNITS, left = static_cast<int>(this->s.hidden) - first_state();
    return left < 0 ? 0 : left < part ? left : part;
  }

  DEVICE void expect(int64_t n, int running) const {
    arrivals(n).expect(running * this->cluster() * C::G * C::UNITS * static_cast<int>(sizeof(T)));
  }

  // Adds to a thread's gradients of states the partials of the n-th exchange, in which `ran` sequences ran. In each
  // cluster the CTA of the same number has those for the states of this CTA. All warps take part, so that as many loads
  // as possible are in flight: the owners, and the other reducers, which add up other clusters' partials for the same
  // states and give the owners their sums.
  DEVICE void reduce_partials(int64_t n, int ran, const OwnedUnits<C>& mine, float (&grad_h)[2]) const {
    const int reducer = thread() / reducer_threads, of_owner = thread() % reducer_threads;
    const int sequence = of_owner / OwnedUnits<C>::pairs,
              unit = this->rank() * C::UNITS + of_owner % OwnedUnits<C>::pairs * 2;
    const int clusters = this->clusters(), from = this->rank() / clusters;
    float sum[2] = {};
    if (of_owner / kWarpSize * (kMaxTile / C::owners) < ran) {
      for (int i = reducer + lane() * reducers; i < clusters; i += kWarpSize * reducers)
        this->flags().wait(i * this->cluster() + from, static_cast<uint32_t>(n + 1));
      synchronize_warp();
      if (sequence < ran && unit < this->s.hidden) {
#pragma unroll 8
        for (int i = reducer; i < clusters; i += reducers) {
          const Pair<float> partial = partials(n).load_pair(place(i, sequence) + unit);
          sum[0] += first(partial), sum[1] += second(partial);
        }
      }
    }
    const Shared<float> sums(this->s.exchange, reducer_sums);
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
                      bool runs, int64_t n) const {
    if (!mine.any) return;
    constexpr int gathered = 16 / sizeof(T);
    const int set = this->peer() / 2, at = this->peer() % 2 * C::UNITS + mine.at / gathered * gathered;
#pragma unroll
    for (int gate = 0; gate < C::G; gate++) {
      const Vec16 words = gather(C::MathPolicy::factors(grad[0][gate], grad[1][gate]));
      if (runs)
        st_async_to_all(gradients, mine.sequence * stride + (set * C::G + gate) * set_units + at, words, this->peer(),
                        this->cluster(), arrivals(n));
    }
  }

  static DEVICE void wait(int64_t n) { arrivals(n).wait(phase(n)); }

  // Stores those of 16 units of the CTA's part.
  DEVICE void send_partials(int64_t n, int unit, int running, const float (&result)[kElements]) const {
    if (unit >= states()) return;
    const int mine = place(this->number(), 0) + first_state() + unit + unit_of_lane();
#pragma unroll
    for (int s_ = 0; s_ < 2; s_++) {
      const int sequence = sequence_of_lane() + s_;
      if (sequence < running) partials(n).store_pair(mine + sequence * this->width(), pair(result[s_], result[2 + s_]));
    }
  }

  // Tells the others that all partials of the CTA are there.
  DEVICE void signal(int64_t n) const {
    synchronize();
    if (thread() == 0) this->flags().raise(this->rank(), static_cast<uint32_t>(n + 1));
  }

 private:
  DEVICE Global<float> partials(int64_t n) const { return this->template buffer<float>(n); }
  DEVICE int place(int cluster, int sequence) const { return (cluster * kMaxTile + sequence) * this->width(); }
};

template <class C>
using PersistentGridForward = SliceForward<C, GridForwardExchange>;
template <class C>
using PersistentGridBackward = SliceBackward<C, GridBackwardExchange>;

}  // namespace seqkernels::device
