// Control of the emulator: kernels run on the CPU, their threads are fibers, and every access is checked (device.h).
#pragma once
#include <cstdint>

namespace seqkernels::emulator {

// Draw the order of blocks and threads from here on.
void seed(uint64_t seed);

// Whether batch_sizes are taken for ones on a GPU, into which the host does not look.
extern bool sizes_on_gpu;

// Of the GPU whose place the CPU takes: so many blocks run at the same time, and may have so many bytes of shared
// memory.
extern int multiprocessors;
extern int shared_memory;

// What can be made to go wrong, for tests that it is caught: a barrier of a block, of a warp or of a cluster, or a wait
// for pushes or for a flag is passed as if it were not there; a wait has the wrong parity; 16 bytes more, or fewer, are
// expected than come; a push, a copy or a raised flag gets lost; copies do not see what was written before.
enum class Fault {
  none,
  barrier,
  warp_barrier,
  cluster_barrier,
  wait,
  parity,
  more_bytes,
  fewer_bytes,
  push,
  flag,
  fence,
  count
};

// Of each thread the n-th (from 0) of a launch.
void plant(Fault fault, int n);

struct Counts {
  int64_t launches, blocks, barriers, switches;  // barriers: that a block has passed; switches: from fiber to fiber
  int64_t shared_bytes;                          // that launches asked for, for a block of each
  int64_t pushes, waits;                         // of 16 bytes; for pushes
  int64_t operations, allocations;               // of torch, by the operators
};
extern Counts counted;  // since the program started

}  // namespace seqkernels::emulator
