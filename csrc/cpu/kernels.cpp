// The CPU kernels. Compiled once per instruction set with its own value of SEQKERNELS_ISA; everything lies in that
// namespace, and no std:: function is called, so that the linker can never take code of one instruction set for
// another.
#include "kernels.h"

#include "backward.h"
#include "forward.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// From run-time values to instances.
template <class Call>
auto with_scalar(Scalar scalar, const Call& call) {
  switch (scalar) {
    case Scalar::float64: return call(double{});
    case Scalar::bfloat16: return call(bfloat16{});
    case Scalar::float16: return call(float16{});
    default: return call(float{});
  }
}

#define SEQKERNELS_FOR_CELL(cell, function, ...)                                    \
  switch (cell) {                                                                   \
    case Cell::rnn_tanh: return function<Cell::rnn_tanh, decltype(s)>(__VA_ARGS__); \
    case Cell::rnn_relu: return function<Cell::rnn_relu, decltype(s)>(__VA_ARGS__); \
    case Cell::gru: return function<Cell::gru, decltype(s)>(__VA_ARGS__);           \
    case Cell::lstm: return function<Cell::lstm, decltype(s)>(__VA_ARGS__);         \
  }

int64_t forward_bytes(const Forward& p, const Schedule& schedule) {
  return with_scalar(p.scalar,
                     [&](auto s) { return ForwardMemory<decltype(s)>(p, schedule, nullptr).bytes(schedule); });
}

int64_t backward_bytes(const Backward& p, const Schedule& schedule) {
  return with_scalar(p.scalar,
                     [&](auto s) { return BackwardMemory<decltype(s)>(p, schedule, nullptr).bytes(schedule); });
}

void run_forward(const Forward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_scalar(p.scalar, [&](auto s) { SEQKERNELS_FOR_CELL(p.cell, forward, p, schedule, begin, end, memory) });
}

void run_backward(const Backward& p, const Schedule& schedule, int begin, int end, void* memory) {
  with_scalar(p.scalar, [&](auto s) { SEQKERNELS_FOR_CELL(p.cell, backward, p, schedule, begin, end, memory) });
}

#define SEQKERNELS_STRING_(x) #x
#define SEQKERNELS_STRING(x) SEQKERNELS_STRING_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    SEQKERNELS_STRING(SEQKERNELS_ISA), forward_bytes, backward_bytes, run_forward, run_backward,
};

}  // namespace seqkernels::SEQKERNELS_ISA
