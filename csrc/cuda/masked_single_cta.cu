// Launches of the single CTA kernels of layers with masks: has_masked_single_cta() says which there are.
#include "masked_single_cta_backward.cuh"
#include "masked_single_cta_forward.cuh"
#include "single_cta_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

template <class C>
using MaskedKernelOf = std::conditional_t<C::variant.backward, MaskedSingleCtaBackward<C>, MaskedSingleCtaForward<C>>;

constexpr const char* kNone = "no single CTA kernel with masks for this layer";

template <Cell CELL, Scalar SCALAR, class Pass>
const char* masked_sweep(const Pass& args, const LaunchShape& shape, const void* packed, void* stream) {
  using MathPolicy = policy_t<SCALAR, false>;
  const int width = single_cta_width(MathPolicy::math, as_odd(args.hidden));
  return by_value<kSingleCtaWidths>(width, kNone, [&](auto of_width) -> const char* {
    constexpr int WIDTH = decltype(of_width)::value;
    if constexpr (has_width(MathPolicy::math, WIDTH, false)) {
      return by_arch(shape.arch, [&](auto of_arch) {
        constexpr Variant variant = variant_of(decltype(of_arch)::value, CELL, MathPolicy::math, Pass::backward, false);
        constexpr Arch ARCH = resident_arch(Path::single_cta, variant, WIDTH);
        using C = MaskedConfig<ARCH, CELL, MathPolicy, Pass::backward, WIDTH>;
        return launch_with<MaskedKernelOf<C>>(args, shape, packed, stream);
      });
    } else {
      return kNone;
    }
  });
}

template <class Pass>
const char* by_masked_layer(const Pass& args, const LaunchShape& shape, const void* packed, void* stream) {
  return with_cell(args.cell, [&](auto cell) {
    return by_scalar(args.scalar, [&](auto scalar) -> const char* {
      constexpr Cell CELL = decltype(cell)::cell;
      constexpr Scalar SCALAR = decltype(scalar)::value;
      if constexpr (has_masked_single_cta(CELL, SCALAR))
        return masked_sweep<CELL, SCALAR>(args, shape, packed, stream);
      else
        return kNone;
    });
  });
}

}  // namespace

const char* single_cta_forward(const MaskedForwardArgs& args, const LaunchShape& shape, const void* packed,
                               void* stream) {
  return by_masked_layer(args, shape, packed, stream);
}

const char* single_cta_backward(const MaskedBackwardArgs& args, const LaunchShape& shape, const void* packed,
                                void* stream) {
  return by_masked_layer(args, shape, packed, stream);
}

}  // namespace seqkernels
