// All that crosses from the host (ops.cpp) to the kernels of a sweep: a pass over all steps of a layer, between the
// input projection and the products over all rows. Letters as in layer.h; F is the number of blocks of grad_gates, as
// stored_gradients_of() says: the gradients of the gates of h and, where some differ, all those of the gates of x
// behind them, so that either are one matrix.
#pragma once
#include "config.h"

namespace seqkernels {

constexpr int stored_gradients_of(Cell cell) { return apart_of(cell) ? 2 * gates_of(cell) : gates_of(cell); }

struct SweepArgs {
  Cell cell;
  Scalar scalar;
  bool tf32;  // float32 factors may be rounded to TF32
  int directions;
  int64_t steps, sequences, rows, hidden, projected;
  const int64_t *starts, *sizes;  // [T] first row and running sequences of each step, on the GPU; null: never fewer
};

struct ForwardArgs : SweepArgs {
  static constexpr bool backward = false;
  const void* gates_x;            // [D, N, G*H] the products with W_ih
  int first_direction;            // whose they are that come first
  const void* w_hh[2];            // [G*H, H]
  const void *b_ih[2], *b_hh[2];  // [G*H] or null
  const void* h_0;                // [D, B, H]
  const void* c_0;                // [D, B, H] or null
  void* y;                        // [N, D*H]
  void* h_n;                      // [D, B, H]
  void* c_n;                      // [D, B, H] or null
  void* saved;                    // [N, D, K*H] or null
};

struct BackwardArgs : SweepArgs {
  static constexpr bool backward = true;
  const void* grad_y;    // [N, D*H] or null
  const void* grad_h_n;  // [D, B, H] or null
  const void* grad_c_n;  // [D, B, H] or null
  const void* w_hh[2];
  const void* h_0;
  const void* c_0;
  const void* y;
  const void* saved;
  void* grad_gates;  // [D, N, F*H]
  void* grad_h_0;    // [D, B, H]
  void* grad_c_0;    // [D, B, H] or null
};

// What steps do beyond those of a plain layer. What multiplies what, of a layer with options
// (seqkernels/cell_options.py), in float (double); null where nothing does.
struct StepMasks {
  const void *recurrent, *candidate;  // [D, B, H] of h in its products, and of what a step adds to the state
  const void *zoneout_h, *zoneout_c;  // [N, D, H] how much of the state before stays
  // [N] which of C states is that of a row's piece, or null: sequences consist of pieces (seqkernels/ops.py), and the
  // layer's h_0 to c_n and their gradients are [D, C, H]. They go without the masks above.
  const int64_t* pieces;
  int64_t states;  // C

