// What launches of the single CTA kernels have in common.
#pragma once
#include "single_cta_backward.cuh"
#include "single_cta_forward.cuh"
//
#include "dispatch.h"
#include "launch.cuh"

namespace seqkernels::device {

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

}  // namespace seqkernels::device
