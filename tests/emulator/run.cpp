// The scheduler of fibers and the checks of their accesses.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "run.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "launch.h"

namespace seqkernels::emulator {

Here here;
bool sizes_on_gpu = false;
int multiprocessors = 132;
int shared_memory = 232448;

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxShared = 232448, kMaxCluster = 16;
constexpr int kMaxMbarriers = 4;  // of a block
constexpr int kStackBytes = 128 << 10, kGuardBytes = 64;
constexpr unsigned char kGuard = 0xa5;

Counts counted;
uint64_t random_state = 1;
Fault planted = Fault::none;
int planted_at;
std::string failure;  // empty while all is well

uint64_t random_below(uint64_t n) {
  random_state += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t x = (random_state ^ random_state >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x >> 32) * n >> 32;
}

// ---- what comes before what. A thread's time goes on with everything that others may wait for. Of every other thread
// it knows a time: what that one did until then comes before whatever it does itself from now on. Pushes are done by
// actors of their own, one for every mbarrier, whose times are the mbarrier's phases.

uint64_t latest;  // of all times; grows as long as the program runs, so that shadows of old blocks need no clearing

struct Clock {
  std::vector<uint64_t> of;        // [actors]
  std::vector<uint64_t> of_block;  // the least of a block's threads
};
using Known = std::shared_ptr<const Clock>;

Known clock_of(std::vector<uint64_t> of);
int actors();

// What a barrier, a phase or a flag passes on: what those that come to it know and have done.
class Gathering {
 public:
  // What `known` says (null: nothing), and what the actor has done until a time.
  void bring(const Known& known, int actor, uint64_t time) {
    of_.resize(actors());
    if (known && std::find(joined_.begin(), joined_.end(), known) == joined_.end()) {
      for (size_t i = 0; i < of_.size(); i++) of_[i] = std::max(of_[i], known->of[i]);
      joined_.push_back(known);
    }
    of_[actor] = std::max(of_[actor], time);
  }

  // All that these actors have done, since none of them goes on before the gathering closes.
  void bring_all(int begin, int end) { std::fill(of_.begin() + begin, of_.begin() + end, latest); }

  void close() {
    closed_ = clock_of(std::move(of_));
    of_.clear(), joined_.clear(), passed_.clear();
  }

  // What `known` becomes for one who comes after.
  const Known& pass(const Known& known) {
    if (!closed_) return known;
    for (const auto& [before, after] : passed_)
      if (before == known) return after;
    std::vector<uint64_t> of = closed_->of;
    for (size_t i = 0; i < of.size(); i++) of[i] = std::max(of[i], known->of[i]);
    passed_.emplace_back(known, of == closed_->of ? closed_ : clock_of(std::move(of)));
    return passed_.back().second;
  }

 private:
  std::vector<uint64_t> of_;
  std::vector<Known> joined_;
  Known closed_;
  std::deque<std::pair<Known, Known>> passed_;
};

// ---- fibers

enum class State { ready, in_barrier, in_cluster, in_phase, in_flag, in_warp, finished };

struct Block;

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;  // null: to be started
  jmp_buf at;
  State state;
  Here place;
  Block* block;
  int index;  // among all that run
  uint64_t time;
  Known known;
  int64_t clusters;       // barriers of the cluster that it has arrived at
  bool skips_cluster;     // the last of them, by a planted fault
  uint64_t fenced;        // when it let copies to shared memory come after its stores
  Known known_to_copies;  // from global memory: what it knew then
  std::array<int, int(Fault::count)> events;
};

struct Warp {
  int arrived, first;     // lanes in the operation, and the thread that came first
  const char* operation;  // one of the constants below
  float sent[kWarp], received[kWarp];
  int from[kWarp];
  float a[16][16], b[16][8], sum[16][8];
  Gathering barrier;
};

// An access is told by time << kActorBits | actor: a thread, a push, several threads of a block, or those of several.
using Stamp = uint64_t;
constexpr int kActorBits = 20;
constexpr Stamp kActors = (1 << kActorBits) - 1, kBlock = 1 << 19, kSeveralBlocks = kActors;
constexpr uint64_t kUnderWay = ~uint64_t{0} >> kActorBits;  // the time of a push that has not arrived

// Two bytes of memory, the smallest element, have a shadow.
struct Shadow {
  Stamp write, read;  // the last accesses
};

