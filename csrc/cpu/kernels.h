// What kernels.cpp offers, once for every instruction set it is compiled for.
#pragma once
#include "../layer.h"

namespace seqkernels {

// Some sequences of one direction, through all steps: needs nothing of another task.
// Sequence r of the task is number first + r * stride of the batch.
struct Task {
  int direction;
  int64_t first, stride, count;
};

// Where the members of a team meet; zero at the start.
struct Barrier {
  alignas(64) int arrived;
  alignas(64) int phase;
};

// How the members (as many as threads are wanted) share the work. In a sweep each team runs an equal share of the
// tasks, its members sharing the hidden units of a task among them; members that are in no team wait.
struct Schedule {
  int members, teams, team_size;
  int64_t tasks, most_sequences;  // most_sequences: of any task
  const Task* task;               // [tasks]
  Barrier* barriers;              // [1 + teams]: of all members, then of each team
};

struct Kernels {
  // Bytes of memory that all members of a call work in; it need not be initialised.
  int64_t (*forward_bytes)(const LayerForward&, const Schedule&);
  int64_t (*backward_bytes)(const LayerBackward&, const Schedule&);
  // The part of members [begin, end). Members that share a team, or the whole, wait for each other: every member must
  // be run, and those that are not in one call, at the same time.
  void (*forward)(const LayerForward&, const Schedule&, int begin, int end, void* memory);
  void (*backward)(const LayerBackward&, const Schedule&, int begin, int end, void* memory);
  // As many float multiplications and additions as the machine can do at once, again and again: returns how many
  // operations that were. What it can reach at best, to hold the kernels against.
  double (*multiply_and_add)(int64_t rounds);
};

}  // namespace seqkernels
