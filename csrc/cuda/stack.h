// All layers of a pass, one after the other or as a wavefront.
#pragma once
#include "results.h"

namespace seqkernels {

void run_forward(const CallContext&, LayerForward&, const CheckedArguments&, const Plan&, bool tf32,
                 const Optional& batch_sizes, const StepMasks&, ForwardResults&);
void run_backward(const CallContext&, LayerBackward&, const CheckedArguments&, const Plan&, bool tf32, int64_t rows,
                  const Optional& batch_sizes, const StepMasks&, BackwardResults&);

}  // namespace seqkernels