struct Phases {
  int byte, actor;
  Stamp init;
  int64_t ended;        // phases
  bool expected;        // whether the number of bytes has been said
  int64_t bytes;        // that are still to come
  int64_t under_way;    // pushes
  uint64_t time, last;  // of this phase; of the last that a push arrived in
  Gathering gathering;
  std::vector<int> waiting;
};

struct Block {
  int64_t x;
  int y, rank;
  int in_barrier, finished;
  uint64_t time;  // of the last barrier
  Gathering barrier;
  std::map<int, Phases> mbarriers;  // by their byte
  std::vector<Shadow> shadows;
  std::unique_ptr<unsigned char[]> memory;  // at a multiple of 16
};

struct Push {
  Block* to;
  Phases* phases;
  int at;
  std::array<unsigned char, 16> words;
  const unsigned char* from;  // if it is a part of a copy
  Known known;
  int actor;
  uint64_t time;
};

struct Flag {
  Gathering gathering;
  std::vector<int> waiting;
};

// What runs. Between groups of blocks all fibers are finished: each waits to run the kernel again.
void (*kernel)(const void*);
const void* kernel_parameters;
int threads, shared_bytes, blocks, cluster_blocks;  // of a block, and blocks that run at the same time, in clusters
jmp_buf home;                                       // where the launch goes on when no fiber can
std::deque<Fiber> fibers;
std::deque<Warp> warps;
std::deque<Block> running;
Fiber* mine;
std::vector<int> ready;
std::vector<Push> pushes;
std::unordered_map<const void*, Flag> flags;
struct Cluster {
  int64_t arrived, ended;  // threads at the barrier; barriers
  Gathering gathering;
  std::vector<int> waiting;
};
std::deque<Cluster> clusters;
Cluster& cluster_of(const Block& block) { return clusters[block.rank / cluster_blocks]; }
Block& peer_of(const Block& block, int peer) { return running[block.rank / cluster_blocks * cluster_blocks + peer]; }

Stamp now;
uint64_t group_begin, launch_begin;
struct Group {
  int64_t x, width;
  int y;
};
std::map<uint64_t, Group> begun;  // of this launch, by their first time

int actors() { return blocks * (threads + kMaxMbarriers); }

Known clock_of(std::vector<uint64_t> of) {
  auto clock = std::make_shared<Clock>();
  for (int block = 0; block < blocks; block++)
    clock->of_block.push_back(*std::min_element(of.begin() + block * threads, of.begin() + (block + 1) * threads));
  clock->of = std::move(of);
  return clock;
}

void set_time(uint64_t time) {
  mine->time = time;
  now = mine->time << kActorBits | mine->index;
}

[[noreturn]] void go_home() { _longjmp(home, 1); }

[[noreturn]] void fail(std::string what) {
  failure = std::move(what);
  go_home();
}

void arrive(Push push);

[[noreturn]] void run_next() {
  for (;;) {
    if (ready.empty() && pushes.empty()) go_home();
    const uint64_t which = random_below(ready.size() + pushes.size());
    if (which < ready.size()) {
      std::swap(ready[which], ready.back());
      break;
    }
    std::swap(pushes[which - ready.size()], pushes.back());
    Push push = std::move(pushes.back());
    pushes.pop_back();
    arrive(std::move(push));
  }
  mine = &fibers[ready.back()];
  ready.pop_back();
  here = mine->place;
  now = mine->time << kActorBits | mine->index;
  counted.switches++;
  _longjmp(mine->at, 1);
}

void wait(State state) {
  mine->state = state;
  if (_setjmp(mine->at) == 0) run_next();
}

void wait_among(std::vector<int>& waiting, State state) {
  waiting.push_back(mine->index);
  wait(state);
}

void wake(std::vector<int>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// Count an event of the fiber; whether it is the one to go wrong.
bool goes_wrong(Fault fault) { return mine->events[int(fault)]++ == planted_at && planted == fault; }

std::string block_name(int64_t x, int y) { return "block (" + std::to_string(x) + ", " + std::to_string(y) + ")"; }
std::string name(const Block& block) { return block_name(block.x, block.y); }
std::string name(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.place.thread) + " of " + name(*fiber.block);
}
std::string name(const Phases& phases, const Block& block) {
  return "the mbarrier at byte " + std::to_string(phases.byte) + " of " + name(block);
}

