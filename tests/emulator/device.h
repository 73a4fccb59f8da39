// The names of csrc/cuda/device.cuh for the CPU. The threads of a CTA, or of CTAs that run at the same time, are fibers
// of the calling thread, in random order, and every access is checked. What goes wrong ends the launch, which returns a
// description.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SEQKERNELS_ISA device
#define DEVICE inline

namespace seqkernels::emulator {

struct Here {
  int64_t block;
  int block_y, thread, rank;
};
extern Here here;

enum class Access { read, write };

// Check an access to element i of an array in global memory.
void check_global(const void* data, int64_t count, int element_bytes, int64_t i, Access access);

// Check that two elements from here on can be read or written at once.
void check_pair(const void* at, int element_bytes);

// Check an access to `bytes` bytes from `offset` on of an array of `size` bytes at byte `begin` of shared memory, and
// return where they are.
unsigned char* check_shared(int begin, int64_t size, int64_t offset, int bytes, Access access);

// Copy 16 bytes to the same place of a peer's shared memory, at some later time.
void push(int begin, int64_t size, int64_t offset, const void* words, int peer, int mbarrier);

// Store 16 bytes with a tag in vector i of an array in global memory, where they come at some later time.
void send(void* data, int64_t count, int64_t i, const void* words);

// Wait until the vector has the tag, and take it.
void receive(const void* data, int64_t count, int64_t i, uint32_t tag, void* words);

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace seqkernels::emulator

namespace seqkernels::device {

// ---- threads and CTAs

inline int thread() { return emulator::here.thread; }
inline int64_t block() { return emulator::here.block; }
inline int block_y() { return emulator::here.block_y; }
void synchronize();
void synchronize_warp();
float shfl_xor(float value, int mask);
inline double shfl_xor(double value, int mask) {  // one half after the other
  struct Halves {
    float low, high;
  };
  const auto sent = emulator::bits_of<Halves>(value);
  const float low = shfl_xor(sent.low, mask), high = shfl_xor(sent.high, mask);
  return emulator::bits_of<double>(Halves{low, high});
}
uint32_t shfl(uint32_t value, int lane);
inline int cluster_rank() { return emulator::here.rank; }
int cluster_size();
void cluster_arrive();
void cluster_wait();

// ---- memory

struct alignas(16) Vec16 {
  uint32_t word[4];
};

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
class Global {
 public:
  Global(T* data, int64_t count) : data_(data), count_(count) {}
  explicit operator bool() const { return data_; }
  Global moved(int64_t rows, int row_bytes) const {
    constexpr int64_t size = sizeof(T);
    Global moved = *this;
    moved.origin_ += rows * row_bytes / size;
    return moved;
  }
  T load(int64_t i) const {
    emulator::check_global(data_, count_, sizeof(T), origin_ + i, emulator::Access::read);
    return data_[origin_ + i];
  }
  void store(int64_t i, T value) const {
    emulator::check_global(data_, count_, sizeof(T), origin_ + i, emulator::Access::write);
    data_[origin_ + i] = value;
  }
  Pair<std::remove_const_t<T>> load_pair(int64_t i) const {
    emulator::check_pair(data_ + origin_ + i, sizeof(T));
    return {load(i), load(i + 1)};
  }
  void store_pair(int64_t i, Pair<T> pair) const {
    emulator::check_pair(data_ + origin_ + i, sizeof(T));
    store(i, pair.first), store(i + 1, pair.second);
  }

 private:
  T* data_;
  int64_t count_, origin_ = 0;  // origin_: the element from which others are counted
};

template <class T>
class Cursor {
 public:
  Cursor(Global<T> array, int64_t i) : array_(array), at_(i) {}
  void move(int rows, int row) { at_ += int64_t{rows} * row; }
  T load(int i) const { return array_.load(at_ + i); }
  Pair<std::remove_const_t<T>> load_pair(int i) const { return array_.load_pair(at_ + i); }
  void store(int i, T value, bool stored) const {
    if (stored) array_.store(at_ + i, value);
  }
  void store_pair(int i, Pair<T> pair, bool stored) const {
    if (stored) array_.store_pair(at_ + i, pair);
  }

 private:
  Global<T> array_;
  int64_t at_;
};

class Mbarrier {
 public:
  explicit Mbarrier(int byte) : byte_(byte) {}
  void init() const;
  void expect(int bytes) const;
  void wait(int parity) const;
  void wait_for_shared(int parity) const { wait(parity); }  // here too the caller sees all that others have seen
  int byte() const { return byte_; }

