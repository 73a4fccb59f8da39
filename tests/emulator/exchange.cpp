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

struct ByTags {
  static constexpr int threads = kNumbers;
  struct Parameters {
    int blocks, steps, buffers;
    float* numbers;
    Vec16* vectors;
  };

  static void run(const Parameters& p) {
    const int all = p.blocks * kNumbers;
    const Global<float> numbers(p.numbers, all);
    const Tagged vectors(p.vectors, p.buffers * all);
    int mine = thread();  // another number in each step, so that threads need what others of their block have read
    float number = numbers.load(block() * kNumbers + mine);
    for (int step = 0; step < p.steps; step++) {
      const int begin = step % p.buffers * all;
      vectors.store(begin + static_cast<int>(block()) * kNumbers + mine, bits(number), 0, 0, step + 1);
      mine = (mine + 1) % kNumbers;
      float sum = 0;
      for (int i = begin + mine; i < begin + all; i += 4 * kNumbers) {
        Vec16 found[4];
        vectors.wait(i, kNumbers, begin + all, step + 1, found);
        for (const Vec16& of : found) sum += from_bits(of.word[0]);
      }
      number = sum / static_cast<float>(p.blocks) + static_cast<float>(block());
      synchronize();  // before anyone stores what lets others overwrite what the block has read
    }
    numbers.store(block() * kNumbers + mine, number);
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

std::pair<std::string, std::vector<float>> exchange_by_tags(int blocks, int steps, int buffers, int launches,
                                                            bool clears) {
  std::vector<float> numbers = first_numbers(blocks);
  std::vector<Vec16> vectors(buffers * numbers.size());
  const ByTags::Parameters p{blocks, steps, buffers, numbers.data(), vectors.data()};
  const char* error = nullptr;
  for (int i = 0; i < launches && !error; i++) {
    if (clears) vectors.assign(vectors.size(), Vec16{});
    error = device::launch<ByTags>(blocks, 1, 0, nullptr, p, {1, true});
  }
  return {error ? error : "", numbers};
}

}  // namespace seqkernels::emulator
