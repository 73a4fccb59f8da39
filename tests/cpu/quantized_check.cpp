// Random quantized layers with their products by tiles, which are emulated (tile_emulation.h), beside the same by
// vectors: sums are exact, so that all bits agree. Knows neither torch nor Python; test_tiles.py compiles and runs it,
// and so does `make sanitize`, with sanitizers. Arrays are no larger than they have to be, and memory starts as NaN.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/cpu/quantized.h"
#include "../../csrc/cpu/schedule.h"

using namespace seqkernels;
namespace kernels = SEQKERNELS_ISA;

namespace {

uint64_t state = 1;
int64_t random_number(int64_t least, int64_t most) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return least + static_cast<int64_t>(state >> 33) % (most - least + 1);
}

typedef std::vector<float> Array;

Array random_array(int64_t size) {
  Array array(size);
  for (float& number : array) number = static_cast<float>(random_number(-1000, 1000)) / 1000;
  return array;
}

// A packed matrix [gates * units, n].
std::vector<char> random_weights(int64_t gates, int64_t units, int64_t n) {
  const int64_t row = gates * kPanelUnits;
  std::vector<char> packed;
  for (int64_t panel = 0; panel < panels_of(units); panel++) {
    std::vector<int32_t> head(kPanelRows * row);
    for (int64_t i = 0; i < row; i++) {
      head[i] = static_cast<int32_t>(random_number(-9999, 9999));
      const float scale = static_cast<float>(random_number(1, 9)) / 1000, bias = scale * 20;
      memcpy(&head[kScale * row + i], &scale, sizeof(scale));
      memcpy(&head[kBias * row + i], &bias, sizeof(bias));
    }
    const char* bytes = reinterpret_cast<const char*>(head.data());
    packed.insert(packed.end(), bytes, bytes + head.size() * sizeof(int32_t));
    for (int64_t k = 0; k < leading_bytes(n); k += 4)
      for (int64_t i = 0; i < 4 * row; i++)
        packed.push_back(k + i % 4 < n ? static_cast<char>(random_number(-127, 127)) : 0);
  }
  return packed;
}

struct Sizes {
  Cell cell;
  int64_t T, B, I, H, P;
  int D, threads;
  bool ragged;
};

struct Results {
  Array y, h_n, c_n;
  bool operator==(const Results& other) const {
    const auto same = [](const Array& a, const Array& b) {
      return a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(float));
    };
    return same(y, other.y) && same(h_n, other.h_n) && same(c_n, other.c_n);
  }
};

Results run(const Sizes& of, LayerForward p, bool tiles) {
  Results results{Array(p.rows * of.D * of.P), Array(of.D * of.B * of.P), Array(p.c_0 ? of.D * of.B * of.H : 0)};
  p.y = results.y.data(), p.h_n = results.h_n.data(), p.c_n = results.c_n.data();
  p.int8_tiles = tiles;
  const OwnSchedule schedule(p, of.threads);
  const int64_t size = kernels::QuantizedMemory(p, schedule, nullptr).bytes(schedule);
  void* memory = ::operator new(size, std::align_val_t(64));
  memset(memory, 0xff, size);
  std::vector<std::thread> threads;
  for (int member = 0; member < schedule.members; member++)
    threads.emplace_back([&, member] {
      const int64_t before = tile_emulation::state.products;
      with_cell(of.cell, [&](auto traits) {
        constexpr Cell kCell = decltype(traits)::cell;
        kernels::quantized_forward<kCell, kernels::int8x4_vnni>(p, schedule, member, member + 1, memory);
      });
      tile_emulation::demand(!tile_emulation::state.configured, "released at the end");
      tile_emulation::demand(tiles || tile_emulation::state.products == before, "tiles only where asked for");
    });
  for (std::thread& thread : threads) thread.join();
  ::operator delete(memory, std::align_val_t(64));
  return results;
}

bool check(const Sizes& of) {
  LayerForward p{};
  std::vector<int64_t> batch_sizes, offsets;
  for (int64_t t = 0; t < of.T; t++) {
    offsets.push_back(p.rows);
    batch_sizes.push_back(!of.ragged ? of.B : t ? random_number(1, batch_sizes.back()) : of.B);
    p.rows += batch_sizes.back();
  }
  p.cell = of.cell;
  p.scalar = Scalar::float32;
  p.steps = of.T, p.sequences = p.states = of.B;
  p.input = of.I, p.hidden = of.H, p.projected = of.P, p.directions = of.D;
  p.has_projection = of.P != of.H;
  p.int8_products = true;
  p.batch_sizes = batch_sizes.data(), p.offsets = offsets.data();
  const Array x = random_array(p.rows * of.I), h_0 = random_array(of.D * of.B * of.P);
  const Array c_0 = random_array(of.D * of.B * of.H);
  p.x = x.data(), p.h_0 = h_0.data(), p.c_0 = states_of(of.cell) == 2 ? c_0.data() : nullptr;
  std::vector<char> weights[6];
  for (int d = 0; d < of.D; d++) {
    std::vector<char>* w = weights + 3 * d;
    w[0] = random_weights(gates_of(of.cell), of.H, of.I), w[1] = random_weights(gates_of(of.cell), of.H, of.P);
    w[2] = random_weights(1, of.P, of.H);
    p.weights[d] = {w[0].data(), w[1].data(), nullptr, nullptr, w[2].data()};
  }
  const bool good = run(of, p, true) == run(of, p, false);
  if (!good)
    printf("differs: %s T %ld B %ld I %ld H %ld P %ld D %d threads %d ragged %d\n", name_of(of.cell),
           static_cast<long>(of.T), static_cast<long>(of.B), static_cast<long>(of.I), static_cast<long>(of.H),
           static_cast<long>(of.P), of.D, of.threads, of.ragged);
  return good;
}

}  // namespace

int main(int, char** arguments) {
  const int64_t count = arguments[1] ? atoi(arguments[1]) : 100;
  bool good = true;
  for (int64_t i = 0; i < count; i++) {
    Sizes of;
    of.cell = kCells[i % 5];
    of.T = random_number(1, 6);
    of.B = random_number(0, 1) ? random_number(1, 20) : random_number(9, 100);
    of.I = random_number(0, 150), of.H = random_number(1, 150);
    of.P = can_project(of.cell) && random_number(0, 1) ? random_number(1, of.H) : of.H;
    of.D = static_cast<int>(random_number(1, 2)), of.threads = static_cast<int>(random_number(1, 3));
    of.ragged = random_number(0, 1);
    good = check(of) && good;
  }
  printf("%s\n", good ? "all agree" : "some differ");
  return !good;
}
