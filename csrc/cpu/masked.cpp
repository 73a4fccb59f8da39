// The instances of both sweeps for layers with masks.
#include "backward.h"
#include "forward.h"
#include "instances.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// call(number of S, traits)
template <class Call>
void with_masked(const Layer& p, const Call& call) {
  with_scalar(p.scalar, [&](auto s) { with_cell(p.cell, [&](auto traits) { call(s, traits); }); });
}

}  // namespace

void run_masked_forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_masked(p, [&](auto s, auto traits) {
    using S = decltype(s);
    forward<decltype(traits)::cell, S, acc_t<S>, true>(p, schedule, begin, end, memory);
  });
}

void run_masked_backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_masked(p, [&](auto s, auto traits) {
    using S = decltype(s);
    backward<decltype(traits)::cell, S, acc_t<S>, true>(p, schedule, begin, end, memory);
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
