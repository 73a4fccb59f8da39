// The scheduler of fibers and the checks of their accesses.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "run.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"

namespace seqkernels::host_run {

Here here;

namespace {

constexpr int kMostThreads = 1024, kWarp = 32, kMostShared = 232448;
constexpr int kStackBytes = 128 << 10, kGuardBytes = 64;
constexpr unsigned char kGuard = 0xa5;

Counts counted;
uint64_t random_state = 1;
int skipped_barrier = -1;
std::string failure;  // empty while all is well

uint64_t random_below(uint64_t n) {
  random_state += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t x = (random_state ^ random_state >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x >> 32) * n >> 32;
}

// ---- fibers

enum class State { ready, in_barrier, in_warp, finished };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;  // null: to be started
  jmp_buf at;
  State state;
  int barriers;  // that it has come to in this block
};

struct Warp {
  int arrived, first;     // lanes in the operation, and the thread that came first
  const char* operation;  // one of the constants below
  float given[kWarp], received[kWarp];
  int from[kWarp];
  float a[16][16], b[16][8], sum[16][8];
};

// What runs. Between blocks all fibers are finished: each waits to run the kernel again.
void (*kernel)(const void*);
const void* kernel_parameters;
int threads, shared_bytes;
jmp_buf home;  // where the launch goes on when no fiber can
Fiber fibers[kMostThreads];
Warp warps[kMostThreads / kWarp];
std::vector<int> ready;
int in_barrier;

// An access is told by epoch << 16 | thread. Epochs are what barriers and the begins of blocks separate; they grow as
// long as the program runs, so that shadows of old blocks need no clearing.
constexpr uint64_t kSeveral = 0xffff;  // instead of a thread
uint64_t epoch, now, block_begin, launch_begin;
std::map<uint64_t, std::pair<int64_t, int>> begun;  // the blocks of this launch by their first epoch

[[noreturn]] void go_home() { _longjmp(home, 1); }

[[noreturn]] void run_next() {
  if (ready.empty()) go_home();
  std::swap(ready[random_below(ready.size())], ready.back());
  here.thread = ready.back();
  ready.pop_back();
  now = epoch << 16 | here.thread;
  counted.switches++;
  _longjmp(fibers[here.thread].at, 1);
}

void wait(State state) {
  Fiber& fiber = fibers[here.thread];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) run_next();
}

std::string block_name(int64_t x, int y) { return "block (" + std::to_string(x) + ", " + std::to_string(y) + ")"; }

std::string name(uint64_t access) {
  const uint64_t thread = access & kSeveral;
  const auto [x, y] = std::prev(begun.upper_bound(access >> 16))->second;
  return (thread == kSeveral ? "several threads" : "thread " + std::to_string(thread)) + " of " + block_name(x, y);
}

void fiber_main() {
  for (;;) {
    wait(State::finished);
    kernel(kernel_parameters);
    const unsigned char* stack = fibers[here.thread].stack.get();
    if (!std::all_of(stack, stack + kGuardBytes, [](unsigned char byte) { return byte == kGuard; })) {
      failure = "stack overflow: " + name(now);
      go_home();
    }
  }
}

void start(int thread) {
  // Of different sizes, since tops at the same place of their pages would compete for the same few sets of the caches.
  const int bytes = kStackBytes + thread % 32 * 128;
  fibers[thread].stack.reset(new unsigned char[bytes]);
  std::fill_n(fibers[thread].stack.get(), kGuardBytes, kGuard);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibers[thread].stack.get();
  context.uc_stack.ss_size = bytes;
  makecontext(&context, fiber_main, 0);
  here.thread = thread;
  if (_setjmp(home) == 0) setcontext(&context);
}

// ---- warps

// Wait until all lanes of the warp have come to the operation; the last one acts for all.
template <class Act>
void meet(const char* operation, Act act) {
  Warp& warp = warps[here.thread / kWarp];
  if (warp.arrived == 0) warp.operation = operation, warp.first = here.thread;
  if (warp.operation != operation) {
    failure = "divergence: " + name(now) + " came to " + operation + ", thread " + std::to_string(warp.first) +
              " of its warp to " + warp.operation;
    go_home();
  }
  if (++warp.arrived < kWarp) return wait(State::in_warp);
  warp.arrived = 0;
  act(warp);
  const int first = here.thread / kWarp * kWarp;
  for (int thread = first; thread < first + kWarp; thread++)
    if (thread != here.thread) ready.push_back(thread);
}

