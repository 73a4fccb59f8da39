// How many clusters run at the same time: asked of an empty kernel, since only shared memory, all of a
// multiprocessor's, limits them.
#include "launch.cuh"

namespace seqkernels {

namespace {

struct EmptyKernel {
  static constexpr int threads = slice_warps(kGridUnits, false) * kWarpSize;
  struct Parameters {};
  static DEVICE void run(const Parameters&) {}
};

}  // namespace

const char* clusters_at_once(int cluster, int& count) { return device::count_clusters<EmptyKernel>(cluster, count); }

}  // namespace seqkernels
