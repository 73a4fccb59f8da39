// What can run a layer on a GPU, and how: the paths with their tiles and sizes, or why they cannot run. Plain C++,
// no CUDA header and no torch, so that it answers for GPUs that are not here. What a path costs is said in
// seqkernels/backends/cuda/launch.py, which chooses by it.
#pragma once
#include <string>
#include <vector>

#include "config.h"

namespace seqkernels {

constexpr Scalar kScalars[] = {Scalar::float32, Scalar::float64, Scalar::bfloat16, Scalar::float16};

constexpr const char* name_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::float32: return "float32";
    case Scalar::float64: return "float64";
    case Scalar::bfloat16: return "bfloat16";
    default: return "float16";
  }
}

struct Gpu {
  int target;         // 90 for compute capability 9.0
  int shared_memory;  // bytes that a CTA may have
  int multiprocessors;
  int clusters[kMaxCluster];  // of 1, 2, ... CTAs, each on a multiprocessor of its own: how many run at the same time
};

// What a plan of one layer goes by.
struct LayerFacts {
  Cell cell;
  Scalar scalar;
  bool tf32;  // float32 factors may be rounded to TF32
  bool has_projection;
  int directions;
  int64_t hidden, sequences;
  bool masked = false, layer_norm = false;

  bool by_odd() const { return masked || layer_norm; }  // kernels for odd numbers of units take even ones as well
};

// How one pass is launched.
struct Plan {
  Path path = Path::stepwise;
  int tile = 0;    // sequences that a CTA, a cluster or a group of clusters takes at once; stepwise: 0
  int units = 0;   // hidden units of a CTA of the cluster, or of a cluster of the persistent grid; else 0
  int chunks = 1;  // of the steps, in which layers follow each other (wavefront.h); 1: one layer after the other
};

struct Candidate {
  Plan plan;
  std::string reason;                                 // why it cannot run; empty if it can
  int blocks = 0, cluster = 0;                        // CTAs that share the hidden units, and CTAs of a cluster
  int width = 0, threads = 0;                         // of a CTA: hidden units that its kernel is made for, and threads
  int at_once = 0;                                    // tiles that run at the same time
  int64_t registers = 0, shared_weights = 0, l2 = 0;  // bytes of a CTA's weights there; from L2 they come in every step
  int64_t shared_memory = 0;                          // bytes of a CTA
};

constexpr int kPaths = 4;
constexpr int kMaxStreams = 8;  // layers of a wavefront that run at the same time

// "single CTA"
const char* name_of(Path path);

// All ways to run one pass of a layer: one of each path, and one for each number of units of a cluster or of the grid.
std::vector<Candidate> candidates(const LayerFacts& layer, const Gpu& gpu, bool backward);

// Why a pass of a layer cannot be launched so; empty if it can.
std::string reason_against(const Plan& plan, const LayerFacts& layer, const Gpu& gpu, bool backward);

}  // namespace seqkernels