constexpr char kExchange[] = "exchange";

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
  static float of(uint32_t word, int i) { return wide(device::float16{static_cast<uint16_t>(word >> 16 * i)}); }
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
  const int group = here.thread % kWarp / 4, member = here.thread % 4;
  Warp& warp = warps[here.thread / kWarp];
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

struct Shadow {
  uint64_t write, read;  // the last accesses
};

// Two bytes of global memory, the smallest element, have a shadow.
constexpr uintptr_t kPage = 1024;
std::unordered_map<uintptr_t, std::array<Shadow, kPage / 2>> global_shadows;
Shadow shared_shadows[kMostShared];
alignas(16) unsigned char shared_memory[kMostShared];

// Whether an access, since the memory's begin, comes before the present one whatever the order of threads and blocks.
bool is_ordered(uint64_t access, uint64_t since) {
  return access < since || access == now || (access >= block_begin && access >> 16 != epoch);
}

template <class Place>
void check_race(Shadow& shadow, Access access, uint64_t since, Place place) {
  const bool after_write = is_ordered(shadow.write, since);
  if (!after_write || (access == Access::write && !is_ordered(shadow.read, since))) {
    failure = "race: " + name(after_write ? shadow.read : shadow.write) + (after_write ? " read and " : " wrote and ") +
              name(now) + (access == Access::write ? " wrote " : " read ") + place() + ", no barrier between them";
    go_home();
  }
  if (access == Access::write)
    shadow.write = now;
  else if (shadow.read >> 16 == epoch)
    shadow.read = shadow.read == now ? now : now | kSeveral;
  else if (shadow.read < since || shadow.read >= block_begin)  // else another block's, with which any write races
    shadow.read = now;
}

// ---- launches

void describe_deadlock() {
  failure = "deadlock in " + block_name(here.block, here.block_y) + ":";
  const char* separator = " ";
  for (const auto& [state, does] :
       {std::pair(State::finished, "finished"), std::pair(State::in_barrier, "in a barrier"),
        std::pair(State::in_warp, "in a warp's operation")}) {
    const auto is = [state = state](const Fiber& fiber) { return fiber.state == state; };
    const auto count = std::count_if(fibers, fibers + threads, is);
    if (count == 0) continue;
    const auto first = std::find_if(fibers, fibers + threads, is) - fibers;
    failure += separator + std::to_string(count) + " threads " + does + " (thread " + std::to_string(first) + ")";
    separator = ", ";
  }
}

void run_block() {
  counted.blocks++;
  block_begin = ++epoch << 16;
  begun[epoch] = {here.block, here.block_y};
  std::fill_n(shared_memory, shared_bytes, 0xff);
  in_barrier = 0;
  for (Warp& warp : warps) warp.arrived = 0;
  ready.clear();
  for (int thread = 0; thread < threads; thread++)
    if (!fibers[thread].stack) start(thread);
  for (int thread = 0; thread < threads; thread++) {
    fibers[thread].barriers = 0;
    ready.push_back(thread);
  }
  if (_setjmp(home) == 0) run_next();
  const auto is_finished = [](const Fiber& fiber) { return fiber.state == State::finished; };
  if (failure.empty() && !std::all_of(fibers, fibers + threads, is_finished)) describe_deadlock();
}

}  // namespace

