// The launches of the kernels of one cell and one dtype; float32 counts twice, exact and rounded to TF32.
// single_cta.cu, cluster.cu and persistent_grid.cu are compiled once for each, with -DSEQKERNELS_CELL_NAME=gru
// -DSEQKERNELS_SCALAR_NAME=float32 -DSEQKERNELS_TF32=true, so that a build uses all cores. dispatch.cpp chooses among
// them.
#pragma once
#include "kernels.h"

#define SEQKERNELS_INSTANCE Cell::SEQKERNELS_CELL_NAME, Scalar::SEQKERNELS_SCALAR_NAME, SEQKERNELS_TF32

namespace seqkernels {

template <Cell CELL, Scalar SCALAR, bool TF32>
const char* single_cta_forward(const ForwardArgs&, const LaunchShape&, const void* packed, void* stream);
template <Cell CELL, Scalar SCALAR, bool TF32>
const char* single_cta_backward(const BackwardArgs&, const LaunchShape&, const void* packed, void* stream);

template <Cell CELL, Scalar SCALAR, bool TF32>
const char* cluster_forward(const ForwardArgs&, const LaunchShape&, void* stream);
template <Cell CELL, Scalar SCALAR, bool TF32>
const char* cluster_backward(const BackwardArgs&, const LaunchShape&, void* stream);

template <Cell CELL, Scalar SCALAR, bool TF32>
const char* persistent_grid_forward(const ForwardArgs&, const LaunchShape&, const GridGroups&, void* exchange,
                                    void* flags, void* stream);
template <Cell CELL, Scalar SCALAR, bool TF32>
const char* persistent_grid_backward(const BackwardArgs&, const LaunchShape&, const GridGroups&, void* exchange,
                                     void* flags, void* stream);

}  // namespace seqkernels
