// Launches of the single CTA kernels of layers with layer norm: has_norm_single_cta() says which there are.
#include "norm_single_cta_backward.cuh"
#include "norm_single_cta_forward.cuh"
#include "single_cta_launch.cuh"

namespace seqkernels {

using namespace device;

namespace {

constexpr const char* kNone = "no single CTA kernel with layer norm for this layer";

template <template <class> class Kernel, Cell CELL, class Pass>
const char* norm_sweep(const Pass& args, const LaunchShape& shape, const void* packed, void* stream) {
  const int width = single_cta_width(Math::fp32_fma, as_odd(args.hidden));
  return by_value<kSingleCtaWidths>(width, kNone, [&](auto of_width) -> const char* {
    constexpr int WIDTH = decltype(of_width)::value;
    if constexpr (has_width(Math::fp32_fma, WIDTH, false)) {
      return by_arch(shape.arch, [&](auto of_arch) {
        constexpr Variant variant = variant_of(decltype(of_arch)::value, CELL, Math::fp32_fma, Pass::backward, false);
        constexpr Arch ARCH = resident_arch(Path::single_cta, variant, WIDTH);
        return launch_with<Kernel<NormConfig<ARCH, CELL, Fp32Fma, Pass::backward, WIDTH>>>(args, shape, packed, stream);
      });
    } else {
      return kNone;
    }
  });
}

template <template <class> class Kernel, class Pass>
const char* by_norm_layer(const Pass& args, const LaunchShape& shape, const void* packed, void* stream) {
  return with_cell(args.cell, [&](auto cell) -> const char* {
    constexpr Cell CELL = decltype(cell)::cell;
    if constexpr (has_norm_single_cta(CELL, Scalar::float32))
      return args.scalar == Scalar::float32 ? norm_sweep<Kernel, CELL>(args, shape, packed, stream) : kNone;
    else
      return kNone;
  });
}

}  // namespace

const char* single_cta_forward(const NormStepForward& args, const LaunchShape& shape, const void* packed,
                               void* stream) {
  return by_norm_layer<NormSingleCtaForward>(args, shape, packed, stream);
}

const char* single_cta_backward(const NormStepBackward& args, const LaunchShape& shape, const void* packed,
                                void* stream) {
  return by_norm_layer<NormSingleCtaBackward>(args, shape, packed, stream);
}

}  // namespace seqkernels