std::string name(Stamp access) {
  const auto& group = std::prev(begun.upper_bound(access >> kActorBits))->second;
  const auto block = [&](int rank) {
    return block_name(group.x + rank % group.width, static_cast<int>(group.y + rank / group.width));
  };
  int actor = static_cast<int>(access & kActors);
  if (Stamp(actor) == kSeveralBlocks) return "threads of several blocks";
  if (Stamp(actor) >= kBlock) return "several threads of " + block(actor - int(kBlock));
  if (actor < blocks * threads) return "thread " + std::to_string(actor % threads) + " of " + block(actor / threads);
  return "a push to " + block((actor - blocks * threads) / kMaxMbarriers);
}

void end_block(const Block& block);

void fiber_main() {
  for (;;) {
    wait(State::finished);
    kernel(kernel_parameters);
    const unsigned char* stack = mine->stack.get();
    if (!std::all_of(stack, stack + kGuardBytes, [](unsigned char byte) { return byte == kGuard; }))
      fail("stack overflow: " + name(now));
    if (++mine->block->finished == threads) end_block(*mine->block);
  }
}

void start(int index) {
  // Of different sizes, since tops at the same place of their pages would compete for the same few sets of the caches.
  const int bytes = kStackBytes + index % 32 * 128;
  mine = &fibers[index];
  mine->stack.reset(new unsigned char[bytes]);
  std::fill_n(mine->stack.get(), kGuardBytes, kGuard);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = mine->stack.get();
  context.uc_stack.ss_size = bytes;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(home) == 0) setcontext(&context);
}

// ---- warps

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

constexpr char kShuffle[] = "shfl_xor", kSynchronize[] = "synchronize_warp";

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

// ---- memory

constexpr uintptr_t kPage = 1024;
std::unordered_map<uintptr_t, std::array<Shadow, kPage / 2>> global_shadows;
std::unordered_map<const Shadow*, std::map<int, Stamp>> readers;  // where they are of several blocks, by block
std::unordered_map<const Shadow*, std::vector<Stamp>> copiers;    // of global memory, besides

Shadow& shadow_of(const void* global) {
  const auto at = reinterpret_cast<uintptr_t>(global);
  return global_shadows[at / kPage][at % kPage / 2];
}

// Until when the present thread knows of what a thread has done.
uint64_t time_known_of(Stamp thread) { return thread == Stamp(mine->index) ? mine->time : mine->known->of[thread]; }

// Whether an access, since the memory's begin, comes before the present one whatever the order of threads and blocks.
bool is_ordered(Stamp access, uint64_t since) {
  const uint64_t time = access >> kActorBits, actor = access & kActors;
  if (time < since || actor == Stamp(mine->index)) return true;
  if (time < group_begin) return false;
  return time <= (actor < kBlock ? mine->known->of[actor] : mine->known->of_block[actor - kBlock]);
}

bool is_read_ordered(const Shadow& shadow, uint64_t since) {
  if ((shadow.read & kActors) != kSeveralBlocks) return is_ordered(shadow.read, since);
  const auto& all = readers[&shadow];
  return std::all_of(all.begin(), all.end(), [&](const auto& read) { return is_ordered(read.second, since); });
}

// A copy that reads the same and that the present access does not come after; 0: there is none.
Stamp unordered_copy(const Shadow& shadow, uint64_t since) {
  const auto found = copiers.find(&shadow);
  if (found == copiers.end()) return 0;
  for (const Stamp copy : found->second)
    if (!is_ordered(copy, since)) return copy;
  return 0;
}

// An access by several threads of a block counts as one of all of its threads.
void add_read(Shadow& shadow) {
  const auto merged = [](Stamp one, int block) {
    return std::max(one, now) >> kActorBits << kActorBits | (kBlock + block);
  };
  const int block = mine->block->rank;
  const auto block_of = [](Stamp read) {
    const Stamp actor = read & kActors;
    return int(actor < kBlock ? actor / threads : actor - kBlock);
  };
  if ((shadow.read & kActors) != kSeveralBlocks) {
    if (block_of(shadow.read) == block) {
      shadow.read = merged(shadow.read, block);
      return;
    }
    readers[&shadow] = {{block_of(shadow.read), shadow.read}};
    shadow.read = now | kSeveralBlocks;
  }
  Stamp& read = readers[&shadow][block];
  read = read == 0 || is_ordered(read, group_begin) ? now : merged(read, block);
}

