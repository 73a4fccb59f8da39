// The operations of device.h: barriers, warps and mbarriers.
#include "device.h"

#include "state.h"

namespace seqkernels::emulator {
namespace {

// Wait until all lanes of the warp have come to the operation; the last one acts for all.
template <class Act>
void meet(const char* operation, Act act) {
  Warp& warp = warps[mine->index / kWarp];
  if (warp.arrived == 0) warp.operation = operation, warp.first = mine->index;
  if (warp.operation != operation) {
    fail("divergence: " + name(now) + " came to " + operation + ", " + name(fibers[warp.first]) + ", of its warp, to " +
         warp.operation);
  }
  if (++warp.arrived < kWarp) return wait(State::in_warp);
  warp.arrived = 0;
  act(warp);
  const int first = mine->index / kWarp * kWarp;
  for (int index = first; index < first + kWarp; index++)
    if (index != mine->index) ready.push_back(index);
}

constexpr char kShuffle[] = "a shuffle", kSynchronize[] = "synchronize_warp";

// The value of a lane.
uint32_t received(uint32_t value, int from) {
  const int lane = mine->index % kWarp;
  Warp& warp = warps[mine->index / kWarp];
  warp.sent[lane] = value, warp.from[lane] = from % kWarp;
  meet(kShuffle, [](Warp& warp) {
    for (int lane = 0; lane < kWarp; lane++) warp.received[lane] = warp.sent[warp.from[lane]];
  });
  return warp.received[lane];
}

template <class T>
struct Factor;
template <>
struct Factor<device::bfloat16> {
  static constexpr char operation[] = "multiply of bfloat16";
  static constexpr int per_word = 2;
  static float of(uint32_t word, int i) { return device::from_bits(i ? word & 0xffff0000 : word << 16); }
};
template <>
struct Factor<device::float16> {
  static constexpr char operation[] = "multiply of float16";
  static constexpr int per_word = 2;
  static float of(uint32_t word, int i) { return to_acc(device::float16{static_cast<uint16_t>(word >> 16 * i)}); }
};
template <>
struct Factor<float> {
  static constexpr char operation[] = "multiply of TF32";
  static constexpr int per_word = 1;
  static float of(uint32_t word, int) { return device::from_bits(word & ~0x1fffu); }
};

// The fragments of mma.m16n8k16 and mma.m16n8k8, whose 4 bytes are at the same places.
template <class T>
void multiply(float (&sum)[4], const uint32_t* a, const uint32_t (&b)[2]) {
  constexpr int N = Factor<T>::per_word;
  const int group = mine->index % kWarp / 4, member = mine->index % 4;
  Warp& warp = warps[mine->index / kWarp];
  const auto sum_of = [&](int i) -> float& { return warp.sum[group + i / 2 * 8][member * 2 + i % 2]; };
  for (int i = 0; i < N; i++) {
    for (int word = 0; word < 4; word++)
      warp.a[group + word % 2 * 8][(member + word / 2 * 4) * N + i] = Factor<T>::of(a[word], i);
    for (int word = 0; word < 2; word++) warp.b[(member + word * 4) * N + i][group] = Factor<T>::of(b[word], i);
  }
  for (int i = 0; i < 4; i++) sum_of(i) = sum[i];
  meet(Factor<T>::operation, [](Warp& warp) {
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 8 * N; k++)
        for (int column = 0; column < 8; column++) warp.sum[row][column] += warp.a[row][k] * warp.b[k][column];
  });
  for (int i = 0; i < 4; i++) sum[i] = sum_of(i);
}

}  // namespace
}  // namespace seqkernels::emulator

