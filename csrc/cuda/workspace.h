// The memory of a pass besides its results: one allocation, carved up.
#pragma once
#include "context.h"

namespace seqkernels {

// Gives out the parts of a block, one after another; without a block it only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  // Null for nothing.
  void* take(int64_t bytes) {
    void* part = block_ && bytes ? block_ + size_ : nullptr;
    size_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 256;  // of matrices whose products are fastest

  char* block_;
  int64_t size_ = 0;
};

// A block that is as large as its Parts need, which take theirs from a Carver when they are made.
template <class Parts>
class Workspace {
 public:
  template <class... Args>
  explicit Workspace(const CallContext& context, const Args&... args) : parts_(make(nullptr, args...)) {
    block_ = context.allocate({size_}, ScalarType::Byte);
    parts_ = make(block_->mutable_data_ptr(), args...);
  }

  const Parts& operator*() const { return parts_; }
  const Parts* operator->() const { return &parts_; }

 private:
  template <class... Args>
  Parts make(void* block, const Args&... args) {
    Carver carver(block);
    const Parts parts(carver, args...);
    size_ = carver.size();
    return parts;
  }

  int64_t size_ = 0;
  Optional block_;
  Parts parts_;
};

}  // namespace seqkernels
