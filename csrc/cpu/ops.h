// Both passes over a stack of layers, or over those of an ensemble: what the CPU's operators do with their arguments.
#pragma once
#include <tuple>

#include "../arguments.h"
#include "../mask_arguments.h"

namespace seqkernels {

using Results = std::tuple<Tensor, Tensor, Optional, Optional>;  // y, h_n, c_n, saved
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;      // the same as operators have them
using Backward = std::tuple<Tensor, Tensors, Tensor, Tensor>;    // of x, of weights, of h_0, of c_0

// `launch` [0 to 3], of both passes: Layer::bfloat16_parts, Layer::as_among_others, and in which slot the packed
// weights of the forward pass stay (kept_weights.h); 0: nowhere (seqkernels/backends/cpu.py).
using Launch = std::vector<int64_t>;

// `empty`: also results without elements, as operators have them; they take a short call's time.
Results forward(const StackArguments& given, bool save, const Launch& launch, const Optional& pieces,
                const MaskArguments& masks = {}, bool empty = true);
Backward backward(const StackArguments& given, const BackwardArguments& of_backward, bool wants_x, bool wants_weights,
                  const Launch& launch, const Optional& pieces, const MaskArguments& masks = {});

}  // namespace seqkernels
