// The choice of instruction set, made when the library is loaded.
#pragma once
#include "kernels.h"

namespace seqkernels {

const Kernels& kernels();  // those in use
const QuantizedKernels& quantized_kernels();
const LayerNormKernels& layer_norm_kernels();
bool bfloat16_products();  // whether they may multiply pairs of bfloat16
bool bfloat16_tiles();     // and tiles of them
bool int8_products();      // whether they may multiply fours of int8
bool int8_tiles();         // and tiles of them
const char* kernels_name();
const char* built_kernels();           // names of all in this binary, best first
bool force_kernels(const char* name);  // for tests; false if this machine or binary has none of that name

}  // namespace seqkernels