 private:
  int byte_;
};

template <class T>
class Shared {
 public:
  Shared(int byte, int count) : byte_(byte), count_(count) { static_assert(sizeof(T) >= 2); }
  T load(int i) const { return load_as<T>(i); }
  void store(int i, T value) const { store_as(i, value); }
  Pair<T> load_pair(int i) const { return load_as<Pair<T>>(i); }
  void store_pair(int i, Pair<T> pair) const { store_as(i, pair); }
  Vec16 load_vec16(int i) const { return load_as<Vec16>(i); }
  void store_vec16(int i, Vec16 words) const { store_as(i, words); }
  void st_async(int i, Vec16 words, int peer, Mbarrier arrivals) const {
    constexpr int64_t size = sizeof(T);
    emulator::push(byte_, count_ * size, i * size, &words, peer, arrivals.byte());
  }

 private:
  template <class As>
  As load_as(int i) const {
    As value;
    std::memcpy(&value, check<As>(i, emulator::Access::read), sizeof(As));
    return value;
  }
  template <class As>
  void store_as(int i, As value) const {
    std::memcpy(check<As>(i, emulator::Access::write), &value, sizeof(As));
  }
  template <class As>
  unsigned char* check(int i, emulator::Access access) const {
    constexpr int64_t size = sizeof(T);
    return emulator::check_shared(byte_, count_ * size, i * size, sizeof(As), access);
  }

  int byte_, count_;
};

class Tagged {
 public:
  Tagged(Vec16* data, int64_t count) : data_(data), count_(count) {}
  void store(int i, uint32_t first, uint32_t second, uint32_t third, uint32_t tag) const {
    const Vec16 vector{{first, second, third, tag}};
    emulator::send(data_, count_, i, &vector);
  }
  template <int COUNT>
  void wait(int i, int stride, int end, uint32_t tag, Vec16 (&found)[COUNT]) const {
    for (int of = 0; of < COUNT; of++) {
      found[of] = {};
      if (i + of * stride < end) emulator::receive(data_, count_, i + of * stride, tag, &found[of]);
    }
  }

 private:
  Vec16* data_;
  int64_t count_;
};

// ---- numbers

inline uint32_t bits(float x) { return emulator::bits_of<uint32_t>(x); }
inline float from_bits(uint32_t x) { return emulator::bits_of<float>(x); }

template <class T>
inline Pair<T> pair(T first, T second) {
  return {first, second};
}
template <class T>
inline T first(Pair<T> pair) {
  return pair.first;
}
template <class T>
inline T second(Pair<T> pair) {
  return pair.second;
}
template <class T>
inline uint32_t bits(Pair<T> pair) {
  return uint32_t{pair.first.bits} | uint32_t{pair.second.bits} << 16;
}

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

inline double to_acc(double x) { return x; }
inline float to_acc(float x) { return x; }
inline float to_acc(bfloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_acc(float16 x) {
  // Multiplying by 2^112 corrects the exponent's bias and normalises subnormals.
  const float magnitude = from_bits((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return from_bits(bits(magnitude) | special | (x.bits & 0x8000u) << 16);
}

template <class T>
T from_acc(acc_t<T> x);
template <>
inline double from_acc<double>(double x) {
  return x;
}
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_acc<bfloat16>(float x) {
  const uint32_t b = bits(x);
  const uint32_t rounded = x == x ? b + 0x7fff + (b >> 16 & 1) : b | 0x400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}
template <>
inline float16 from_acc<float16>(float x) {
  const uint32_t sign = bits(x) >> 16 & 0x8000, magnitude = bits(x) & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;  // NaN
  else if (magnitude >= 0x477ff000)
    half = 0x7c00;  // rounds to infinity
  else if (magnitude < 0x38800000)
    half = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);  // subnormal: the last bit of 0.5 + x is that of a half
  else
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(half | sign)};
}

inline float tf32(float x) { return std::isfinite(x) ? from_bits((bits(x) + 0x1000) & ~0x1fffu) : x; }

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline float tanh(float x) { return std::tanh(x); }
inline double tanh(double x) { return std::tanh(x); }
// As wrong as PTX allows, in either direction.
inline float approximate_tanh(float x) {
  const float result = std::tanh(x), wrong = result * (bits(x) * 0x9e3779b9u >> 31 ? 1 + 0x1p-11f : 1 - 0x1p-11f);
  return std::abs(wrong) > 1 ? std::copysign(1.0f, wrong) : wrong;
}
inline float approximate_sigmoid(float x) {
  return 1 / (1 + std::exp(-x) * (bits(x) * 0x9e3779b9u >> 31 ? 1 + 0x1p-16f : 1 - 0x1p-16f));
}
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

// ---- tensor cores: sums in float, over k in order

void multiply(bfloat16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1);
void multiply(float16, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1);
void multiply(float, float (&sum)[4], const uint32_t* a, uint32_t b_0, uint32_t b_1);

}  // namespace seqkernels::device
