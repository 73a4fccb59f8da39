// The kernels of layers with layer norm, compiled once for each instruction set, as kernels.cpp is.
#include "kernels.h"

#include "layer_norm_backward.h"
#include "layer_norm_forward.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// call(number of the layer).
template <class Call>
auto with_scalar(Scalar scalar, const Call& call) {
  return scalar == Scalar::float64 ? call(double{}) : call(float{});
}

int64_t forward_bytes(const LayerNormForward& p, const Schedule& schedule) {
  return with_scalar(p.scalar,
                     [&](auto c) { return LayerNormForwardMemory<decltype(c)>(p, schedule, nullptr).bytes(schedule); });
}

int64_t backward_bytes(const LayerNormBackward& p, const Schedule& schedule) {
  return with_scalar(
      p.scalar, [&](auto c) { return LayerNormBackwardMemory<decltype(c)>(p, schedule, nullptr).bytes(schedule); });
}

void forward(const LayerNormForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_scalar(p.scalar, [&](auto c) {
    with_cell(p.cell, [&](auto traits) {
      layer_norm_forward<decltype(traits)::cell, decltype(c)>(p, schedule, begin, end, memory);
    });
  });
}

void backward(const LayerNormBackward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_scalar(p.scalar, [&](auto c) {
    with_cell(p.cell, [&](auto traits) {
      layer_norm_backward<decltype(traits)::cell, decltype(c)>(p, schedule, begin, end, memory);
    });
  });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {
    .forward_bytes = forward_bytes, .backward_bytes = backward_bytes, .forward = forward, .backward = backward};

}  // namespace seqkernels::SEQKERNELS_ISA
