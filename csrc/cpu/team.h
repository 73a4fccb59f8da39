// What the members of a call need to work together: the range of work of each, barriers, memory. Also min, max and
// swap, as no std:: function may be called here (kernels.cpp says why).
#pragma once
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace seqkernels::SEQKERNELS_ISA {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
inline void swap(T& a, T& b) {
  const T before = a;
  a = b;
  b = before;
}

// Members [begin, end) of `members`, run by one thread.
struct WorkRange {
  int begin, end, members;
  Barrier* barrier;

  // Of n pieces of work, [first, last) are this range's.
  int64_t first(int64_t n) const { return n * begin / members; }
  int64_t last(int64_t n) const { return n * end / members; }

  // Wait until all members are here. Arrivals are counted in members, not threads, so that it does not matter how many
  // threads there really are.
  void wait() const {
    if (end - begin == members) return;
    const int phase = __atomic_load_n(&barrier->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, end - begin, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
      constexpr int kPatience = 4000;  // some 50 us; after that the others may be waiting for this very core
      if (spins > kPatience) sched_yield();
#if defined(__x86_64__)
      else
        _mm_pause();
#endif
    }
  }
};

inline WorkRange whole_range(const Schedule& schedule, int begin, int end) {
  return {.begin = begin, .end = end, .members = schedule.members, .barrier = schedule.barriers};
}

// Calls run(i, work) for every task i in which one of members [begin, end) has a part: the range of its team's work.
template <class Run>
inline void run_tasks(const Schedule& schedule, int begin, int end, const Run& run) {
  const int size = schedule.team_size;
  for (int team = begin / size; team < schedule.teams && team * size < end; team++) {
    const int first = team * size;
    const WorkRange work{.begin = begin > first ? begin - first : 0,
                         .end = static_cast<int>(min(end - first, size)),
                         .members = size,
                         .barrier = schedule.barriers + 1 + team};
    const int64_t last = schedule.tasks * (team + 1) / schedule.teams;
    for (int64_t i = schedule.tasks * team / schedule.teams; i < last; i++) run(i, work);
  }
}

// Hands out parts of one block of memory; without a block it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};

// The parts of tasks, which are alike, one behind the other at the end of a block.
class TaskArenas {
 public:
  TaskArenas() = default;
  // take(arena) takes what one task needs.
  template <class Take>
  TaskArenas(const Arena& behind, const Take& take) : first_(behind) {
    Arena one{nullptr};
    take(one);
    bytes_ = one.used;
  }

  Arena of(int64_t task) const {
    Arena arena = first_;
    arena.used += task * bytes_;
    return arena;
  }
  // Bytes of the block with so many tasks.
  int64_t end(int64_t tasks) const { return first_.used + tasks * bytes_; }

 private:
  Arena first_{nullptr};
  int64_t bytes_ = 0;
};

}  // namespace seqkernels::SEQKERNELS_ISA
