// What the checks of random layers have in common: their sizes and steps, and the loop over them.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace seqkernels {

inline uint64_t random_state = 1;

inline int64_t random_number(int64_t min, int64_t max) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return min + static_cast<int64_t>(random_state >> 33) % (max - min + 1);
}

struct Sizes {
  Cell cell;
  int64_t T, B, I, H, P;
  int D, threads;
  bool ragged;
  int parts = 0;  // bfloat16 that factors of float32 are the sum of
};

// How many sequences run in each step of a layer, and where its rows begin.
struct Steps {
  std::vector<int64_t> batch_sizes, offsets;

  // Sets what `p` has of them, and its sizes.
  Steps(const Sizes& of, Layer& p) {
    for (int64_t t = 0; t < of.T; t++) {
      offsets.push_back(p.rows);
      batch_sizes.push_back(!of.ragged ? of.B : t ? random_number(1, batch_sizes.back()) : of.B);
      p.rows += batch_sizes.back();
    }
    p.batch_sizes = batch_sizes.data(), p.offsets = offsets.data();
    p.cell = of.cell;
    p.steps = of.T, p.sequences = p.states = of.B;
    p.input = of.I, p.hidden = of.H, p.projected = of.P, p.directions = of.D;
    p.has_projection = of.P != of.H;
  }
};

// Calls check(sizes) of as many layers as the program's first argument says, all cells in turn, of at most `max_size`
// units: whether all agree becomes the program's result. choose(sizes) sets the steps and whatever else is not set.
template <class Choose, class Check>
int check_random_layers(char** arguments, int64_t max_size, const Choose& choose, const Check& check) {
  const int64_t count = arguments[1] ? atoi(arguments[1]) : 100;
  bool good = true;
  for (int64_t i = 0; i < count; i++) {
    Sizes of;
    of.cell = kCells[i % 5];
    of.B = random_number(0, 1) ? random_number(1, 20) : random_number(9, 100);
    of.I = random_number(0, max_size), of.H = random_number(1, max_size);
    of.D = static_cast<int>(random_number(1, 2)), of.threads = static_cast<int>(random_number(1, 3));
    of.ragged = random_number(0, 1);
    choose(of);
    of.P = can_project(of.cell) && random_number(0, 1) ? random_number(1, of.H) : of.H;
    if (check(of)) continue;
    good = false;
    printf("differs: %s T %ld B %ld I %ld H %ld P %ld D %d threads %d ragged %d parts %d\n", name_of(of.cell),
           static_cast<long>(of.T), static_cast<long>(of.B), static_cast<long>(of.I), static_cast<long>(of.H),
           static_cast<long>(of.P), of.D, of.threads, of.ragged, of.parts);
  }
  printf("%s\n", good ? "all agree" : "some differ");
  return !good;
}

}  // namespace seqkernels