template <class Place>
void check_race(Shadow& shadow, Access access, uint64_t since, Place place) {
  const bool after_write = is_ordered(shadow.write, since);
  const Stamp copy = access == Access::write ? unordered_copy(shadow, since) : 0;
  if (!after_write || copy || (access == Access::write && !is_read_ordered(shadow, since)))
    fail("race: " +
         name(!after_write ? shadow.write
              : copy       ? copy
                           : shadow.read) +
         (after_write ? " read and " : " wrote and ") + name(now) + (access == Access::write ? " wrote " : " read ") +
         place() + ", nothing orders them");
  if (access == Access::write)
    shadow.write = now, copiers.erase(&shadow);
  else if (is_read_ordered(shadow, since))
    shadow.read = now;
  else if (shadow.read >> kActorBits >= group_begin)  // else another group's, with which any write races
    add_read(shadow);
}

int at_in(const Block& block, int begin, int64_t size, int64_t offset, int bytes, const char* does) {
  const int64_t at = begin + offset;
  const bool inside = offset >= 0 && offset + bytes <= size && at >= 0 && at + bytes <= shared_bytes;
  if (!inside || at % bytes)
    fail((inside ? "misaligned: " : "out of bounds: ") + name(now) + does + std::to_string(bytes) +
         " bytes from byte " + std::to_string(at) + " of the shared memory of " + name(block) +
         " on, in an array from byte " + std::to_string(begin) + " to " + std::to_string(begin + size));
  return static_cast<int>(at);
}

std::string place_in(const Block& block, int byte) {
  return "byte " + std::to_string(byte) + " of the shared memory of " + name(block);
}

// ---- pushes and phases

Phases& phases_of(Block& block, int byte, const char* does) {
  const auto found = block.mbarriers.find(byte);
  if (found == block.mbarriers.end() || !is_ordered(found->second.init, group_begin))
    fail(std::string("no mbarrier: ") + name(now) + does + "byte " + std::to_string(byte) + " of " + name(block) +
         ", which nobody has initialised before");
  return found->second;
}

void end_phase(Phases& phases, const Block& block) {
  if (!phases.expected) return;
  if (phases.bytes < 0)
    fail("overrun: " + name(phases, block) + " has got " + std::to_string(-phases.bytes) +
         " bytes more than were expected of phase " + std::to_string(phases.ended));
  if (phases.bytes > 0) return;
  phases.gathering.bring(nullptr, phases.actor, phases.time);
  phases.gathering.close();
  phases.ended++;
  phases.expected = false;
  phases.time = ++latest;
  wake(phases.waiting);
}

void arrive(Push push) {
  for (int byte = 0; push.from && byte < 16; byte += 2)
    for (Stamp& copy : copiers[&shadow_of(push.from + byte)])
      if (copy == (kUnderWay << kActorBits | push.phases->actor))
        copy = push.phases->time << kActorBits | push.phases->actor;
  std::copy(push.words.begin(), push.words.end(), push.to->memory.get() + push.at);
  for (int half = push.at / 2; half < (push.at + 16) / 2; half++)
    push.to->shadows[half].write = push.phases->time << kActorBits | push.phases->actor;
  push.phases->gathering.bring(push.known, push.actor, push.time);
  push.phases->bytes -= 16;
  push.phases->under_way--;
  push.phases->last = push.phases->time;
  end_phase(*push.phases, *push.to);
}

// No push may come to a block that has ended: some thread of it must have waited for the last one.
void end_block(const Block& block) {
  for (const auto& [byte, phases] : block.mbarriers) {
    uint64_t known = 0;
    for (int thread = 0; thread < threads; thread++)
      known = std::max(known, fibers[block.rank * threads + thread].known->of[phases.actor]);
    if (phases.under_way || phases.last > known)
      fail("exit: " + name(block) + " ended without waiting for all that was pushed to it and counted by " +
           name(phases, block));
  }
}

// ---- launches

