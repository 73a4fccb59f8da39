// The instances of the backward sweep.
#include "backward.h"
#include "instances.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// call(number of S, factor of F)
template <class Call>
auto with_factor(const LayerBackward& p, const Call& call) {
#if defined(SEQKERNELS_TILES)
  if (multiplies_gradients_by_tiles(p) && !p.masked())
    return p.scalar == Scalar::float32 ? call(float{}, bfloat16x2{}) : call(bfloat16{}, bfloat16x2{});
#endif
  return with_scalar(p.scalar, [&](auto s) { return call(s, acc_t<decltype(s)>{}); });
}

}  // namespace

int64_t backward_bytes(const LayerBackward& p, const Schedule& schedule) {
  return with_factor(p, [&](auto s, auto f) {
    return BackwardMemory<decltype(s), decltype(f)>(p, schedule, nullptr).bytes(schedule);
  });
}

void run_backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_factor(p, [&](auto s, auto f) {
    with_cell(p.cell, [&](auto traits) {
      backward<decltype(traits)::cell, decltype(s), decltype(f)>(p, schedule, begin, end, memory);
    });
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
