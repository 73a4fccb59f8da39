// Whether packed weights are still those of what they were packed from.
#pragma once
#include "gemm_pack.h"

namespace seqkernels::SEQKERNELS_ISA {

// What tells the numbers of a panel from others: the sum of their 64-bit words, which any one that changes changes, and
// sums of products of both halves of a word, each with a key of its place. For others than those numbers it is the same
// by chance alone, of 2^-64 at most. Never zero.
struct Fingerprint {
  uint64_t sums[8];
};

// Adds up fingerprints, at 55 GB/s on a core that packs 20.
class FingerprintSums {
  typedef uint64_t Words __attribute__((vector_size(32)));
  static constexpr int kAtOnce = 4;  // vectors

 public:
  void add(const void* data, int64_t bytes) {
    constexpr int64_t kBytes = sizeof(Words) * kAtOnce;
    const char* from = static_cast<const char*>(data);
    for (; bytes >= kBytes; bytes -= kBytes, from += kBytes) add_block(from);
    if (!bytes) return;
    char rest[kBytes] = {};
    memcpy(rest, from, bytes);
    add_block(rest);
  }

  Fingerprint sum() const {
    Words all[2] = {};
    for (int i = 0; i < kAtOnce; i++) all[0] += products_[i] * (2 * i + 1), all[1] ^= words_[i];
    all[0] |= 1;
    Fingerprint sum;
    memcpy(&sum, all, sizeof(sum));
    return sum;
  }

 private:
  SEQKERNELS_INLINE void add_block(const char* from) {
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; i++) {
      Words word;
      memcpy(&word, from + i * sizeof(Words), sizeof(word));
      words_[i] += word;
      word ^= key_;
      add_product_of_halves(word, products_[i]);
    }
    key_ += kKeyStep;
  }

  static SEQKERNELS_INLINE void add_product_of_halves(const Words& word, Words& sum) {
#if defined(__AVX2__)  // of which the compiler would make three
    sum += bits_of<Words>(_mm256_mul_epu32(bits_of<__m256i>(word), bits_of<__m256i>(word >> 32)));
#else
    sum += (word & 0xffffffff) * (word >> 32);
#endif
  }

  // Odd numbers without a pattern.
  static constexpr Words kKeyStep = {0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0xd6e8feb86659fd93};
  Words key_ = kKeyStep, words_[kAtOnce] = {}, products_[kAtOnce] = {};
};

// Of what pack_transposed makes panel j from.
template <class F, class S>
__attribute__((noinline)) Fingerprint fingerprint_of(const Panels<F>& shape, int64_t j, const S* source, int64_t n) {
  const int64_t first = j * shape.width * shape.V, last = min(first + shape.width * shape.V, shape.units);
  FingerprintSums sums;
  for (int64_t group = 0; group < shape.groups; group++)
    sums.add(source + (group * shape.units + first) * n, (last - first) * n * sizeof(S));
  return sums.sum();
}

// Of panels that are kept.
struct KeptPanels {
  Fingerprint* from;  // what each was packed from; null: they are not kept
  int64_t* packed;    // counts those of the layer that were packed

  // Packs panel j, unless it is still what it would become; of() is its fingerprint. Weights that change meanwhile, as
  // others may have them, are packed again the next time.
  template <class Of, class Pack>
  void renew(int64_t j, const Of& of, const Pack& pack) const {
    if (!from) return pack();
    const auto same = [](const Fingerprint& a, const Fingerprint& b) { return !memcmp(&a, &b, sizeof(a)); };
    const Fingerprint before = of();
    if (same(before, from[j])) return;
    from[j] = {};
    pack();
    __atomic_fetch_add(packed, 1, __ATOMIC_RELAXED);
    if (same(before, of())) from[j] = before;
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