void describe_deadlock() {
  failure = (blocks == 1 ? "deadlock in " : "deadlock around ") + name(running[0]) + ":";
  const char* separator = " ";
  for (const auto& [state, does] :
       {std::pair(State::finished, "finished"), std::pair(State::in_barrier, "in a barrier"),
        std::pair(State::in_cluster, "in a barrier of the cluster"), std::pair(State::in_phase, "waiting for pushes"),
        std::pair(State::in_flag, "waiting for a flag"), std::pair(State::in_warp, "in a warp's operation")}) {
    const auto is = [state = state](const Fiber& fiber) { return fiber.state == state; };
    const auto end = fibers.begin() + blocks * threads;
    const auto count = std::count_if(fibers.begin(), end, is);
    if (count == 0) continue;
    failure += separator + std::to_string(count) + " threads " + does + " (" +
               name(*std::find_if(fibers.begin(), end, is)) + ")";
    separator = ", ";
  }
  for (const Block& block : running)
    for (const auto& [byte, phases] : block.mbarriers)
      if (block.rank < blocks && !phases.waiting.empty()) {
        failure += "; " + name(phases, block) + ", in phase " + std::to_string(phases.ended) +
                   (phases.expected ? ", awaits " + std::to_string(phases.bytes) + " bytes" : ", expects nothing");
        return;
      }
}

// The blocks that run at the same time: from `first` on, in rows of `grid.blocks`.
void run_group(const Grid& grid, int64_t first) {
  counted.blocks += blocks;
  group_begin = ++latest;
  begun[group_begin] = {first % grid.blocks, grid.whole_grid ? grid.blocks : blocks,
                        static_cast<int>(first / grid.blocks)};
  if (static_cast<int>(running.size()) < blocks) running.resize(blocks);
  if (static_cast<int>(fibers.size()) < blocks * threads) fibers.resize(blocks * threads);
  const int warps_here = (blocks * threads + kWarp - 1) / kWarp;
  if (static_cast<int>(warps.size()) < warps_here) warps.resize(warps_here);
  for (int warp = 0; warp < warps_here; warp++) warps[warp].arrived = 0, warps[warp].barrier = {};
  clusters.clear(), clusters.resize(blocks / cluster_blocks);
  flags.clear();
  pushes.clear();
  ready.clear();
  for (int index = 0; index < blocks * threads; index++)
    if (!fibers[index].stack) start(index);
  const Known nothing = clock_of(std::vector<uint64_t>(actors()));
  for (int rank = 0; rank < blocks; rank++) {
    Block& block = running[rank];
    block.x = (first + rank) % grid.blocks, block.y = static_cast<int>((first + rank) / grid.blocks), block.rank = rank;
    block.in_barrier = block.finished = 0;
    block.barrier = {};
    block.mbarriers.clear();
    if (!block.memory) block.memory.reset(new unsigned char[kMaxShared]);
    block.shadows.resize(std::max<size_t>(block.shadows.size(), (shared_bytes + 1) / 2));
    std::fill_n(block.memory.get(), shared_bytes, 0xff);
    for (int thread = 0; thread < threads; thread++) {
      const int index = rank * threads + thread;
      Fiber& fiber = fibers[index];
      fiber.place = {block.x, block.y, thread, rank % cluster_blocks};
      fiber.block = &block, fiber.index = index, fiber.time = group_begin, fiber.known = nothing;
      fiber.clusters = 0, fiber.skips_cluster = false;
      fiber.fenced = 0, fiber.known_to_copies = nullptr;
      fiber.events = {};
      ready.push_back(index);
    }
  }
  if (_setjmp(home) == 0) run_next();
  const auto is_finished = [](const Fiber& fiber) { return fiber.state == State::finished; };
  if (failure.empty() && !std::all_of(fibers.begin(), fibers.begin() + blocks * threads, is_finished))
    describe_deadlock();
}

}  // namespace

void check_global(const void* data, int64_t count, int element_bytes, int64_t i, Access access) {
  const auto place = [&] {
    return "element " + std::to_string(i) + " of an array of " + std::to_string(data ? count : 0) + " in global memory";
  };
  if (!data || i < 0 || i >= count)
    fail("out of bounds: " + name(now) + (access == Access::write ? " wrote " : " read ") + place());
  check_race(shadow_of(static_cast<const char*>(data) + i * element_bytes), access, launch_begin, place);
}

void check_pair(const void* at, int element_bytes) {
  if (!at || reinterpret_cast<uintptr_t>(at) % (2 * element_bytes) == 0) return;  // null: check_global says so
  failure = "misaligned: " + name(now) + " came to a pair of elements of " + std::to_string(element_bytes) +
            " bytes each in global memory";
  go_home();
}

