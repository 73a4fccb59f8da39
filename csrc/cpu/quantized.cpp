// The kernels of quantized layers, compiled once for each instruction set, as kernels.cpp is.
#include "kernels.h"

#include "quantized.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

int64_t bytes(const LayerForward& p, const Schedule& schedule) {
  return QuantizedMemory(p, schedule, nullptr).bytes(schedule);
}

void run(const LayerForward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_cell(p.cell, [&](auto traits) {
    constexpr Cell kCell = decltype(traits)::cell;
#if defined(__AVX512F__)
    if (p.int8_products) return quantized_forward<kCell, int8x4_vnni>(p, schedule, begin, end, memory);
#endif
    quantized_forward<kCell, int8x4>(p, schedule, begin, end, memory);
  });
}

}  // namespace

extern const QuantizedKernels quantized_kernels;
const QuantizedKernels quantized_kernels = {bytes, run};

}  // namespace seqkernels::SEQKERNELS_ISA
