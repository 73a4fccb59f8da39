// Control of the emulator: kernels run on the CPU, their threads are fibers, and every access is checked (device.h).
#pragma once
#include <cstdint>

namespace seqkernels::emulator {

// Draw the order of blocks and threads from here on.
void seed(uint64_t seed);

// Whether batch_sizes are treated as those on a GPU, which the host does not read.
extern bool sizes_on_gpu;

// The emulated GPU: how many blocks run at the same time, and how many bytes of shared memory a block may have.
extern int multiprocessors;
extern int shared_memory;

// Faults that can be planted, to test that each is found: a barrier of a block, of a warp or of a cluster is left out,
// or a wait for pushes or for a tag; a wait has the wrong parity; 16 bytes more, or fewer, are expected than come; a
// push or a vector with a tag is lost; such a vector is stored in two halves; its memory has a tag of a launch before;
// a stream's wait for another one is left out; a launch fails.
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
  tag,
  tear,
  stale,
  stream,
  launch,
  count
};

// Plants the fault in the n-th such operation (from 0) of each thread in a launch; of streams and launches, in the n-th
// from now on.
void plant(Fault fault, int n);

// Whether this operation of the host, a stream's wait or a launch, is the one that goes wrong.
bool goes_wrong_on_host(Fault fault);

uint64_t random_below(uint64_t n);

struct Counts {
  int64_t launches, blocks, barriers, switches;  // barriers: that a block has passed; switches: from fiber to fiber
  int64_t shared_bytes;                          // that launches asked for, for a block of each
  int64_t pushes, waits;                         // of 16 bytes; for pushes
  int64_t operations, allocations;               // of torch, by the operators
};
extern Counts counted;  // since the program started

}  // namespace seqkernels::emulator
