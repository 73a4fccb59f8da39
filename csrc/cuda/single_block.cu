// Launches of the single-block kernels: which there are, and how much of the weights each holds in registers.
#include "single_block.h"

namespace seqkernels {

using namespace device;

namespace {

// Fragments of the weights that a thread can hold in registers beside all else without spilling, as the compiler's code
// for sm_80 and sm_90a has it; tests/test_cuda_compiled.py reads it there. Widths are multiples of 32 up to 128.
template <class Product>
constexpr int held(Cell cell, int hidden, bool backward) {
  const bool lstm = cell == Cell::lstm, wide = hidden > 64;
  if (std::is_same_v<Product, Exact>) {
    if (lstm) return backward ? 14 : wide ? 8 : 7;
    return backward ? 15 : 11;
  }
  if (std::is_same_v<Product, Tf32>) return lstm && backward ? 15 : 18;
  return lstm && hidden == 96 ? (backward ? 9 : 11) : 13;
}

template <template <Cell, class, int, int, int> class Pass, bool BACKWARD, Cell CELL, class Product, int HIDDEN>
const char* launch_kernel(const typename Pass<CELL, Product, HIDDEN, 1, 1>::Parameters& p, void* stream) {
  using Kernel = Pass<CELL, Product, HIDDEN, 1, held<Product>(CELL, HIDDEN, BACKWARD)>;
  const Sweep& s = p.arrays;
  const int64_t blocks = (s.sequences + p.sequences - 1) / p.sequences;
  return launch<Kernel>(blocks, s.directions, Kernel::shared_bytes, stream, p);
}

template <template <Cell, class, int, int, int> class Pass, bool BACKWARD, Cell CELL, class Product, class Parameters>
const char* by_width(const Parameters& p, void* stream) {
  const int64_t hidden = p.arrays.hidden;
  if (hidden <= 32) return launch_kernel<Pass, BACKWARD, CELL, Product, 32>(p, stream);
  if (hidden <= 64) return launch_kernel<Pass, BACKWARD, CELL, Product, 64>(p, stream);
  if (hidden <= 96) return launch_kernel<Pass, BACKWARD, CELL, Product, 96>(p, stream);
  if (hidden <= 128) return launch_kernel<Pass, BACKWARD, CELL, Product, 128>(p, stream);
  return "no single-block kernel for so many hidden units";
}

template <template <Cell, class, int, int, int> class Pass, bool BACKWARD, class Product, class Parameters>
const char* by_cell(const Parameters& p, void* stream) {
  switch (p.arrays.cell) {
    case Cell::rnn_tanh: return by_width<Pass, BACKWARD, Cell::rnn_tanh, Product>(p, stream);
    case Cell::rnn_relu: return by_width<Pass, BACKWARD, Cell::rnn_relu, Product>(p, stream);
    case Cell::gru: return by_width<Pass, BACKWARD, Cell::gru, Product>(p, stream);
    default: return by_width<Pass, BACKWARD, Cell::lstm, Product>(p, stream);
  }
}

template <template <Cell, class, int, int, int> class Pass, bool BACKWARD, class Parameters>
const char* by_product(const Parameters& p, void* stream) {
  switch (p.arrays.scalar) {
    case Scalar::bfloat16: return by_cell<Pass, BACKWARD, MatrixCores<bfloat16>>(p, stream);
    case Scalar::float16: return by_cell<Pass, BACKWARD, MatrixCores<float16>>(p, stream);
    case Scalar::float32:
      return p.arrays.tf32 ? by_cell<Pass, BACKWARD, Tf32>(p, stream) : by_cell<Pass, BACKWARD, Exact>(p, stream);
    default: return "no single-block kernel for float64";
  }
}

}  // namespace

const char* single_block_forward(const ForwardSweep& sweep, int sequences, void* stream) {
  return by_product<SingleBlockForward, false>(Tiled<ForwardSweep>{sweep, sequences}, stream);
}

const char* single_block_backward(const BackwardSweep& sweep, int sequences, void* stream) {
  return by_product<SingleBlockBackward, true>(Tiled<BackwardSweep>{sweep, sequences}, stream);
}

}  // namespace seqkernels
