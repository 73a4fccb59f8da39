// The names of csrc/cuda/launch.cuh for the CPU.
#pragma once
#include "device.h"

namespace seqkernels::emulator {

// Blocks that run at the same time.
extern int multiprocessors;

struct Grid {
  int64_t blocks;
  int blocks_y, threads, shared_bytes, cluster;  // cluster: blocks that run at the same time
  bool whole_grid;                               // or all of them do
};
const char* launch(const Grid& grid, void (*kernel)(const void* parameters), const void* parameters);

}  // namespace seqkernels::emulator

namespace seqkernels::device {

struct Cooperation {
  int cluster = 1;
  bool whole_grid = false;
};

template <class Kernel>
const char* count_clusters(int cluster, int& count) {
  count = emulator::multiprocessors / cluster;
  return nullptr;
}

template <class Kernel>
const char* launch(int64_t blocks, int blocks_y, int shared_bytes, void* /*stream*/,
                   const typename Kernel::Parameters& parameters, Cooperation cooperation = {}) {
  const auto run = [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Parameters*>(p)); };
  return emulator::launch(
      {blocks, blocks_y, Kernel::threads, shared_bytes, cooperation.cluster, cooperation.whole_grid}, run, &parameters);
}

}  // namespace seqkernels::device
