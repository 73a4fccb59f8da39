// Memory for results and for work in progress.
#pragma once
#include <atomic>
#include <cstring>
#include <new>

#include "../tensors.h"

namespace seqkernels {

// For tests: all memory starts as NaN.
inline bool fill_with_nan = false;

inline Tensor allocate(ScalarType type, const Shape& shape) {
  const Shape strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (fill_with_nan && tensor.numel()) memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

// Working memory of one call after another. The block of the last is kept for the next, as the system would clear every
// page of a large new one; blocks of more than kMaxKept bytes are not.
class WorkingMemory {
 public:
  WorkingMemory() : block_(kept_.exchange(nullptr)) {}
  ~WorkingMemory() { release(block_ && block_->size <= kMaxKept ? kept_.exchange(block_) : block_); }
  WorkingMemory(const WorkingMemory&) = delete;

  // Of at least `size` bytes. What was there before is lost.
  void* data(size_t size) {
    if (!block_ || block_->size < size) {
      release(block_);
      block_ = nullptr;
      void* data = ::operator new(sizeof(Block) + size, std::align_val_t(alignof(Block)));
      block_ = new (data) Block{size};
    }
    if (fill_with_nan) memset(block_ + 1, 0xff, size);
    return block_ + 1;
  }

  static void release_kept() { release(kept_.exchange(nullptr)); }

 private:
  struct alignas(64) Block {
    size_t size;
  };
  static constexpr size_t kMaxKept = 256 << 20;
  static inline std::atomic<Block*> kept_{nullptr};

  static void release(Block* block) {
    if (block) ::operator delete(block, std::align_val_t(alignof(Block)));
  }

  Block* block_;
};

}  // namespace seqkernels
