// What the parts of the emulator share: what runs, what each thread knows of the others, and what can be called.
#pragma once
#include <setjmp.h>

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"
#include "order.h"
#include "run.h"

namespace seqkernels::emulator {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxShared = 232448, kMaxCluster = 16;
constexpr int kMaxMbarriers = 4;  // of a block
constexpr int kStackBytes = 128 << 10, kGuardBytes = 64;
constexpr unsigned char kGuard = 0xa5;

// ---- what runs

enum class State { ready, in_barrier, in_cluster, in_phase, in_tag, in_warp, finished };

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
  int64_t clusters;    // barriers of the cluster that it has arrived at
  bool skips_cluster;  // the last of them, by a planted fault
  Seen seen;
  std::array<int, int(Fault::count)> events;
};

struct Warp {
  int arrived, first;     // lanes in the operation, and the thread that came first
  const char* operation;  // its name
  uint32_t sent[kWarp], received[kWarp];
  int from[kWarp];
  float a[16][16], b[16][8], sum[16][8];
  Gathering barrier;
};

// An access is stored as time << kActorBits | actor. An actor is a thread, a push, several threads of a block, or
// threads of several blocks.
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
  uint64_t time;                                // of the last barrier
  std::shared_ptr<std::vector<uint64_t>> seen;  // by it
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
  Known known;
  Seen seen;
  int actor;
  uint64_t time;
};

struct Cluster {
  int64_t arrived, ended;  // threads at the barrier; barriers
  Gathering gathering;
  std::vector<int> waiting;
};

struct Group {
  int64_t x, width;
  int y;
};

extern uint64_t random_state;
extern Fault planted;
extern int planted_at;
extern std::string failure;  // what went wrong first; empty: nothing

// What runs. Between groups of blocks all fibers are finished: each waits to run the kernel again.
extern void (*kernel)(const void*);
extern const void* kernel_parameters;
extern int threads, shared_bytes;   // of a block
extern int blocks, cluster_blocks;  // blocks that run at the same time, in clusters
extern jmp_buf home;                // where the launch continues when no fiber can
extern std::deque<Fiber> fibers;
extern std::deque<Warp> warps;
extern std::deque<Block> running;
extern Fiber* mine;
extern std::vector<int> ready;
extern std::vector<Push> pushes;
extern std::deque<Cluster> clusters;

extern Stamp now;
extern uint64_t group_begin, launch_begin;
extern std::map<uint64_t, Group> begun;  // of this launch, by their first time

inline Cluster& cluster_of(const Block& block) { return clusters[block.rank / cluster_blocks]; }
inline Block& peer_of(const Block& block, int peer) {
  return running[block.rank / cluster_blocks * cluster_blocks + peer];
}

// ---- scheduler.cpp

void set_time(uint64_t time);
[[noreturn]] void fail(std::string what);
void wait(State state);
void wait_among(std::vector<int>& waiting, State state);
void wake(std::vector<int>& waiting);
// Count an event of the fiber; whether it is the one to go wrong.
bool goes_wrong(Fault fault);

// ---- messages.cpp

std::string name(const Block& block);
std::string name(const Fiber& fiber);
std::string name(const Phases& phases, const Block& block);
std::string name(Stamp access);
void describe_deadlock();

// ---- memory.cpp

constexpr uintptr_t kPage = 1024;
extern std::unordered_map<uintptr_t, std::array<Shadow, kPage / 2>> global_shadows;
extern std::unordered_map<const Shadow*, std::map<int, Stamp>> readers;  // where they are of several blocks, by block

Shadow& shadow_of(const void* global);
// The time in the present thread's clock for the thread of an access.
uint64_t time_known_of(Stamp thread);
// Whether an access happens before the present one in every order of threads and blocks. `since`: when the memory was
// allocated.
bool is_ordered(Stamp access, uint64_t since);
bool is_read_ordered(const Shadow& shadow, uint64_t since);
// Reads by several threads of a block are recorded as one by all of its threads.
void add_read(Shadow& shadow);
int at_in(const Block& block, int begin, int64_t size, int64_t offset, int bytes, const char* does);
std::string place_in(const Block& block, int byte);

template <class Place>
void check_race(Shadow& shadow, Access access, uint64_t since, Place place) {
  const bool after_write = is_ordered(shadow.write, since);
  if (!after_write || (access == Access::write && !is_read_ordered(shadow, since)))
    fail("race: " + name(after_write ? shadow.read : shadow.write) + (after_write ? " read and " : " wrote and ") +
         name(now) + (access == Access::write ? " wrote " : " read ") + place() + ", nothing orders them");
  if (access == Access::write)
    shadow.write = now;
  else if (is_read_ordered(shadow, since))
    shadow.read = now;
  else if (shadow.read >> kActorBits >= group_begin)  // else another group's: any write races with it
    add_read(shadow);
}

// ---- pushes.cpp

Phases& phases_of(Block& block, int byte, const char* does);
void end_phase(Phases& phases, const Block& block);
void arrive(Push push);
// No push may come to a block that has ended: some thread of it must have waited for the last one.
void end_block(const Block& block);

// ---- tags.cpp

// Vectors with tags that are under way: how many, and let one arrive.
size_t sent_vectors();
void arrive(size_t which);
// Let half a vector arrive, if there is one and nothing else can happen.
bool arrive_late_half();
void forget_vectors();

}  // namespace seqkernels::emulator
