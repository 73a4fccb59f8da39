// The parts of the operators (ops.cpp): how a layer is swept, step by step or in one launch, and what is multiplied
// over all rows before and after it.
#pragma once
#include "context.h"
#include "kernels.h"
#include "step_offsets.h"

namespace seqkernels {

// ---- products over all rows: weight_grads.cpp

// The input projections [D, N, G*H], with all biases but GRU's b_hn.
Tensor project_input(const CallContext&, const Layer&, int64_t rows);

// What the gradients of x and of the weights are made of, once the sweep is done.
struct SweepGradients {
  Tensor gates;      // [D, N, F*H]
  Tensor projected;  // [D, N, P], of the projected h; [D, N, 0] without projection
};

void multiply_grad_x(const CallContext&, const Layer&, const SweepGradients&, Tensor& grad_x);
void multiply_grad_weights(const CallContext&, const LayerBackward&, const BackwardArgs&, const SweepGradients&,
                           Tensors& grad_weights);

// ---- step by step: stepwise_host.cpp. States come in as the initial ones (gradients as those of the final ones), and
// change in place; c and its gradient in the accumulator type.

void stepwise_forward(const CallContext&, const Layer&, const StepOffsets&, const ForwardArgs&, Tensor& h, Tensor& c);
void stepwise_backward(const CallContext&, const Layer&, const StepOffsets&, const BackwardArgs&, const SweepGradients&,
                       Tensor& grad_h, Tensor& grad_c);

// ---- all steps in one launch: sweep_host.cpp

void sweep_forward(const CallContext&, const Layer&, const Plan&, const ForwardArgs&);
void sweep_backward(const CallContext&, const Layer&, const Plan&, const BackwardArgs&);

}  // namespace seqkernels
