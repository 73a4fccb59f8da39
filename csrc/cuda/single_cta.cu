// The single CTA kernels of one cell and dtype (instances.h).
#include "single_cta_backward.cuh"
#include "single_cta_forward.cuh"
//
#include "dispatch.h"
#include "instances.h"
#include "launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

template <class Kernel, class Args>
const char* launch_with(const Args& args, const LaunchShape& shape, const void* packed, void* stream) {
  constexpr SingleCtaLayout layout = Kernel::layout;
  if (!layout.fits(shape.shared_memory)) return "a block has too little shared memory for a single CTA kernel";
  SingleCtaArgs<Args> p{};
  static_cast<Args&>(p) = args;
  p.packed = packed;
  p.tile = shape.tile;
  p.shared_groups = layout.shared_groups(shape.shared_memory);
  return launch<Kernel>((args.sequences + shape.tile - 1) / shape.tile, args.directions,
                        layout.bytes(shape.shared_memory), stream, p);
}

// Whether there is a kernel of this width for even or for odd numbers of units.
constexpr bool has_width(Math math, int width, bool even) { return single_cta_width(math, width - !even) == width; }

template <class C>
using KernelOf = std::conditional_t<C::variant.backward, SingleCtaBackward<C>, SingleCtaForward<C>>;

}  // namespace

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