unsigned char* check_shared(int begin, int64_t size, int64_t offset, int bytes, Access access) {
  Block& block = *mine->block;
  const int at = at_in(block, begin, size, offset, bytes, access == Access::write ? " wrote " : " read ");
  for (int byte = at; byte < at + bytes; byte += 2) {
    Shadow& shadow = block.shadows[byte / 2];
    if (access == Access::read && shadow.write >> kActorBits < group_begin)
      fail("unwritten: " + name(now) + " read " + place_in(block, byte));
    check_race(shadow, access, group_begin, [&] { return place_in(block, byte); });
  }
  return block.memory.get() + at;
}

namespace {

// Send 16 bytes on their way: `words`, or a part of a copy, `from` where it is read.
void send(int begin, int64_t size, int64_t offset, const void* words, const void* from, Block& to, int mbarrier) {
  counted.pushes++;
  const int at = at_in(to, begin, size, offset, 16, from ? " copied " : " pushed ");
  if (to.finished == threads) fail("exit: " + name(now) + " pushed to " + name(to) + ", which has ended");
  Phases& phases = phases_of(to, mbarrier, " pushed with ");
  for (int half = at / 2; half < (at + 16) / 2; half++) {
    Shadow& shadow = to.shadows[half];
    const Stamp before = shadow.write, actor = before & kActors;
    check_race(shadow, Access::write, group_begin, [&] { return place_in(to, half * 2); });
    if (from && before >> kActorBits >= group_begin && actor < Stamp(blocks * threads) &&
        (fibers[actor].fenced <= before >> kActorBits || fibers[actor].fenced > time_known_of(actor)))
      fail("no fence: " + name(before) + " wrote " + place_in(to, half * 2) + ", to which " + name(now) + " copies");
    shadow.write = kUnderWay << kActorBits | phases.actor;
  }
  for (int byte = 0; from && byte < 16; byte += 2)
    copiers[&shadow_of(static_cast<const char*>(from) + byte)].push_back(kUnderWay << kActorBits | phases.actor);
  phases.under_way++;
  pushes.push_back(
      {&to, &phases, at, {}, static_cast<const unsigned char*>(from), mine->known, mine->index, mine->time});
  std::memcpy(pushes.back().words.data(), words, 16);
}

}  // namespace

void push(int begin, int64_t size, int64_t offset, const void* words, int peer, int mbarrier) {
  if (goes_wrong(Fault::push)) return;
  if (cluster_blocks == 1) fail("no cluster: " + name(now) + " pushed, whose block has no peers");
  if (peer < 0 || peer >= cluster_blocks)
    fail("out of bounds: " + name(now) + " pushed to block " + std::to_string(peer) + " of " +
         std::to_string(cluster_blocks));
  send(begin, size, offset, words, nullptr, peer_of(*mine->block, peer), mbarrier);
  set_time(++latest);
}

void copy_to_cluster(int begin, int64_t size, int64_t offset, const void* from, int64_t bytes, int mbarrier) {
  if (goes_wrong(Fault::push)) return;
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("misaligned: " + name(now) + " copied " + std::to_string(bytes) + " bytes");
  if (!mine->known_to_copies || mine->known_to_copies != mine->known)
    fail("no fence: " + name(now) + " copied what it may have learnt of since");
  for (int peer = 0; peer < cluster_blocks; peer++)
    for (int64_t i = 0; i < bytes; i += 16) {
      const auto* words = static_cast<const unsigned char*>(from) + i;
      send(begin, size, offset + i, words, words, peer_of(*mine->block, peer), mbarrier);
    }
  set_time(++latest);
}

