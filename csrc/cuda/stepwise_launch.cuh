// What launches of the stepwise kernels have in common.
#pragma once
#include "stepwise.cuh"
//
#include "dispatch.h"
#include "launch.cuh"

namespace seqkernels::device {

// Calls with a number of the dtype's type.
template <class Call>
const char* by_element(Scalar scalar, Call call) {
  return by_scalar(scalar, [&](auto scalar) { return call(element_t<decltype(scalar)::value>{}); });
}

// One thread for each of so many elements.
template <class Kernel>
const char* launch_for(int64_t elements, int directions, const typename Kernel::Parameters& p, void* stream) {
  if (!elements) return nullptr;
  return launch<Kernel>((elements + kThreads - 1) / kThreads, directions, 0, stream, p);
}

template <class Kernel>
const char* launch_finish(const typename Kernel::Parameters& p, void* stream) {
  const int64_t blocks = Kernel::blocks(p);
  return blocks ? launch<Kernel>(blocks, p.layer.directions, Kernel::shared_bytes, stream, p) : nullptr;
}

}  // namespace seqkernels::device