  bool any() const { return recurrent || candidate || zoneout_h || zoneout_c || pieces; }
};

struct MaskedForwardArgs : ForwardArgs {
  StepMasks masks;
};

struct MaskedBackwardArgs : BackwardArgs {
  StepMasks masks;
};

// ---- stepwise: what one of its kernels takes

struct StepForward {
  ForwardArgs layer;
  int64_t k;            // the k-th step of every direction
  int64_t running;      // no more sequences than these run in it
  const void* gates_h;  // [D, B, G*H] the product W_hh h
  void* h;              // [D, B, H] the states, changed in place; with a projection what is to be projected
  void* c;              // [D, B, H] in float (double), changed in place
  bool has_projection;  // then others write y
};

struct StepBackward {
  BackwardArgs layer;  // grad_y is null where it goes through a projection
  int64_t k, running;
  void* grad_h;         // [D, B, H]; but for the product with W_hh it becomes that of h before the step
  void* grad_c;         // [D, B, H] in float (double), changed in place
  void* grad_step;      // [D, B, G*H] gradients of the gates of h; zeros for sequences that do not run
  bool has_projection;  // then grad_h belongs to this step alone
};

struct MaskedStepForward : StepForward {
  StepMasks masks;
  void* factors;  // [D, B, H] h as products read it, if there is a mask for that
};

struct MaskedStepBackward : StepBackward {
  StepMasks masks;
  const void* grad_factors;  // [D, B, H] gradients of these that are still to be added to grad_h
};

// ---- layers with layer norm, stepwise or in one launch: LayerNormForward and LayerNormBackward say what is what

struct NormStep : SweepArgs {
  int64_t k, running;   // stepwise: the step
  const void* w_hh[2];  // in one launch: [G*H, H]
  Norms norms;
  StepMasks masks;
};

struct NormStepForward : NormStep {
  static constexpr bool backward = false;
  void* gates_h;     // [D, B, G*H] the product W_hh h; of an LSTM whose c is normalized, its own memory besides
  void *h, *c;       // [D, B, H] the states, changed in place
  void* factors;     // [D, B, H] h as products read it, if there is a mask for that
  void* y;           // [N, D*H]
  void* saved;       // [N, D, (G+S-1)*H] or null
  void* statistics;  // [N, D, 1 or 3] or null
};

struct NormStepBackward : NormStep {
  static constexpr bool backward = true;
  const void *grad_y, *h_0, *c_0, *y, *saved, *statistics;
  void *grad_h, *grad_c;              // [D, B, H] changed in place; of h but for the product with W_hh
  const void* grad_factors;           // [D, B, H] what is still to be added to grad_h, if there is a mask for that
  void* grad_step;                    // [D, B, G*H] grad_sums of the step; zeros for sequences that do not run
  void *grad_gates_x, *grad_sums;     // [N, D, G*H], grad_gates_x null of_sum
  void* factors;                      // [N, D, H]
  void *grad_scale, *grad_shift;      // [D, B, G*H] sums over the steps of each sequence; null without a shift
  void *grad_scale_c, *grad_shift_c;  // [D, B, H], null where there is no such
};

// Copies the states of sequences' first pieces, in the order of a direction, or of their last ones: from [D, C, H] to
// [D, B, H], or back. Those of sequences that never run are zeros, and go nowhere.
struct CopyPieces {
  SweepArgs layer;
  StepMasks masks;
  bool last, back;
  bool accumulated;  // [D, B, H] is in float (double)
  void* of_pieces;   // may be null: zeros
  void* of_sequences;
};

// result = added + mask * states, each [D, B, H]; added is null for nothing.
struct MaskStates {
  SweepArgs layer;
  const void *mask, *states, *added;
  void* result;
};

// With a projection P is the width of h and y. Copies the projected h of the sequences that run to their state and to
// y.
struct StepProject {
  SweepArgs layer;
  int64_t k, running;
  const void* result;  // [D, B, P] the product
  void* h;             // [D, B, P]
  void* y;             // [N, D*P]
};

// The gradient of the projected h: what came back through time and what came from y.
struct StepProjectBackward {
  SweepArgs layer;
  int64_t k, running;
  const void* grad_y;    // [N, D*P] or null
  void* grad_h;          // [D, B, P], zero afterwards where a sequence runs
  void* grad_step;       // [D, B, P] zeros for sequences that do not run
  void* grad_projected;  // [D, N, P] the same of all steps
};

// What the products for the gradients of the weights still need once the sweep is done, and the gradients of the
// biases.
struct FinishSweep {
  SweepArgs layer;
  // For every row the h that its step started from; zeros for rows that no step uses.
  const void* h_0;  // [D, B, P]
  const void* y;    // [N, D*P]
  void* previous;   // [D, N, P]
  // The gradients of the biases are sums over all rows.
  const void* grad_gates;             // [D, N, F*H]
  int64_t gates, columns;             // G*H and F*H; 0: there are no biases
  void *grad_b_ih[2], *grad_b_hh[2];  // [G*H]
};

struct MaskedFinishSweep : FinishSweep {
  StepMasks masks;
};

// o tanh(c) of every row: what an LSTM projects.
struct Unprojected {
  SweepArgs layer;
  int direction;
  const void* saved;  // [N, D, K*H]
  void* result;       // [N, H]
};

// Write first rows and sizes of steps from what the host knows, which travels with the launch: nothing is copied from
// the host's memory, nothing waits, and a CUDA graph that captures it can be replayed.
struct WriteSteps {
  static constexpr int runs = 128;
  int64_t steps;                               // of all
  int64_t begin;                               // of this launch's
  int count;                                   // runs of steps of one size
  int64_t end[runs], start[runs], size[runs];  // behind the run's last step, the first row of its first, sequences
  int64_t *starts, *sizes;                     // [T]
};

// Writes those recurrent weights that the threads of a single CTA read in every step, in the order in which they do
// (weights.cuh).
struct PackWeights {
  const void* w_hh[2];  // [G*H, H]
  void* packed;         // [D, vec16s]
  int gates, hidden;
  int width;        // hidden units that the kernel is made for
  int first_group;  // of fragments; those before it stay in registers and shared memory
  int vec16s;       // of a direction
  int m_tiles;      // of 16 rows that a warp takes
  bool transposed;  // backward: each gate's matrix
  bool tf32;        // rounded to TF32
};

// ---- one launch for all steps

// How a pass is launched: what the plan says, and what the GPU is.
struct LaunchShape {
  Arch arch;
  int tile;   // sequences that a CTA, a cluster or a group of clusters takes at once: 1 to kMaxTile
  int units;  // cluster: hidden units of a CTA, one of kClusterUnits; persistent grid: of a cluster of kGridClusters
  int shared_memory;  // bytes that a CTA may have
};

// What launches return: the text of an error, or null. A stream is a cudaStream_t.

const char* step_forward(const StepForward&, void* stream);
const char* step_backward(const StepBackward&, void* stream);
const char* step_forward(const MaskedStepForward&, void* stream);
const char* step_backward(const MaskedStepBackward&, void* stream);
const char* step_forward(const NormStepForward&, void* stream);
const char* step_backward(const NormStepBackward&, void* stream);
const char* mask_states(const MaskStates&, void* stream);
const char* copy_pieces(const CopyPieces&, void* stream);
const char* step_project(const StepProject&, void* stream);
const char* step_project_backward(const StepProjectBackward&, void* stream);
const char* finish_sweep(const FinishSweep&, void* stream);
const char* finish_sweep(const MaskedFinishSweep&, void* stream);
const char* unprojected(const Unprojected&, void* stream);
const char* write_steps(const WriteSteps&, void* stream);
const char* pack_weights(const PackWeights&, Scalar, int directions, void* stream);

// A CTA takes a tile. `packed`: what pack_weights() has written, if there is something.
const char* single_cta_forward(const ForwardArgs&, const LaunchShape&, const void* packed, void* stream);
const char* single_cta_backward(const BackwardArgs&, const LaunchShape&, const void* packed, void* stream);
const char* single_cta_forward(const MaskedForwardArgs&, const LaunchShape&, const void* packed, void* stream);
const char* single_cta_backward(const MaskedBackwardArgs&, const LaunchShape&, const void* packed, void* stream);

// With layer norm; states begin as the initial ones, as they do stepwise.
const char* single_cta_forward(const NormStepForward&, const LaunchShape&, const void* packed, void* stream);
const char* single_cta_backward(const NormStepBackward&, const LaunchShape&, const void* packed, void* stream);

// A cluster takes a tile.
const char* cluster_forward(const ForwardArgs&, const LaunchShape&, void* stream);
const char* cluster_backward(const BackwardArgs&, const LaunchShape&, void* stream);

// How many clusters of so many CTAs, of which each takes a multiprocessor, the current GPU runs at the same time.
const char* clusters_at_once(int cluster, int& count);

// Groups of clusters, which may be the whole grid, take the tiles in waves. The groups of a pass say what it needs in
// the GPU's memory: `exchange`, groups.bytes of zeros.
const char* persistent_grid_groups(const SweepArgs&, const LaunchShape&, bool backward, GridGroups& groups);
const char* persistent_grid_forward(const ForwardArgs&, const LaunchShape&, const GridGroups&, void* exchange,
                                    void* stream);
const char* persistent_grid_backward(const BackwardArgs&, const LaunchShape&, const GridGroups&, void* exchange,
                                     void* stream);

}  // namespace seqkernels
