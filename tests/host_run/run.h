// Control of host runs: kernels on the CPU, their threads fibers, every access checked (device.h).
#pragma once
#include <cstdint>

namespace seqkernels::host_run {

// Draw the order of blocks and threads from here on.
void seed(uint64_t seed);

// Plant a fault: threads pass their n-th barrier (from 0) of a launch as if it were not there. -1: none.
void skip_barrier(int n);

struct Counts {
  int64_t launches, blocks, barriers, switches;  // barriers: that a block has passed; switches: from fiber to fiber
  int64_t shared_bytes;                          // that launches asked for, for a block of each
};
Counts counts();  // since the program started

}  // namespace seqkernels::host_run
