// The instances of the forward sweep.
#include "forward.h"
#include "instances.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// call(number of S, factor of F)
template <class Call>
auto with_factor(const LayerForward& p, const Call& call) {
#if defined(__AVX512F__)
  if (p.scalar == Scalar::bfloat16 && p.bfloat16_products && !p.masked()) return call(bfloat16{}, bfloat16x2{});
#endif
#if defined(SEQKERNELS_TILES)
  if (splits_for_tiles(p)) return call(float{}, bfloat16x2{});
#endif
  return with_scalar(p.scalar, [&](auto s) { return call(s, acc_t<decltype(s)>{}); });
}

}  // namespace

int64_t forward_bytes(const LayerForward& p, const Schedule& schedule) {
  return with_factor(
      p, [&](auto s, auto f) { return ForwardMemory<decltype(s), decltype(f)>(p, schedule, nullptr).bytes(schedule); });
}

PackedLayout packed_layout(const LayerForward& p) {
  return with_factor(p, [&](auto s, auto f) { return PackedWeights<decltype(s), decltype(f)>(p).layout(p); });
}

void run_forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_factor(p, [&](auto s, auto f) {
    with_cell(p.cell, [&](auto traits) {
      forward<decltype(traits)::cell, decltype(s), decltype(f)>(p, schedule, begin, end, memory);
    });
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
