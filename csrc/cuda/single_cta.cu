// The single CTA kernels of one cell and dtype (instances.h).
#include "single_cta_launch.cuh"
//
#include "instances.h"

namespace seqkernels {

using namespace device;

template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* single_cta_sweep(const Pass& args, const LaunchShape& shape, const void* packed, void* stream) {
  using MathPolicy = policy_t<SCALAR, TF32>;
  return by_even(args.hidden, [&](auto even) {
    constexpr const char* none = "no single CTA kernel for so many hidden units in this dtype";
    constexpr bool EVEN = decltype(even)::value;
    const int width = single_cta_width(MathPolicy::math, args.hidden);
    return by_value<kSingleCtaWidths>(width, none, [&](auto of_width) -> const char* {
      constexpr int WIDTH = decltype(of_width)::value;
      if constexpr (has_width(MathPolicy::math, WIDTH, EVEN)) {
        return by_arch(shape.arch, [&](auto of_arch) {
          constexpr Variant variant =
              variant_of(decltype(of_arch)::value, CELL, MathPolicy::math, Pass::backward, EVEN);
          constexpr Arch ARCH = resident_arch(Path::single_cta, variant, WIDTH);
          using C = SingleCtaConfig<ARCH, CELL, MathPolicy, Pass::backward, WIDTH, EVEN>;
          if constexpr (has_one_sequence(C::variant, WIDTH))
            if (shape.tile == 1) return launch_with<KernelOf<OneSequence<C>>>(args, shape, packed, stream);
          return launch_with<KernelOf<C>>(args, shape, packed, stream);
        });
      } else {
        return none;
      }
    });
  });
}

template const char* single_cta_sweep<SEQKERNELS_INSTANCE, ForwardArgs>(const ForwardArgs&, const LaunchShape&,
                                                                        const void*, void*);
template const char* single_cta_sweep<SEQKERNELS_INSTANCE, BackwardArgs>(const BackwardArgs&, const LaunchShape&,
                                                                         const void*, void*);

}  // namespace seqkernels
