// The exchange of a group of blocks that may be the persistent grid, more than a cluster can be, through the L2 cache. All
// blocks of the grid run at the same time. What a block has computed in a step it writes to global memory, and raises a
// flag of its own; others wait for the flags of just those blocks that they need something of, and no barrier goes
// across the grid. A flag only ever grows, by one with every exchange. Blocks of a cluster (of 2 or 4) share the work:
//
// Forward, a step's new states go to all blocks, and reading them from L2 is what would cost most: with 128 blocks of
// 16 units, H = 2048 and 8 sequences in 16 bits each of them needs 32 KB, 4 MB a step together. So a block reads its
// part of them alone, for the whole cluster: a bulk copy writes them to the shared memory of all its blocks, where an
// mbarrier counts the bytes.
//
// Backward, as in cluster.cuh, shares of the states' gradients go to the blocks that own these, not the gates' gradients
// to all. But first the blocks of a cluster push their gates' gradients to each other, and each multiplies those of all
// of them for its part of the states. A share then comes from a cluster, not from a block, and there are 2 or 4 times
// fewer: for the layer above 16 KB a block to write and to read, with clusters of 4.
//
// Either exchange has two buffers, both in global and in shared memory, which is enough. Forward, a block gives the
// states of exchange n + 1 after it has all of exchange n, that is after all blocks have given these, and so have read
// exchange n - 1, whose buffer it overwrites; and it copies a part of exchange n + 1 to its peers after it has got a
// part of exchange n from each of them, who copy it after reading exchange n - 1. Backward, a block gives shares of
// exchange n + 1 after it has the gates' gradients of its cluster, whose blocks push them after collecting exchange n
// from every cluster; and these gave it after they had the gates' gradients of all their blocks, which pushed them when
// all of their threads had collected exchange n - 1, whose buffer is overwritten. So what peers have seen of the GPU's
// memory passes through the mbarriers of a cluster as well.
#pragma once
#include "slice.cuh"

namespace seqkernels::device {

template <class Pass>
struct OnPersistentGrid : Sliced<Pass> {
  int first_direction;  // of the blocks with second index 0
  int groups;           // of a direction; they take turns at the tiles
  int blocks;           // of a group
  void* exchange;       // [D, groups, 2, numbers]
  int64_t numbers;      // that an exchange holds
  uint32_t* flags;      // [D, groups, blocks, flags of a block], which begin as 0
};

// FLAGS: how many a block has.
template <class C, class Pass, int FLAGS_>
class InGroup {
 public:
  static constexpr int FLAGS = FLAGS_;
  template <class Of>
  using Parameters = OnPersistentGrid<Of>;

  DEVICE explicit InGroup(const OnPersistentGrid<Pass>& s)
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
  DEVICE int cluster() const { return cluster_; }         // blocks of a cluster
  DEVICE int clusters() const { return clusters_; }       // of the group
  DEVICE int number() const { return rank_ / cluster_; }  // of the cluster that this block is of
  DEVICE int peer() const { return peer_; }               // which of its blocks this one is
  DEVICE int width() const { return s.blocks * C::UNITS; }

  // Which of its group, over all directions.
  DEVICE int group() const { return direction() * s.groups + group_; }

  DEVICE Flags flags() const { return {s.flags + group() * s.blocks * FLAGS, s.blocks * FLAGS}; }

  // What the n-th exchange holds.
  template <class T>
  DEVICE Global<T> buffer(int64_t n) const {
    return {static_cast<T*>(s.exchange) + (group() * 2 + static_cast<int>(n % 2)) * s.numbers, s.numbers};
  }

  const OnPersistentGrid<Pass>& s;

 private:
  int group_, rank_, cluster_, clusters_, peer_;
};

// Each warp that owns states has a flag.
template <class C>
struct PersistentGridStates : InGroup<C, ForwardArgs, C::owners> {
  using T = typename C::T;
  static constexpr int owners = C::owners;
  using InGroup<C, ForwardArgs, owners>::InGroup;

  // [sequence, unit]
  static constexpr int64_t numbers(int blocks, int /*cluster*/) { return kMaxTile * blocks * C::UNITS; }

  // A block's initial states are in its shared memory, before copies may follow.
  static DEVICE void prepared() { fence_copies_to_shared(); }

  // The states of two units of each lane, for the n-th exchange; all lanes of a warp take part.
  DEVICE void give(Shared<T>, int, const Own<C>& mine, Pair<T> h, bool runs, int64_t n) const {
    if (runs) states(n).store_pair(mine.sequence * this->width() + mine.unit, h);
    synchronize_warp();
    if (lane() == 0) this->flags().raise(this->rank() * owners + thread() / 32, static_cast<uint32_t>(n + 1));
  }

  // Copy what this block's part of the blocks gives to all blocks of the cluster. The warps that own nothing share the
  // sequences, by their owners, and the blocks, so that a lane waits for one flag.
  DEVICE void pass_on(Shared<T> copies, int stride, int running, int64_t n) const {
    constexpr int warps = C::warps / owners - 1, sequences = kMaxTile / owners;  // for, and of, each owner
    static_assert(warps > 0);
    const int warp = thread() / 32 - owners, owner = thread() / 32 % owners, share = warp / owners;
    const int first = owner * sequences, rows = running - first < sequences ? running - first : sequences;
    if (warp < 0 || rows <= 0) return;
    const int blocks = this->clusters(), part = this->peer() * blocks;
    const int begin = part + blocks * share / warps, end = part + blocks * (share + 1) / warps;
    if (begin == end) return;
    for (int i = begin + lane(); i < end; i += 32) this->flags().wait(i * owners + owner, static_cast<uint32_t>(n + 1));
    synchronize_warp();
    if (lane() >= rows) return;
    fence_copies_from_global();
    const int row = first + lane(), unit = begin * C::UNITS;
    copies.copy_to_cluster(row * stride + unit, states(n), row * this->width() + unit, (end - begin) * C::UNITS,
                           arrivals(n));
  }

