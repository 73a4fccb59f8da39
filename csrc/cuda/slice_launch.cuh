// What launches of a cluster and of the persistent grid have in common.
#pragma once
#include "slice.cuh"
//
#include "dispatch.h"
#include "launch.cuh"

namespace seqkernels::device {

// A kernel's arguments, with the layout of shared memory.
template <class Kernel, class SliceArgs, class Args>
SliceArgs slice_args(const Args& args, const SliceShape& slices, int tile) {
  const SliceLayout layout = slice_layout(Kernel::variant, slices, args.hidden);
  SliceArgs p{};
  static_cast<Args&>(p) = args;
  p.tile = tile;
  p.stride = layout.stride;
  p.block = static_cast<int>(args.hidden) * element_bytes(Kernel::variant.math);
  p.gates_row = (Kernel::variant.backward ? stored_gradients_of(Kernel::CELL) : Kernel::G) * p.block;
  p.y_row = args.directions * p.block;
  p.saved_row = saved_blocks_of(Kernel::CELL) * p.y_row;
  p.exchange = layout.exchange;
  p.weights = layout.weights;
  p.bytes = layout.bytes;
  return p;
}

// Calls with the configuration of the kernel for a layer.
template <Path PATH, Cell CELL, class MathPolicy, bool BACKWARD, int UNITS, class Call>
const char* by_slice_config(const SweepArgs& args, Arch arch, Call call) {
  if (args.steps > INT32_MAX || args.sequences > INT32_MAX) return "more steps or sequences than several blocks count";
  return by_even(args.hidden, [&](auto even) {
    constexpr bool EVEN = decltype(even)::value;
    return by_arch(arch, [&](auto of_arch) -> const char* {
      constexpr Variant variant = variant_of(decltype(of_arch)::value, CELL, MathPolicy::math, BACKWARD, EVEN);
      if constexpr (resident_of(PATH, variant, UNITS) == 0) {
        return "no kernel by clusters for this architecture";
      } else {
        constexpr Arch ARCH = resident_arch(PATH, variant, UNITS);
        return call(SliceConfig<ARCH, PATH, CELL, MathPolicy, BACKWARD, UNITS, EVEN>{});
      }
    });
  });
}

}  // namespace seqkernels::device
