// From run-time values to instances of the sweeps, and what the sources that hold instances offer kernels.cpp.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace seqkernels::SEQKERNELS_ISA {

int64_t forward_bytes(const LayerForward&, const Schedule&);
int64_t backward_bytes(const LayerBackward&, const Schedule&);
PackedLayout packed_layout(const LayerForward&);
void run_forward(const LayerForward&, const Schedule&, int begin, int end, void* memory);
void run_backward(const LayerBackward&, const Schedule&, int begin, int end, void* memory);
// Of layers with masks.
void run_masked_forward(const LayerForward&, const Schedule&, int begin, int end, void* memory);
void run_masked_backward(const LayerBackward&, const Schedule&, int begin, int end, void* memory);

template <class Call>
auto with_scalar(Scalar scalar, const Call& call) {
  switch (scalar) {
    case Scalar::float64: return call(double{});
    case Scalar::bfloat16: return call(bfloat16{});
    case Scalar::float16: return call(float16{});
    case Scalar::float32: break;
  }
  return call(float{});
}

}  // namespace seqkernels::SEQKERNELS_ISA
