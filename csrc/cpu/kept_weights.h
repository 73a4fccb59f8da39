// Packed weights that stay between calls of a module (seqkernels/kept_weights.py says of which).
#pragma once
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../layer.h"

namespace seqkernels {

// Those of a stack of layers.
class KeptWeights {
 public:
  // The memory of a layer, or null: it is there from the second call on that wants the same, so that calls which want
  // this and that in turns leave it as it is.
  void* of_layer(size_t layer, const PackedLayout& layout) {
    if (!layout.bytes) return nullptr;
    if (layers_.size() <= layer) layers_.resize(layer + 1);
    OfLayer& own = layers_[layer];
    const bool again = same(own.wanted, layout);
    own.wanted = layout;
    if (own.memory && same(own.layout, layout)) return own.memory.get();
    if (!again) return nullptr;
    own.memory.reset();
    own.memory.reset(::operator new(layout.bytes, kAlignment));
    own.layout = layout;
    memset(own.memory.get(), 0, layout.panels * sizeof(int64_t));
    return own.memory.get();
  }

  int64_t bytes() const {
    return sum([](const OfLayer& layer) { return layer.layout.bytes; });
  }
  // How often panels were packed.
  int64_t packed() const {
    return sum([](const OfLayer& layer) {
      const int64_t* counts = static_cast<const int64_t*>(layer.memory.get());
      int64_t sum = 0;
      for (int64_t i = 0; i < layer.layout.panels; i++) sum += counts[i];
      return sum;
    });
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  struct OfLayer {
    PackedLayout layout{}, wanted{};
    std::unique_ptr<void, Release> memory;
  };

  static bool same(const PackedLayout& a, const PackedLayout& b) { return !memcmp(&a, &b, sizeof(a)); }

  template <class Of>
  int64_t sum(const Of& of) const {
    int64_t sum = 0;
    for (const OfLayer& layer : layers_) sum += layer.memory ? of(layer) : 0;
    return sum;
  }

  std::vector<OfLayer> layers_;
};

// What a call takes from one of the slots where they lie, when it first needs it, and puts back. While it has them,
// another call with the same slot packs its weights for itself. So it does in the child of a process that was forked
// meanwhile.
class FromSlot {
 public:
  static constexpr int64_t kSlots = 4096;  // numbered from 1 on

  explicit FromSlot(int64_t slot) : slot_(slot >= 1 && slot <= kSlots ? &slots_[slot - 1] : nullptr) {}
  ~FromSlot() {
    if (weights_) slot_->store(weights_);
  }
  FromSlot(const FromSlot&) = delete;

  KeptWeights* weights() {  // null where there are none to be had
    if (!slot_ || weights_) return weights_;
    weights_ = slot_->exchange(&taken_);
    if (weights_ == &taken_)
      slot_ = nullptr, weights_ = nullptr;
    else if (!weights_)
      weights_ = new KeptWeights;
    return weights_;
  }

  explicit operator bool() const { return slot_; }

  static void release(int64_t slot) {
    FromSlot from(slot);
    if (!from.weights()) return;
    delete std::exchange(from.weights_, nullptr);
    from.slot_->store(nullptr);
  }

 private:
  static inline KeptWeights taken_;
  static inline std::atomic<KeptWeights*> slots_[kSlots]{};

  std::atomic<KeptWeights*>* slot_;
  KeptWeights* weights_ = nullptr;
};

}  // namespace seqkernels
