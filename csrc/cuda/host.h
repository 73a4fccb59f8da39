// The parts of the operators (ops.cpp): how a layer is swept, step by step or in one launch, and what is multiplied
// over all rows before and after it.
#pragma once
#include "context.h"
#include "kernels.h"
#include "step_offsets.h"
#include "wavefront.h"
#include "workspace.h"

namespace seqkernels {

// ---- how all steps are launched at once: sweep_host.cpp

struct SweepLaunch {
  Path path;
  bool backward, masked, layer_norm;
  int64_t hidden;  // by which a single CTA is chosen: where LayerFacts::by_odd(), as_odd()
  LaunchShape shape{};
  SingleCtaLayout layout{};
  int64_t packed_bytes = 0;  // of the weights that a single CTA reads in every step, all directions
  GridGroups groups{};       // of the persistent grid

  SweepLaunch(const CallContext&, const Layer&, const Plan&, const SweepArgs&, const StepMasks&, bool backward,
              bool layer_norm = false);
};

struct SweepWorkspace {
  void *packed, *exchange;

  SweepWorkspace(Carver&, const SweepLaunch&);
};

// Packs what a single CTA reads in every step, if there is something.
void pack_weights(const CallContext&, const SweepArgs&, const void* const (&w_hh)[2], const SweepLaunch&,
                  const SweepWorkspace&);

void sweep_forward(const CallContext&, const SweepLaunch&, const SweepWorkspace&, const ForwardArgs&, const StepMasks&);
void sweep_backward(const CallContext&, const SweepLaunch&, const SweepWorkspace&, const BackwardArgs&,
                    const StepMasks&);

// ---- products over all rows: weight_grads.cpp

// States from one chunk of the steps to the next, or their gradients: in turn in one and the other. Null where a chunk
// has all steps.
struct States {
  void *h[2], *c[2];  // [B, H], c null where there is none

  States(Carver&, const CallContext&, const Layer&, const Wavefront&);
};

struct ForwardWorkspace {
  void* gates_x;  // [D, N, G*H] the input projections, of a chunk
  States between;
  SweepWorkspace sweep;

  ForwardWorkspace(Carver&, const CallContext&, const Layer&, const Wavefront&, const SweepLaunch&);
};

// One product for all directions, into ForwardArgs::gates_x.
void project_input(const CallContext&, const Layer&, int64_t rows, const ForwardWorkspace&, ForwardArgs&);

struct BackwardWorkspace {
  void* gates;      // [D, N, F*H] gradients
  void* projected;  // [D, N, P] of the projected h, or null
  void* previous;   // [D, N, P] the states that steps started from; null if no weight's gradient is wanted
  void* c;          // [chunks - 1, B, H] that chunks but the first start from, or null
  States between;
  SweepWorkspace sweep;

  BackwardWorkspace(Carver&, const CallContext&, const Layer&, const Wavefront&, int64_t rows, bool wants_weights,
                    const SweepLaunch&);
};

// Of a call: of every stream what its layers use one after the other.
template <class OfStream>
struct CallWorkspace {
  void* steps;
  std::vector<OfStream> streams;

  template <class... Args>
  CallWorkspace(Carver& carver, int64_t bytes_of_steps, int64_t count, const Args&... args)
      : steps(carver.take(bytes_of_steps)) {
    for (int64_t i = 0; i < count; i++) streams.emplace_back(carver, args...);
  }
};

// What the gradients of x and of the weights are made of, once the sweep is done.
struct SweepGradients {
  explicit SweepGradients(const Tensor& gates) : gates(gates) {}

  Tensor gates;        // [D, N, F*H]
  Optional projected;  // [D, N, P], with a projection
};

void multiply_grad_x(const CallContext&, const Layer&, const SweepGradients&, Tensor& grad_x);
void multiply_grad_weights(const CallContext&, const LayerBackward&, const BackwardArgs&, const SweepGradients&,
                           const BackwardWorkspace&, const StepMasks&, Tensors& grad_weights);

// ---- what the operators do first: ops.cpp

Plan plan_of(int64_t path, int64_t tile, int64_t units, int64_t chunks = 1);

// What forward and backward sweeps have in common, but for the steps. `rows`: of x.
void set_sweep(SweepArgs&, const Layer&, int64_t rows, bool tf32);

// Rows that no step uses are zeros; where only the GPU knows which these are, all rows are. `ragged`: there may be
// some.
void zero_rows(const CallContext&, const Layer&, void* data, int64_t elements, int64_t rows, bool ragged);

// Fills a state that changes in place with the initial state (its gradient with that of the final one), or with zeros.
void begin_as(const CallContext&, Tensor& state, const void* initial);

// ---- step by step: stepwise_host.cpp. The final states, or the gradients of the initial ones, come out; of pieces
// where the sweep's arguments point.

void stepwise_forward(const CallContext&, const Layer&, const StepOffsets&, const ForwardArgs&, const StepMasks&,
                      Tensor& h_n, Tensor& c_n);
void stepwise_backward(const CallContext&, const Layer&, const StepOffsets&, const BackwardArgs&, const StepMasks&,
                       const SweepGradients&, Tensor& grad_h_0, Tensor& grad_c_0);

// The same of a layer with layer norm; the states and their gradients are in `step` already.
void stepwise_forward(const CallContext&, const Layer&, const StepOffsets&, NormStepForward& step, Tensor& h);
void stepwise_backward(const CallContext&, const Layer&, const StepOffsets&, NormStepBackward& step, Tensor& grad_h);

}  // namespace seqkernels