namespace seqkernels::device {
using namespace emulator;

void synchronize() {
  if (goes_wrong(Fault::barrier)) return;
  Block& block = *mine->block;
  block.barrier.bring(mine->known, mine->index, mine->time, mine->seen);
  if (++block.in_barrier < threads) {
    wait(State::in_barrier);
  } else {
    block.in_barrier = 0;
    counted.barriers++;
    block.barrier.bring_all(block.rank * threads, (block.rank + 1) * threads);
    block.time = ++latest;
    block.barrier.close();
    block.seen = std::make_shared<std::vector<uint64_t>>(*block.barrier.seen());
    block.seen->at(block.rank) = block.time;
    for (int thread = 0; thread < threads; thread++) ready.push_back(block.rank * threads + thread);
    wait(State::ready);
  }
  mine->known = mine->block->barrier.pass(mine->known);
  mine->seen = mine->block->seen;
  set_time(mine->block->time);
}

void synchronize_warp() {
  if (goes_wrong(Fault::warp_barrier)) return;
  Warp& warp = warps[mine->index / kWarp];
  warp.barrier.bring(mine->known, mine->index, mine->time);
  meet(kSynchronize, [](Warp& warp) { warp.barrier.close(); });
  mine->known = warp.barrier.pass(mine->known);
  set_time(++latest);
}

int cluster_size() { return cluster_blocks; }

void cluster_arrive() {
  mine->skips_cluster = goes_wrong(Fault::cluster_barrier);
  if (mine->skips_cluster) return;
  Cluster& cluster = cluster_of(*mine->block);
  if (mine->clusters > cluster.ended) fail("divergence: " + name(now) + " arrived twice at a barrier of the cluster");
  mine->clusters++;
  cluster.gathering.bring(mine->known, mine->index, mine->time, mine->seen);
  set_time(++latest);
  if (++cluster.arrived < cluster_blocks * threads) return;
  cluster.arrived = 0;
  cluster.ended++;
  cluster.gathering.close();
  wake(cluster.waiting);
}

void cluster_wait() {
  if (mine->skips_cluster) return;
  Cluster& cluster = cluster_of(*mine->block);
  while (mine->clusters > cluster.ended) wait_among(cluster.waiting, State::in_cluster);
  mine->known = cluster.gathering.pass(mine->known);
  mine->seen = joined(mine->seen, cluster.gathering.seen());
  set_time(++latest);
}

void Mbarrier::init() const {
  Block& block = *mine->block;
  const int at = at_in(block, byte_, 8, 0, 8, " initialised ");
  if (block.mbarriers.size() == kMaxMbarriers) fail("too many mbarriers: " + name(now) + " initialised one more");
  for (int half = at / 2; half < (at + 8) / 2; half++)
    check_race(block.shadows[half], Access::write, group_begin, [&] { return place_in(block, half * 2); });
  const int actor = blocks * threads + block.rank * kMaxMbarriers + static_cast<int>(block.mbarriers.size());
  Phases& phases = block.mbarriers[at];
  if (phases.init) fail("divergence: " + name(now) + " initialised " + name(phases, block) + " again");
  phases.byte = at, phases.actor = actor, phases.init = now, phases.time = ++latest;
}

void Mbarrier::expect(int bytes) const {
  Block& block = *mine->block;
  Phases& phases = phases_of(block, byte_, " expected bytes at ");
  if (phases.expected)
    fail("overrun: " + name(now) + " said twice in a phase what " + name(phases, block) + " expects");
  phases.expected = true;
  phases.bytes += bytes + (goes_wrong(Fault::more_bytes) ? 16 : goes_wrong(Fault::fewer_bytes) ? -16 : 0);
  phases.gathering.bring(mine->known, mine->index, mine->time, mine->seen);
  set_time(++latest);
  end_phase(phases, block);
}

void Mbarrier::wait(int parity) const {
  counted.waits++;
  Phases& phases = phases_of(*mine->block, byte_, " waited at ");
  if (goes_wrong(Fault::wait)) return;
  if (goes_wrong(Fault::parity)) parity = 1 - parity;
  while (phases.ended % 2 == parity) wait_among(phases.waiting, State::in_phase);
  mine->known = phases.gathering.pass(mine->known);
  mine->seen = joined(mine->seen, phases.gathering.seen());
  set_time(++latest);
}

uint32_t shfl(uint32_t value, int lane) { return received(value, lane); }

float shfl_xor(float value, int mask) { return from_bits(received(bits(value), mine->index % kWarp ^ mask)); }

void multiply(bfloat16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  emulator::multiply<bfloat16>(sum, a, {b_0, b_1});
}
void multiply(float16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  emulator::multiply<float16>(sum, a, {b_0, b_1});
}
void multiply(float, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  emulator::multiply<float>(sum, a, {b_0, b_1});
}

}  // namespace seqkernels::device
