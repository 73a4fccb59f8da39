// What kernels.cpp offers, once for every instruction set it is compiled for.
#pragma once
#include "../layer.h"

// Whether the compiler, and so its assembler, knows Intel's AMX. On other systems than Linux nobody asks for it.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define SEQKERNELS_AMX
#endif

namespace seqkernels {

// Some sequences of one direction, through all steps. It needs nothing of another task.
// Sequence r of the task is number first + r * stride of the batch.
struct Task {
  int direction;
  int64_t first, stride, count;
};

// Where the members of a team wait for each other. All zero at the start.
struct Barrier {
  alignas(64) int arrived;
  alignas(64) int phase;
};

// How the members (as many as threads are wanted) divide the work. In a sweep each team runs an equal number of tasks,
// and its members divide the hidden units of a task among them. Members that are in no team wait.
struct Schedule {
  int members, teams, team_size;
  int64_t tasks, max_sequences;  // max_sequences: of any task
  const Task* task;              // [tasks]
  Barrier* barriers;             // [1 + teams]: of all members, then of each team
};

struct Kernels {
  // Bytes of memory that all members of a call work in. Its contents do not matter.
  int64_t (*forward_bytes)(const LayerForward&, const Schedule&);
  int64_t (*backward_bytes)(const LayerBackward&, const Schedule&);
  PackedLayout (*packed_layout)(const LayerForward&);
  // The part of members [begin, end). All members wait for each other, and so do those of a team. So every member has
  // to run, and those that are not in one call have to run at the same time.
  void (*forward)(const LayerForward&, const Schedule&, int begin, int end, void* memory);
  void (*backward)(const LayerBackward&, const Schedule&, int begin, int end, void* memory);
  // What the machine can reach at best, to compare the kernels with: as many float multiplications and additions as it
  // can do at once, again and again. Returns how many operations that were.
  double (*multiply_and_add)(int64_t rounds);
};

// What quantized.cpp offers in the same way. Weights are packed (seqkernels/quantized.py), all else is float32;
// saved [N, D, H] gets an LSTM's c of every row, unless it is null.
struct QuantizedKernels {
  int64_t (*bytes)(const LayerForward&, const Schedule&);
  void (*forward)(const LayerForward&, const Schedule&, int begin, int end, void* memory);
};

// What layer_norm.cpp offers, of float32 and float64.
struct LayerNormKernels {
  int64_t (*forward_bytes)(const LayerNormForward&, const Schedule&);
  int64_t (*backward_bytes)(const LayerNormBackward&, const Schedule&);
  void (*forward)(const LayerNormForward&, const Schedule&, int begin, int end, void* memory);
  void (*backward)(const LayerNormBackward&, const Schedule&, int begin, int end, void* memory);
};

}  // namespace seqkernels
