// What the CPU kernels offer. This and the other sources of OF_EACH_SET (native_build/libraries.py) are compiled once
// for each instruction set, with its own value of SEQKERNELS_ISA. Everything lies in that namespace, and no std::
// function is called. So the linker can never take code of one instruction set for another.
#include "gemm.h"
#include "instances.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

void forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  (p.masked() ? run_masked_forward : run_forward)(p, schedule, begin, end, memory);
}

void backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* memory) {
  (p.masked() ? run_masked_backward : run_backward)(p, schedule, begin, end, memory);
}

double multiply_and_add(int64_t rounds) {
  Vec<float> sums[kAccumulators];
  for (int k = 0; k < kAccumulators; k++) sums[k] = broadcast(static_cast<float>(k));
  const Vec<float> w = broadcast(0.5f), x = broadcast(1 / static_cast<float>(rounds));
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 24
    for (int k = 0; k < kAccumulators; k++) sums[k] = add_product<float>(sums[k], w, x);
#pragma GCC unroll 24
  for (int k = 1; k < kAccumulators; k++) sums[0] += sums[k];
  volatile float used = sums[0][0];
  static_cast<void>(used);
  return 2.0 * rounds * kAccumulators * kLanes<float>;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {.forward_bytes = forward_bytes,
                         .backward_bytes = backward_bytes,
                         .packed_layout = packed_layout,
                         .forward = forward,
                         .backward = backward,
                         .multiply_and_add = multiply_and_add};

}  // namespace seqkernels::SEQKERNELS_ISA
