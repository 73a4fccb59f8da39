// Launches of the stepwise kernels.
#include "stepwise_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

// Calls with the traits of the cell, a number of the dtype's type, and whether the number of hidden units is even.
template <class Call>
const char* by_layer(const SweepArgs& s, Call call) {
  return with_cell(s.cell, [&](auto cell) {
    return by_element(s.scalar, [&](auto zero) {
      return s.hidden % 2 ? call(cell, zero, std::false_type{}) : call(cell, zero, std::true_type{});
    });
  });
}

}  // namespace

const char* step_forward(const StepForward& p, void* stream) {
  return by_layer(p.layer, [&](auto cell, auto zero, auto even) {
    using Kernel = StepForwardKernel<decltype(cell)::cell, decltype(zero), decltype(even)::value>;
    return launch_for<Kernel>(p.running * ((p.layer.hidden + 1) / 2), p.layer.directions, p, stream);
  });
}

const char* step_backward(const StepBackward& p, void* stream) {
  return by_layer(p.layer, [&](auto cell, auto zero, auto even) {
    using Kernel = StepBackwardKernel<decltype(cell)::cell, decltype(zero), decltype(even)::value>;
    return launch_for<Kernel>(p.running * ((p.layer.hidden + 1) / 2), p.layer.directions, p, stream);
  });
}

const char* step_project(const StepProject& p, void* stream) {
  return by_element(p.layer.scalar, [&](auto zero) {
    using Kernel = StepProjectKernel<decltype(zero)>;
    return launch_for<Kernel>(p.running * p.layer.projected, p.layer.directions, p, stream);
  });
}

const char* step_project_backward(const StepProjectBackward& p, void* stream) {
  return by_element(p.layer.scalar, [&](auto zero) {
    using Kernel = StepProjectBackwardKernel<decltype(zero)>;
    return launch_for<Kernel>(p.running * p.layer.projected, p.layer.directions, p, stream);
  });
}

const char* finish_sweep(const FinishSweep& p, void* stream) {
  return by_element(p.layer.scalar,
                    [&](auto zero) { return launch_finish<FinishSweepKernel<decltype(zero)>>(p, stream); });
}

const char* unprojected(const Unprojected& p, void* stream) {
  return by_element(p.layer.scalar, [&](auto zero) {
    return launch_for<UnprojectedKernel<decltype(zero)>>(p.layer.rows * p.layer.hidden, 1, p, stream);
  });
}

const char* write_steps(const WriteSteps& p, void* stream) {
  return launch_for<WriteStepsKernel>(p.end[p.count - 1] - p.begin, 1, p, stream);
}

}  // namespace seqkernels
