// The threads of a launch as fibers, which take their steps in random order.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "launch.h"
#include "state.h"

namespace seqkernels::emulator {

Here here;
bool sizes_on_gpu = false;
int multiprocessors = 132;
int shared_memory = 232448;

uint64_t latest;
Counts counted;
uint64_t random_state = 1;
Fault planted = Fault::none;
int planted_at, host_events;
std::string failure;

void (*kernel)(const void*);
const void* kernel_parameters;
int threads, shared_bytes, blocks, cluster_blocks;
jmp_buf home;
std::deque<Fiber> fibers;
std::deque<Warp> warps;
std::deque<Block> running;
Fiber* mine;
std::vector<int> ready;
std::vector<Push> pushes;
std::deque<Cluster> clusters;

Stamp now;
uint64_t group_begin, launch_begin;
std::map<uint64_t, Group> begun;

uint64_t random_below(uint64_t n) {
  random_state += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t x = (random_state ^ random_state >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x >> 32) * n >> 32;
}

int actors() { return blocks * (threads + kMaxMbarriers); }

Known clock_of(std::vector<uint64_t> of) {
  auto clock = std::make_shared<Clock>();
  for (int block = 0; block < blocks; block++)
    clock->of_block.push_back(*std::min_element(of.begin() + block * threads, of.begin() + (block + 1) * threads));
  clock->of = std::move(of);
  return clock;
}

Seen joined(const Seen& one, const Seen& other) {
  if (!one || !other || one == other) return one ? one : other;
  auto all = std::make_shared<std::vector<uint64_t>>(*one);
  for (size_t i = 0; i < all->size(); i++) all->at(i) = std::max(one->at(i), other->at(i));
  return all;
}

void set_time(uint64_t time) {
  mine->time = time;
  now = mine->time << kActorBits | mine->index;
}

[[noreturn]] static void go_home() { _longjmp(home, 1); }

void fail(std::string what) {
  failure = std::move(what);
  go_home();
}

[[noreturn]] static void run_next() {
  for (;;) {
    const size_t sent = sent_vectors(), all = ready.size() + pushes.size() + sent;
    if (all == 0 && arrive_late_half()) continue;
    if (all == 0) go_home();
    const uint64_t which = random_below(all);
    if (which < ready.size()) {
      std::swap(ready[which], ready.back());
      break;
    }
    if (which < ready.size() + sent) {
      arrive(which - ready.size());
      continue;
    }
    std::swap(pushes[which - ready.size() - sent], pushes.back());
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

bool goes_wrong(Fault fault) { return mine->events[int(fault)]++ == planted_at && planted == fault; }

static void fiber_main() {
  for (;;) {
    wait(State::finished);
    kernel(kernel_parameters);
    const unsigned char* stack = mine->stack.get();
    if (!std::all_of(stack, stack + kGuardBytes, [](unsigned char byte) { return byte == kGuard; }))
      fail("stack overflow: " + name(now));
    if (++mine->block->finished == threads) end_block(*mine->block);
  }
}

static void start(int index) {
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

// The blocks that run at the same time: from `first` on, in rows of `grid.blocks`.
static void run_group(const Grid& grid, int64_t first) {
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
  pushes.clear();
  ready.clear();
  for (int index = 0; index < blocks * threads; index++)
    if (!fibers[index].stack) start(index);
  const Known nothing = clock_of(std::vector<uint64_t>(actors()));
  const Seen nobody = std::make_shared<std::vector<uint64_t>>(blocks);
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
      fiber.seen = nobody;
      fiber.events = {};
      ready.push_back(index);
    }
  }
  if (_setjmp(home) == 0) run_next();
  const auto is_finished = [](const Fiber& fiber) { return fiber.state == State::finished; };
  if (failure.empty() && !std::all_of(fibers.begin(), fibers.begin() + blocks * threads, is_finished))
    describe_deadlock();
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
  else if (goes_wrong_on_host(Fault::launch))
    failure = "the launch that was to fail";
  if (!failure.empty()) return failure.c_str();

  blocks = static_cast<int>(grid.whole_grid ? all : grid.cluster), cluster_blocks = grid.cluster;
  launch_begin = latest + 1;
  begun.clear();
  global_shadows.clear();
  readers.clear();
  forget_vectors();
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
void plant(Fault fault, int n) { planted = fault, planted_at = n, host_events = 0; }
bool goes_wrong_on_host(Fault fault) { return planted == fault && host_events++ == planted_at; }

}  // namespace seqkernels::emulator