const char* launch(const Grid& grid, void (*kernel_)(const void*), const void* parameters) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  counted.launches++, counted.shared_bytes += grid.shared_bytes;
  failure.clear();
  kernel = kernel_, kernel_parameters = parameters, threads = grid.threads, shared_bytes = grid.shared_bytes;
  const int64_t all = grid.blocks * grid.blocks_y;
  if (grid.blocks < 1 || grid.blocks > INT32_MAX || grid.blocks_y < 1 || grid.blocks_y > 65535 || threads < 1 ||
      threads > kMaxThreads || threads % kWarp)
    failure = "no such grid: " + std::to_string(grid.blocks) + " by " + std::to_string(grid.blocks_y) + " blocks of " +
              std::to_string(threads) + " threads";
  else if (shared_bytes < 0 || shared_bytes > shared_memory)
    failure = "no such block: " + std::to_string(shared_bytes) + " bytes of shared memory";
  else if (grid.cluster < 1 || grid.cluster > kMaxCluster || grid.blocks % grid.cluster)
    failure = "no such cluster: " + std::to_string(grid.cluster) + " of " + std::to_string(grid.blocks) + " blocks";
  else if (grid.whole_grid && all > multiprocessors)
    failure = std::to_string(all) + " blocks do not run at the same time";
  if (!failure.empty()) return failure.c_str();

  blocks = static_cast<int>(grid.whole_grid ? all : grid.cluster), cluster_blocks = grid.cluster;
  launch_begin = latest + 1;
  begun.clear();
  global_shadows.clear();
  readers.clear();
  copiers.clear();
  std::vector<int64_t> left(all / blocks);
  std::iota(left.begin(), left.end(), 0);
  for (; !left.empty() && failure.empty(); left.pop_back()) {
    std::swap(left[random_below(left.size())], left.back());
    run_group(grid, left.back() * blocks);
  }
  if (failure.empty()) return nullptr;
  for (Fiber& fiber : fibers) fiber.stack.reset();  // they were left in the middle of the kernel
  running.clear();                                  // and pushes under way
  return failure.c_str();
}

void seed(uint64_t seed) { random_state = seed; }
void plant(Fault fault, int n) { planted = fault, planted_at = n; }
Counts counts() { return counted; }

}  // namespace seqkernels::emulator

namespace seqkernels::device {
using namespace emulator;

void synchronize() {
  if (goes_wrong(Fault::barrier)) return;
  Block& block = *mine->block;
  block.barrier.bring(mine->known, mine->index, mine->time);
  if (++block.in_barrier < threads) {
    wait(State::in_barrier);
  } else {
    block.in_barrier = 0;
    counted.barriers++;
    block.barrier.bring_all(block.rank * threads, (block.rank + 1) * threads);
    block.barrier.close();
    block.time = ++latest;
    for (int thread = 0; thread < threads; thread++) ready.push_back(block.rank * threads + thread);
    wait(State::ready);
  }
  mine->known = mine->block->barrier.pass(mine->known);
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
  cluster.gathering.bring(mine->known, mine->index, mine->time);
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
  set_time(++latest);
}

void fence_copies_from_global() {
  if (!goes_wrong(Fault::fence)) mine->known_to_copies = mine->known;
}

void fence_copies_to_shared() {
  if (goes_wrong(Fault::fence)) return;
  set_time(++latest);
  mine->fenced = mine->time;
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
  phases.gathering.bring(mine->known, mine->index, mine->time);
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
  set_time(++latest);
}

void Flags::raise(int64_t i, uint32_t value) const {
  if (i < 0 || i >= count_)
    fail("out of bounds: " + name(now) + " raised flag " + std::to_string(i) + " of " + std::to_string(count_));
  if (goes_wrong(Fault::flag)) return;
  Flag& flag = flags[data_ + i];
  data_[i] = value;
  flag.gathering.bring(mine->known, mine->index, mine->time);
  flag.gathering.close();
  set_time(++latest);
  wake(flag.waiting);
}

void Flags::wait(int64_t i, uint32_t value) const {
  if (i < 0 || i >= count_)
    fail("out of bounds: " + name(now) + " waited for flag " + std::to_string(i) + " of " + std::to_string(count_));
  if (goes_wrong(Fault::wait)) return;
  Flag& flag = flags[data_ + i];
  while (data_[i] < value) wait_among(flag.waiting, State::in_flag);
  mine->known = flag.gathering.pass(mine->known);
  set_time(++latest);
}

float shfl_xor(float value, int mask) {
  const int lane = mine->index % kWarp;
  Warp& warp = warps[mine->index / kWarp];
  warp.sent[lane] = value, warp.from[lane] = (lane ^ mask) % kWarp;
  meet(kShuffle, [](Warp& warp) {
    for (int lane = 0; lane < kWarp; lane++) warp.received[lane] = warp.sent[warp.from[lane]];
  });
  return warp.received[lane];
}

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
