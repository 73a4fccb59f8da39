// What kernels.cpp offers, once for every instruction set it is compiled for.
#pragma once
#include "../params.h"

namespace seqkernels {

struct Kernels {
  const char* name;
  // Bytes of packed weights of one direction, and of scratch of one task with `count` sequences.
  int64_t (*forward_packed_bytes)(const Problem&);
  int64_t (*forward_scratch_bytes)(const Problem&, int64_t count);
  int64_t (*backward_packed_bytes)(const Problem&);
  int64_t (*backward_scratch_bytes)(const Problem&, int64_t count);
  // Pack the weights of one direction, then run tasks of it in any order and on any thread.
  void (*forward_pack)(const Problem&, int direction, void* packed);
  void (*forward)(const Forward&, const Task&, const void* packed, void* scratch);
  void (*backward_pack)(const Problem&, int direction, void* packed);
  void (*backward)(const Backward&, const Task&, const void* packed, void* scratch);
};

}  // namespace seqkernels