  static DEVICE void receive(int64_t n) { arrivals(n).wait(phase(n)); }

 private:
  DEVICE Global<T> states(int64_t n) const { return this->template buffer<T>(n); }
};

template <class C>
struct PersistentGridShares : InGroup<C, BackwardArgs, 1> {
  using T = typename C::T;
  using InGroup<C, BackwardArgs, 1>::InGroup;

  static constexpr int of_team = C::owners * 32, teams = C::threads / of_team;  // threads that collect
  static constexpr int sums_bytes = (teams - 1) * of_team * 8;

  // A block multiplies the gates' gradients of its cluster, those of two blocks at once, for its part of the states.
  static constexpr int of_units = 2 * C::UNITS;
  static constexpr int sets_of(int cluster) { return cluster / 2; }
  static constexpr int states_of(int64_t /*hidden*/, int blocks, int cluster) { return blocks / cluster * C::UNITS; }
  static constexpr int exchanged_bytes(int /*blocks*/) { return sums_bytes; }

  // [cluster, sequence, unit]
  static constexpr int64_t numbers(int blocks, int cluster) {
    return int64_t{blocks / cluster} * kMaxTile * blocks * C::UNITS;
  }

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

  // Add to a thread's gradients of states what the n-th exchange has, in which so many sequences ran. Of each cluster
  // the same block has the states of this one. All warps take part, to have as many numbers as possible on their way at
  // once: those who own states, and as many more for the same states but other clusters, who leave it their sums.
  DEVICE void collect(int64_t n, int ran, const Own<C>& mine, float (&grad_h)[2]) const {
    const int team = thread() / of_team, of_owner = thread() % of_team;
    const int sequence = of_owner / Own<C>::pairs, unit = this->rank() * C::UNITS + of_owner % Own<C>::pairs * 2;
    const int clusters = this->clusters(), from = this->rank() / clusters;
    float sum[2] = {};
    if (of_owner / 32 * (kMaxTile / C::owners) < ran) {
      for (int i = team + lane() * teams; i < clusters; i += 32 * teams)
        this->flags().wait(i * this->cluster() + from, static_cast<uint32_t>(n + 1));
      synchronize_warp();
      if (sequence < ran && unit < this->s.hidden) {
#pragma unroll 8
        for (int i = team; i < clusters; i += teams) {
          const Pair<float> share = shares(n).load_pair(place(i, sequence) + unit);
          sum[0] += first(share), sum[1] += second(share);
        }
      }
    }
    const Shared<float> sums(this->s.exchanged, sums_bytes / 4);
    if (team > 0) sums.store_pair((thread() - of_team) * 2, pair(sum[0], sum[1]));
    synchronize();  // after which the block may push what lets others overwrite what it has read
    if (!mine.any || mine.sequence >= ran || mine.there == 0) return;
    grad_h[0] += sum[0], grad_h[1] += sum[1];
#pragma unroll
    for (int i = 0; i < teams - 1; i++) {
      const Pair<float> others = sums.load_pair((i * of_team + thread()) * 2);
      grad_h[0] += first(others), grad_h[1] += second(others);
    }
  }

  // To all blocks of the cluster; all lanes of a warp take part.
  DEVICE void give(Shared<T> gradients, int stride, const Own<C>& mine, const float (&grad)[2][4], bool runs,
                   int64_t n) const {
    if (!mine.any) return;
    constexpr int together = 16 / sizeof(T);
    const int set = this->peer() / 2, at = this->peer() % 2 * C::UNITS + mine.at / together * together;
#pragma unroll
    for (int gate = 0; gate < C::G; gate++) {
      const Vec16 words = gather(C::Product::factors(grad[0][gate], grad[1][gate]));
      if (runs)
        push_to_all(gradients, mine.sequence * stride + (set * C::G + gate) * of_units + at, words, this->peer(),
                    this->cluster(), arrivals(n));
    }
  }

  static DEVICE void receive(int64_t n) { arrivals(n).wait(phase(n)); }

  // 16 units of the block's part.
  DEVICE void share(int64_t n, int unit, int running, const float (&result)[kElements]) const {
    if (unit >= states()) return;
    const int mine = place(this->number(), 0) + first_state() + unit + unit_of_lane();
#pragma unroll
    for (int s_ = 0; s_ < 2; s_++) {
      const int sequence = sequence_of_lane() + s_;
      if (sequence < running) shares(n).store_pair(mine + sequence * this->width(), pair(result[s_], result[2 + s_]));
    }
  }

  // That all shares of the block are there.
  DEVICE void announce(int64_t n) const {
    synchronize();
    if (thread() == 0) this->flags().raise(this->rank(), static_cast<uint32_t>(n + 1));
  }

 private:
  DEVICE Global<float> shares(int64_t n) const { return this->template buffer<float>(n); }
  DEVICE int place(int cluster, int sequence) const { return (cluster * kMaxTile + sequence) * this->width(); }
};

template <class C>
using PersistentGridForward = SliceForward<C, PersistentGridStates>;
template <class C>
using PersistentGridBackward = SliceBackward<C, PersistentGridShares>;

}  // namespace seqkernels::device
