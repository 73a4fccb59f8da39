#include "exchange.h"

#include <cstdint>

#include "../../csrc/cuda/launch.cuh"

namespace seqkernels::emulator {

using namespace device;

namespace {

constexpr int kNumbers = 64;

struct Pushes {
  static constexpr int threads = kNumbers;
  struct Parameters {
    int steps, buffers;
    bool waits;
    float* numbers;
    int64_t count;
  };
  static constexpr int shared_bytes(int cluster, int buffers) { return 16 + buffers * cluster * kNumbers * 4; }

  static void run(const Parameters& p) {
    const int size = cluster_size(), rank = cluster_rank();
    const Mbarrier arrivals[2] = {Mbarrier(0), Mbarrier(8)};
    const auto buffer = [&](int step) {
      return Shared<float>(16 + step % p.buffers * size * kNumbers * 4, size * kNumbers);
    };
    if (thread() == 0)
      for (const Mbarrier& of : arrivals) of.init();
    cluster_arrive();
    cluster_wait();

    const Global<float> numbers(p.numbers, p.count);
    float number = numbers.load(block() * kNumbers + thread());
    for (int step = 0; step < p.steps; step++) {
      if (thread() == 0) arrivals[step % 2].expect(size * kNumbers * 4);
      // Each of 4 threads has the numbers of all, for a fourth of the peers.
      Vec16 words;
      for (int i = 0; i < 4; i++) words.word[thread() % 4 ^ i] = bits(i ? shfl_xor(number, i) : number);
      const int first = thread() / 4 * 4;
      for (int peer = thread() % 4; peer < size; peer += 4)
        buffer(step).st_async(rank * kNumbers + first, words, peer, arrivals[step % 2]);
      if (step == p.steps - 1 && !p.waits) break;
      arrivals[step % 2].wait(step / 2 % 2);
      float sum = 0;
      for (int peer = 0; peer < size; peer++) sum += buffer(step).load(peer * kNumbers + thread());
      number = sum / static_cast<float>(size) + static_cast<float>(rank);
      synchronize();  // before anyone pushes what lets the peers push to this buffer again
    }
    numbers.store(block() * kNumbers + thread(), number);
  }
};

struct ByFlags {
  static constexpr int threads = kNumbers;
  struct Parameters {
    int blocks, steps, buffers;
    float *numbers, *buffer;
    uint32_t* flags;
  };

  static void run(const Parameters& p) {
    const Global<float> numbers(p.numbers, p.blocks * kNumbers), buffer(p.buffer, p.buffers * p.blocks * kNumbers);
    const Flags flags(p.flags, p.blocks);
    float number = numbers.load(block() * kNumbers + thread());
    for (int step = 0; step < p.steps; step++) {
      const int64_t begin = step % p.buffers * p.blocks * kNumbers;
      buffer.store(begin + block() * kNumbers + thread(), number);
      synchronize();
      if (thread() == 0) flags.raise(block(), step + 1);
      if (thread() < p.blocks) flags.wait(thread(), step + 1);
      synchronize();
      float sum = 0;
      for (int of = 0; of < p.blocks; of++) sum += buffer.load(begin + of * kNumbers + thread());
      number = sum / static_cast<float>(p.blocks) + static_cast<float>(block());
    }
    numbers.store(block() * kNumbers + thread(), number);
  }
};

struct Copies {
  static constexpr int threads = kNumbers;
  struct Parameters {
    int blocks, steps, buffers;
    bool late;
    float *numbers, *buffer;
    uint32_t* flags;
  };
  static constexpr int shared_bytes(int blocks) { return 16 + 2 * blocks * kNumbers * 4; }

  static void run(const Parameters& p) {
    const int all = p.blocks * kNumbers, part = p.blocks / cluster_size(), first = cluster_rank() * part;
    const Mbarrier arrivals[2] = {Mbarrier(0), Mbarrier(8)};
    const auto copied = [&](int step) { return Shared<float>(16 + step % 2 * all * 4, all); };
    if (thread() == 0)
      for (const Mbarrier& of : arrivals) of.init();
    for (int i = thread(); i < all; i += threads) copied(0).store(i, 0), copied(1).store(i, 0);
    if (!p.late) fence_copies_to_shared();
    cluster_arrive();
    if (p.late) fence_copies_to_shared();
    cluster_wait();

    const Global<float> numbers(p.numbers, all), buffer(p.buffer, p.buffers * all);
    const Flags flags(p.flags, p.blocks);
    float number = numbers.load(block() * kNumbers + thread());
    for (int step = 0; step < p.steps; step++) {
      const int64_t begin = step % p.buffers * all;
      const Mbarrier& arrived = arrivals[step % 2];
      buffer.store(begin + block() * kNumbers + thread(), number);
      synchronize();
      if (thread() == 0) flags.raise(block(), step + 1), arrived.expect(all * 4);
      if (thread() < 32) {
        if (thread() < part) flags.wait(first + thread(), step + 1);
        synchronize_warp();
        if (thread() == 0) {
          fence_copies_from_global();
          copied(step).copy_to_cluster(first * kNumbers, buffer, begin + first * kNumbers, part * kNumbers, arrived);
        }
      }
      arrived.wait(step / 2 % 2);
      float sum = 0;
      for (int of = 0; of < p.blocks; of++) sum += copied(step).load(of * kNumbers + thread());
      number = sum / static_cast<float>(p.blocks) + static_cast<float>(block());
    }
    numbers.store(block() * kNumbers + thread(), number);
  }
};

std::vector<float> first_numbers(int blocks) {
  std::vector<float> numbers(blocks * kNumbers);
  for (size_t i = 0; i < numbers.size(); i++) numbers[i] = static_cast<float>(i);
  return numbers;
}

}  // namespace

std::pair<std::string, std::vector<float>> exchange_by_pushes(int blocks, int cluster, int steps, int buffers,
                                                              bool waits) {
  std::vector<float> numbers = first_numbers(blocks);
  const Pushes::Parameters p{steps, buffers, waits, numbers.data(), static_cast<int64_t>(numbers.size())};
  const char* error =
      device::launch<Pushes>(blocks, 1, Pushes::shared_bytes(cluster, buffers), nullptr, p, {cluster, false});
  return {error ? error : "", numbers};
}

std::pair<std::string, std::vector<float>> exchange_by_flags(int blocks, int steps, int buffers) {
  std::vector<float> numbers = first_numbers(blocks), buffer(buffers * numbers.size());
  std::vector<uint32_t> flags(blocks);
  const ByFlags::Parameters p{blocks, steps, buffers, numbers.data(), buffer.data(), flags.data()};
  const char* error = device::launch<ByFlags>(blocks, 1, 0, nullptr, p, {1, true});
  return {error ? error : "", numbers};
}

std::pair<std::string, std::vector<float>> exchange_by_copies(int blocks, int cluster, int steps, int buffers,
                                                              bool late) {
  std::vector<float> numbers = first_numbers(blocks);
  // Copies read from multiples of 16 bytes.
  std::vector<Vec16> buffer(buffers * numbers.size() / 4);
  std::vector<uint32_t> flags(blocks);
  auto* at = reinterpret_cast<float*>(buffer.data());
  const Copies::Parameters p{blocks, steps, buffers, late, numbers.data(), at, flags.data()};
  const char* error = device::launch<Copies>(blocks, 1, Copies::shared_bytes(blocks), nullptr, p, {cluster, true});
  return {error ? error : "", numbers};
}

}  // namespace seqkernels::emulator
