// The launches of the kernels of one cell and dtype; float32 counts twice, exact and rounded to TF32. single_cta.cu,
// cluster.cu and persistent_grid.cu are compiled once for each, with -DSEQKERNELS_CELL_NAME=gru
// -DSEQKERNELS_SCALAR_NAME=float32 -DSEQKERNELS_TF32=true, so that a build uses all cores and no compiler is busy for
// long; cluster.cu, which takes longest, for each pass as well, with -DSEQKERNELS_PASS=ForwardArgs. dispatch.cpp
// chooses among them.
#pragma once
#include "kernels.h"

#define SEQKERNELS_INSTANCE Cell::SEQKERNELS_CELL_NAME, Scalar::SEQKERNELS_SCALAR_NAME, SEQKERNELS_TF32

namespace seqkernels {

// Pass: ForwardArgs or BackwardArgs.
template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* single_cta_sweep(const Pass&, const LaunchShape&, const void* packed, void* stream);

template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* cluster_sweep(const Pass&, const LaunchShape&, void* stream);

template <Cell CELL, Scalar SCALAR, bool TF32, class Pass>
const char* persistent_grid_sweep(const Pass&, const LaunchShape&, const GridGroups&, void* exchange, void* stream);

}  // namespace seqkernels
