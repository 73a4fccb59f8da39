// Launches of the stepwise kernels of layers with masks. One instance serves even and odd numbers of units.
#include "stepwise_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

// Calls with the traits of the cell and a number of the dtype's type.
template <class Call>
const char* by_masked_layer(const SweepArgs& s, Call call) {
  return with_cell(s.cell,
                   [&](auto cell) { return by_element(s.scalar, [&](auto zero) { return call(cell, zero); }); });
}

}  // namespace

const char* step_forward(const MaskedStepForward& p, void* stream) {
  return by_masked_layer(p.layer, [&](auto cell, auto zero) {
    using Kernel = StepForwardKernel<decltype(cell)::cell, decltype(zero), false, true>;
    return launch_for<Kernel>(p.running * ((p.layer.hidden + 1) / 2), p.layer.directions, p, stream);
  });
}

const char* step_backward(const MaskedStepBackward& p, void* stream) {
  return by_masked_layer(p.layer, [&](auto cell, auto zero) {
    using Kernel = StepBackwardKernel<decltype(cell)::cell, decltype(zero), false, true>;
    return launch_for<Kernel>(p.running * ((p.layer.hidden + 1) / 2), p.layer.directions, p, stream);
  });
}

const char* mask_states(const MaskStates& p, void* stream) {
  return by_element(p.layer.scalar, [&](auto zero) {
    const int64_t states = p.layer.directions * p.layer.sequences * p.layer.hidden;
    return launch_for<MaskStatesKernel<decltype(zero)>>(states, 1, p, stream);
  });
}

const char* copy_pieces(const CopyPieces& p, void* stream) {
  return by_element(p.layer.scalar, [&](auto zero) {
    using Kernel = CopyPiecesKernel<decltype(zero)>;
    return launch_for<Kernel>(p.layer.sequences * p.layer.hidden, p.layer.directions, p, stream);
  });
}

const char* finish_sweep(const MaskedFinishSweep& p, void* stream) {
  return by_element(p.layer.scalar,
                    [&](auto zero) { return launch_finish<FinishSweepKernel<decltype(zero), true>>(p, stream); });
}

}  // namespace seqkernels
