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

// Those of a stack of layers. The kernels see by fingerprints whether they are still what the weights would become.
class KeptWeights {
 public:
  // The memory of a layer; all zero where it lay otherwise before. Null for no bytes.
  void* of_layer(size_t layer, const PackedLayout& layout) {
    if (!layout.bytes) return nullptr;
    if (layers_.size() <= layer) layers_.resize(layer + 1);
    OfLayer& own = layers_[layer];
    if (own.memory && !memcmp(&own.layout, &layout, sizeof(layout))) return own.memory.get();
    own.memory.reset();
    own.memory.reset(::operator new(layout.bytes, kAlignment));
    own.layout = layout;
    return memset(own.memory.get(), 0, layout.bytes);
  }

  int64_t bytes() const {
    return sum([](const OfLayer& layer) { return layer.layout.bytes; });
  }
  // How many panels were packed since they lie as they do.
  int64_t packed() const {
    return sum([](const OfLayer& layer) { return *static_cast<int64_t*>(layer.memory.get()); });
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  struct OfLayer {
    PackedLayout layout{};
    std::unique_ptr<void, Release> memory;
  };
  template <class Of>
  int64_t sum(const Of& of) const {
    int64_t sum = 0;
    for (const OfLayer& layer : layers_) sum += layer.memory ? of(layer) : 0;
    return sum;
  }

  std::vector<OfLayer> layers_;
};

// What a call takes from one of the places where they lie, and puts back. While it has them, another call with the same
// place packs its weights for itself. So it does in the child of a process that was forked meanwhile.
class FromPlace {
 public:
  static constexpr int64_t kPlaces = 4096;  // numbered from 1 on

  explicit FromPlace(int64_t place) : place_(place >= 1 && place <= kPlaces ? &places_[place - 1] : nullptr) {
    if (!place_) return;
    weights_ = place_->exchange(&taken_);
    if (weights_ == &taken_) place_ = nullptr, weights_ = nullptr;
    if (place_ && !weights_) weights_ = new KeptWeights;
  }
  ~FromPlace() {
    if (place_) place_->store(weights_);
  }
  FromPlace(const FromPlace&) = delete;

  KeptWeights* weights() const { return weights_; }  // null where there are none to be had

  static void release(int64_t place) {
    FromPlace from(place);
    delete std::exchange(from.weights_, nullptr);
  }

 private:
  static inline KeptWeights taken_;
  static inline std::atomic<KeptWeights*> places_[kPlaces]{};

  std::atomic<KeptWeights*>* place_;
  KeptWeights* weights_ = nullptr;
};

}  // namespace seqkernels