void check_global(const void* data, int64_t count, int element_bytes, int64_t i, Access access) {
  const auto place = [&] {
    return "element " + std::to_string(i) + " of an array of " + std::to_string(data ? count : 0) + " in global memory";
  };
  if (!data || i < 0 || i >= count) {
    failure = "out of bounds: " + name(now) + (access == Access::write ? " wrote " : " read ") + place();
    go_home();
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(data) + i * element_bytes;
  check_race(global_shadows[at / kPage][at % kPage / 2], access, launch_begin, place);
}

void check_pair(const void* at, int element_bytes) {
  if (!at || reinterpret_cast<uintptr_t>(at) % (2 * element_bytes) == 0) return;  // null: check_global says so
  failure = "misaligned: " + name(now) + " came to a pair of elements of " + std::to_string(element_bytes) +
            " bytes each in global memory";
  go_home();
}

unsigned char* check_shared(int begin, int64_t size, int64_t offset, int bytes, Access access) {
  const int64_t at = begin + offset;
  const bool inside = offset >= 0 && offset + bytes <= size && at >= 0 && at + bytes <= shared_bytes;
  if (!inside || at % bytes) {
    failure = (inside ? "misaligned: " : "out of bounds: ") + name(now) +
              (access == Access::write ? " wrote " : " read ") + std::to_string(bytes) + " bytes from byte " +
              std::to_string(at) + " of shared memory on, in an array from byte " + std::to_string(begin) + " to " +
              std::to_string(begin + size);
    go_home();
  }
  for (int64_t byte = at; byte < at + bytes; byte++) {
    const auto place = [&] { return "byte " + std::to_string(byte) + " of shared memory"; };
    if (access == Access::read && shared_shadows[byte].write < block_begin) {
      failure = "unwritten: " + name(now) + " read " + place();
      go_home();
    }
    check_race(shared_shadows[byte], access, block_begin, place);
  }
  return shared_memory + at;
}

const char* launch(int64_t blocks, int blocks_y, int threads_, int shared_bytes_, void (*kernel_)(const void*),
                   const void* parameters) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  counted.launches++, counted.shared_bytes += shared_bytes_;
  failure.clear();
  kernel = kernel_, kernel_parameters = parameters, threads = threads_, shared_bytes = shared_bytes_;
  if (blocks < 1 || blocks > INT32_MAX || blocks_y < 1 || blocks_y > 65535 || threads < 1 || threads > kMostThreads)
    failure = "no such grid: " + std::to_string(blocks) + " by " + std::to_string(blocks_y) + " blocks of " +
              std::to_string(threads) + " threads";
  else if (shared_bytes < 0 || shared_bytes > kMostShared)
    failure = "no such block: " + std::to_string(shared_bytes) + " bytes of shared memory";
  if (!failure.empty()) return failure.c_str();

  launch_begin = (epoch + 1) << 16;
  begun.clear();
  global_shadows.clear();
  std::vector<int64_t> left(blocks * blocks_y);
  std::iota(left.begin(), left.end(), 0);
  for (; !left.empty() && failure.empty(); left.pop_back()) {
    std::swap(left[random_below(left.size())], left.back());
    here.block = left.back() % blocks;
    here.block_y = static_cast<int>(left.back() / blocks);
    run_block();
  }
  if (failure.empty()) return nullptr;
  for (Fiber& fiber : fibers) fiber.stack.reset();  // they were left in the middle of the kernel
  return failure.c_str();
}

void seed(uint64_t seed) { random_state = seed; }
void skip_barrier(int n) { skipped_barrier = n; }
Counts counts() { return counted; }

}  // namespace seqkernels::host_run

namespace seqkernels::device {
using namespace host_run;

void synchronize() {
  if (fibers[thread()].barriers++ == skipped_barrier) return;
  if (++in_barrier < threads) return wait(State::in_barrier);
  in_barrier = 0;
  counted.barriers++;
  epoch++;
  ready.resize(threads);
  std::iota(ready.begin(), ready.end(), 0);
  wait(State::ready);
}

float exchange(float value, int mask) {
  const int lane = thread() % kWarp;
  Warp& warp = warps[thread() / kWarp];
  warp.given[lane] = value, warp.from[lane] = (lane ^ mask) % kWarp;
  meet(kExchange, [](Warp& warp) {
    for (int lane = 0; lane < kWarp; lane++) warp.received[lane] = warp.given[warp.from[lane]];
  });
  return warp.received[lane];
}

void multiply(bfloat16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  host_run::multiply<bfloat16>(sum, a, {b_0, b_1});
}
void multiply(float16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  host_run::multiply<float16>(sum, a, {b_0, b_1});
}
void multiply(float, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1) {
  host_run::multiply<float>(sum, a, {b_0, b_1});
}

}  // namespace seqkernels::device
