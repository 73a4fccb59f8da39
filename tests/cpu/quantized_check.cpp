// Random quantized layers with their products by tiles, which are emulated (tile_emulation.h), beside the same by
// vectors: sums are exact, so that all bits agree. Knows neither torch nor Python; test_tiles.py compiles and runs it,
// and so does `make sanitize`, with sanitizers. Arrays are no larger than they have to be, and memory starts as NaN.
#include <thread>
#include <vector>

#include "../../csrc/cpu/quantized.h"
#include "../../csrc/cpu/schedule.h"
#include "random_layers.h"

using namespace seqkernels;
namespace kernels = SEQKERNELS_ISA;

namespace {

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
  const Steps steps(of, p);
  p.scalar = Scalar::float32;
  p.int8_products = true;
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
  return run(of, p, true) == run(of, p, false);
}

}  // namespace

int main(int, char** arguments) {
  return check_random_layers(arguments, 150, [](Sizes& of) { of.T = random_number(1, 6); }, check);
}
