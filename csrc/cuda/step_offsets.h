// Where the rows of each step begin, and how many sequences run in it.
#pragma once
#include "context.h"
#include "kernels.h"

namespace seqkernels {

// First rows and sizes of the steps, on the GPU; null pointers where every step has all sequences.
class StepOffsets {
 public:
  // The memory that it needs.
  static int64_t bytes(const Layer& p, const Optional& batch_sizes) {
    return batch_sizes && p.batch_sizes ? 2 * p.steps * static_cast<int64_t>(sizeof(int64_t)) : 0;
  }

  StepOffsets(const CallContext& context, const Layer& p, const Optional& batch_sizes, void* memory) : p_(p) {
    if (!batch_sizes || p.steps == 0) return;
    if (p.batch_sizes)
      write(context, static_cast<int64_t*>(memory));
    else
      add_up(context, *batch_sizes);
  }

  const int64_t* starts() const { return starts_; }
  const int64_t* sizes() const { return sizes_; }

  // Sequences that run in the k-th step of any direction, at most, as far as the host knows.
  int64_t running(int64_t k) const {
    if (!p_.batch_sizes) return p_.sequences;
    const int64_t forth = p_.batch_sizes[k], back = p_.batch_sizes[p_.steps - 1 - k];
    return p_.directions == 2 ? std::max(forth, back) : forth;
  }

 private:
  // From sizes that only the GPU knows.
  void add_up(const CallContext& context, const Tensor& batch_sizes) {
    kept_sizes_ = torch::stable::contiguous(batch_sizes);
    // A start is the sum of the sizes before it: the cumulative sums of a zero and the sizes. (The stable ABI subtracts
    // no integers.)
    Tensor shifted = context.allocate({p_.steps + 1}, ScalarType::Long);
    zero(shifted);
    Tensor behind_zero = torch::stable::narrow(shifted, 0, 1, p_.steps);
    copy(behind_zero, *kept_sizes_);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(shifted), torch::stable::detail::from(int64_t{0}),
                                      torch::stable::detail::from(std::optional<ScalarType>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
    kept_starts_ = torch::stable::detail::to<Tensor>(stack[0]);
    starts_ = static_cast<const int64_t*>(kept_starts_->const_data_ptr());
    sizes_ = static_cast<const int64_t*>(kept_sizes_->const_data_ptr());
  }

  // From sizes that the host knows: they travel with launches.
  void write(const CallContext& context, int64_t* memory) {
    starts_ = memory, sizes_ = memory + p_.steps;
    for (int64_t t = 0; t < p_.steps;) {
      WriteSteps part{};
      part.steps = p_.steps;
      part.begin = t;
      part.starts = memory;
      part.sizes = memory + p_.steps;
      for (; t < p_.steps && part.count < WriteSteps::runs; part.count++) {
        part.start[part.count] = p_.offsets[t];
        part.size[part.count] = p_.batch_sizes[t];
        while (t < p_.steps && p_.batch_sizes[t] == part.size[part.count]) t++;
        part.end[part.count] = t;
      }
      check_launch(write_steps(part, context.stream()));
    }
  }

  const Layer& p_;
  const int64_t *starts_ = nullptr, *sizes_ = nullptr;
  Optional kept_starts_, kept_sizes_;  // where torch made them
};

}  // namespace seqkernels
