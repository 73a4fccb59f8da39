// The CPU kernels, compiled once for each instruction set with its own value of SEQKERNELS_ISA. Everything lies in that
// namespace, and no std:: function is called. So the linker can never take code of one instruction set for another.
#include "kernels.h"

#include "backward.h"
#include "forward.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// From run-time values to instances.
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

// call(number of S, factor of F) for the forward pass.
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

// And for the backward pass.
template <class Call>
auto with_factor(const LayerBackward& p, const Call& call) {
#if defined(SEQKERNELS_TILES)
  if (multiplies_gradients_by_tiles(p) && !p.masked())
    return p.scalar == Scalar::float32 ? call(float{}, bfloat16x2{}) : call(bfloat16{}, bfloat16x2{});
#endif
  return with_scalar(p.scalar, [&](auto s) { return call(s, acc_t<decltype(s)>{}); });
}

int64_t forward_bytes(const LayerForward& p, const Schedule& schedule) {
  return with_factor(
      p, [&](auto s, auto f) { return ForwardMemory<decltype(s), decltype(f)>(p, schedule, nullptr).bytes(schedule); });
}

int64_t backward_bytes(const LayerBackward& p, const Schedule& schedule) {
  return with_factor(p, [&](auto s, auto f) {
    return BackwardMemory<decltype(s), decltype(f)>(p, schedule, nullptr).bytes(schedule);
  });
}

// call(number of S, traits) for layers with masks, which no cell has that saves nothing.
template <class Call>
void with_masked(const Layer& p, const Call& call) {
  with_scalar(p.scalar, [&](auto s) {
    with_cell(p.cell, [&](auto traits) {
      if constexpr (decltype(traits)::saved_blocks > 0) call(s, traits);
    });
  });
}

void run_forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  if (p.masked())
    return with_masked(p, [&](auto s, auto traits) {
      using S = decltype(s);
      forward<decltype(traits)::cell, S, acc_t<S>, true>(p, schedule, begin, end, memory);
    });
  with_factor(p, [&](auto s, auto f) {
    with_cell(p.cell, [&](auto traits) {
      forward<decltype(traits)::cell, decltype(s), decltype(f)>(p, schedule, begin, end, memory);
    });
  });
}

void run_backward(const LayerBackward& p, const Schedule& schedule, int begin, int end, void* memory) {
  if (p.masked())
    return with_masked(p, [&](auto s, auto traits) {
      using S = decltype(s);
      backward<decltype(traits)::cell, S, acc_t<S>, true>(p, schedule, begin, end, memory);
    });
  with_factor(p, [&](auto s, auto f) {
    with_cell(p.cell, [&](auto traits) {
      backward<decltype(traits)::cell, decltype(s), decltype(f)>(p, schedule, begin, end, memory);
    });
  });
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
const Kernels kernels = {
    forward_bytes, backward_bytes, run_forward, run_backward, multiply_and_add,
};

}  // namespace seqkernels::SEQKERNELS_ISA
