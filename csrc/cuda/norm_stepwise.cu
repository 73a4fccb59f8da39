// Launches of the stepwise kernels of layers with layer norm, which compute in float32 or float64.
#include "norm_step_backward.cuh"
#include "norm_step_forward.cuh"
//
#include "dispatch.h"
#include "launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

// A CTA for each row.
template <template <Cell, class> class Kernel, class Step>
const char* launch_step(const Step& p, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    const auto launched = [&](auto zero) {
      using T = decltype(zero);
      return launch<Kernel<decltype(cell)::cell, T>>(p.running, p.directions, CtaMeans<T>::bytes, stream, p);
    };
    return p.scalar == Scalar::float64 ? launched(double{}) : launched(float{});
  });
}

}  // namespace

const char* step_forward(const NormStepForward& p, void* stream) {
  return launch_step<NormStepForwardKernel>(p, stream);
}

const char* step_backward(const NormStepBackward& p, void* stream) {
  return launch_step<NormStepBackwardKernel>(p, stream);
}

}  // namespace seqkernels
