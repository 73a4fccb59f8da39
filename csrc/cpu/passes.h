// What operators of the CPU backend share: how they run a pass, and what they do about rows and states that no step
// uses.
#pragma once
#include "../check.h"
#include "memory.h"
#include "schedule.h"

namespace seqkernels {

// A pass over a layer: one of `Kernels`.
template <class P>
struct Pass {
  int64_t (*bytes)(const P&, const Schedule&);
  void (*run)(const P&, const Schedule&, int begin, int end, void* memory);

  void operator()(const P& p, int threads, WorkingMemory& working) const {
    const OwnSchedule schedule(p, threads);
    void* memory = working.data(static_cast<size_t>(bytes(p, schedule)));
    if (schedule.members == 1) return run(p, schedule, 0, 1, memory);
    torch::stable::parallel_for(0, schedule.members, 1, [&](int64_t begin, int64_t end) {
      run(p, schedule, static_cast<int>(begin), static_cast<int>(end), memory);
    });
  }
};

// Rows that no step uses are zeros; of `rows` rows of `bytes` bytes in all.
inline void zero_rows(void* data, int64_t bytes, int64_t rows, int64_t from) {
  if (!data || !bytes || rows == from) return;
  const int64_t row = bytes / rows;
  memset(static_cast<char*>(data) + from * row, 0, (rows - from) * row);
}

inline void* pointer(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

inline void zero(Tensor& tensor) {
  if (tensor.numel()) memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
}

// States that no row uses stay as they are: `to` [D, C, n] from `from`, zeros where that is null.
inline void copy_states(const CheckedArguments& arguments, const Layer& p, void* to, const void* from, int64_t n,
                        int64_t element_size) {
  const size_t bytes = static_cast<size_t>(p.directions * p.states * n * element_size);
  if (arguments.states_used() == p.states || !to || !bytes) return;
  if (from)
    memcpy(to, from, bytes);
  else
    memset(to, 0, bytes);
}

}  // namespace seqkernels
