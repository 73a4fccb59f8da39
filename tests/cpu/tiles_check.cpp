// Both passes of random layers with their products by tiles, which are emulated (tile_emulation.h), beside the same
// with products by vectors: in bfloat16, and in float32 of which factors are one bfloat16 or the sum of two. Knows
// neither torch nor Python; test_tiles.py compiles and runs it, and so does `make sanitize`, with sanitizers. Arrays
// are no larger than they have to be, and memory starts as NaN.
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/backward.h"
#include "../../csrc/cpu/forward.h"
#include "../../csrc/cpu/kept_weights.h"
#include "../../csrc/cpu/schedule.h"
#include "random_layers.h"

using namespace seqkernels;

namespace {

float value(uint16_t bits) {
  const uint32_t float_bits = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &float_bits, sizeof(x));
  return x;
}

float value(float x) { return x; }
void set(float& number, float x) { number = x; }
void set(uint16_t& number, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  number = static_cast<uint16_t>(bits >> 16);
}

template <class Number>  // float, or the bits of a bfloat16
using Array = std::vector<Number>;

// Less than 1. Of bfloat16 multiples of 1/4, so that sums of their products are exact in any order.
template <class Number>
Array<Number> random_array(int64_t size, float scale) {
  constexpr int kSteps = sizeof(Number) == 2 ? 4 : 1 << 20;
  Array<Number> array(size);
  for (Number& number : array) set(number, scale * static_cast<float>(random_number(1 - kSteps, kSteps - 1)) / kSteps);
  return array;
}

// A layer's arguments. Without parts it is bfloat16.
template <class Number>
struct Arguments {
  using Array = ::Array<Number>;
  LayerForward p{};
  Steps steps;
  Array x, h_0, c_0, weights[10];

  explicit Arguments(const Sizes& of) : steps(of, p) {
    const int64_t G = gates_of(of.cell);
    p.scalar = of.parts ? Scalar::float32 : Scalar::bfloat16;
    p.bfloat16_parts = of.parts;
    p.bfloat16_products = true;
    p.x = (x = random_array<Number>(p.rows * of.I, 1)).data();
    p.h_0 = (h_0 = random_array<Number>(of.D * of.B * of.P, 1)).data();
    if (states_of(of.cell) == 2) p.c_0 = (c_0 = random_array<Number>(of.D * of.B * of.H, 1)).data();
    for (int d = 0; d < of.D; d++) {
      Array* w = weights + 5 * d;
      p.weights[d] = {(w[0] = random_array<Number>(G * of.H * of.I, 0.25f)).data(),
                      (w[1] = random_array<Number>(G * of.H * of.P, 0.25f)).data(),
                      (w[2] = random_array<Number>(G * of.H, 1)).data(),
                      (w[3] = random_array<Number>(G * of.H, 1)).data(),
                      p.has_projection ? (w[4] = random_array<Number>(of.P * of.H, 0.25f)).data() : nullptr};
    }
  }
};

template <class Number>
struct Results {
  Array<Number> y, h_n, c_n, saved;
};

template <class Number>
struct Gradients {
  Array<Number> x, h_0, c_0, weights[10];
};

std::atomic<int64_t> products{0};

// Runs all members of a call, each in a thread of its own: pass(schedule, member, memory).
template <class P, class Bytes, class Pass>
void run_members(const Sizes& of, const P& p, bool tiles, const Bytes& bytes, const Pass& pass) {
  const OwnSchedule schedule(p, of.threads);
  const int64_t size = bytes(schedule);
  void* memory = ::operator new(size, std::align_val_t(64));
  memset(memory, 0xff, size);
  const auto member = [&](int number) {
    with_cell(of.cell, [&](auto traits) { pass(traits, schedule, number, memory); });
    tile_emulation::demand(!tile_emulation::state.configured, "released at the end");
    products += tile_emulation::state.products;
  };
  std::vector<std::thread> threads;
  for (int number = 0; number < schedule.members; number++) threads.emplace_back(member, number);
  for (std::thread& thread : threads) thread.join();
  tile_emulation::demand((products.exchange(0) > 0) == tiles, "tiles where they are asked for, and nowhere else");
  ::operator delete(memory, std::align_val_t(64));
}

namespace kernels = SEQKERNELS_ISA;
using kernels::bfloat16, kernels::bfloat16x2;
template <class Number>
using storage_t = typename std::conditional<sizeof(Number) == 2, bfloat16, float>::type;

// By tiles, or by vectors; with packed weights that stay, where they are worth it.
template <class Number>
Results<Number> run(const Sizes& of, LayerForward p, bool tiles, KeptWeights* kept = nullptr) {
  using Array = ::Array<Number>;
  using S = storage_t<Number>;
  const int64_t K = saved_blocks_of(of.cell);
  Results<Number> results{Array(p.rows * of.D * of.P), Array(of.D * of.B * of.P), Array(p.c_0 ? of.D * of.B * of.H : 0),
                          Array(p.rows * of.D * K * of.H)};
  p.y = results.y.data(), p.h_n = results.h_n.data(), p.c_n = results.c_n.data(), p.saved = results.saved.data();
  p.bfloat16_tiles = tiles;
  const auto with_factor = [&](const auto& call) {
    if (!of.parts || kernels::splits_for_tiles(p)) return call(bfloat16x2{});
    if constexpr (std::is_same<S, float>::value) return call(float{});
    __builtin_unreachable();
  };
  const auto bytes = [&](const Schedule& schedule) {
    return with_factor(
        [&](auto factor) { return kernels::ForwardMemory<S, decltype(factor)>(p, schedule, nullptr).bytes(schedule); });
  };
  if (kept)
    p.kept = kept->of_layer(
        0, with_factor([&](auto factor) { return kernels::PackedWeights<S, decltype(factor)>(p).layout(p); }));
  run_members(of, p, tiles && p.rows > kernels::kFewRows, bytes,
              [&](auto traits, const Schedule& schedule, int number, void* memory) {
                with_factor([&](auto factor) {
                  kernels::forward<decltype(traits)::cell, S, decltype(factor)>(p, schedule, number, number + 1,
                                                                                memory);
                });
              });
  return results;
}

// The backward pass of what `run` gave, from gradients of all its results.
template <class Number>
Gradients<Number> run_backward(const Sizes& of, const LayerForward& forward, const Results<Number>& results,
                               const Results<Number>& grads, bool tiles) {
  using Array = ::Array<Number>;
  using S = storage_t<Number>;
  LayerBackward p{};
  static_cast<Layer&>(p) = forward;
  p.bfloat16_tiles = tiles;
  p.grad_y = grads.y.data(), p.grad_h_n = grads.h_n.data(), p.grad_c_n = p.c_0 ? grads.c_n.data() : nullptr;
  p.y = results.y.data(), p.saved = results.saved.data();
  p.wants_x = p.wants_weights = true;
  const int64_t G = gates_of(of.cell);
  Gradients<Number> found{Array(p.rows * of.I), Array(of.D * of.B * of.P), Array(p.c_0 ? of.D * of.B * of.H : 0), {}};
  p.grad_x = found.x.data(), p.grad_h_0 = found.h_0.data(), p.grad_c_0 = found.c_0.data();
  for (int d = 0; d < of.D; d++) {
    Array* w = found.weights + 5 * d;
    const int64_t sizes[] = {G * of.H * of.I, G * of.H * of.P, G * of.H, G * of.H, p.has_projection ? of.P * of.H : 0};
    for (int i = 0; i < 5; i++) w[i].resize(sizes[i]);
    p.grad_weights[d] = {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data()};
  }
  const auto with_memory = [&](const auto& call) {
    if (kernels::multiplies_gradients_by_tiles(p)) return call(bfloat16x2{});
    return call(float{});
  };
  const auto bytes = [&](const Schedule& schedule) {
    return with_memory([&](auto factor) {
      return kernels::BackwardMemory<S, decltype(factor)>(p, schedule, nullptr).bytes(schedule);
    });
  };
  run_members(of, p, kernels::multiplies_gradients_by_tiles(p), bytes,
              [&](auto traits, const Schedule& schedule, int number, void* memory) {
                with_memory([&](auto factor) {
                  kernels::backward<decltype(traits)::cell, S, decltype(factor)>(p, schedule, number, number + 1,
                                                                                 memory);
                });
              });
  return found;
}

// Infinite if one of them is.
template <class Number>
float largest_difference(const Array<Number>& a, const Array<Number>& b) {
  float largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const float difference = std::fabs(value(a[i]) - value(b[i])) / std::fmax(1, std::fabs(value(b[i])));
    if (!(difference <= largest)) largest = difference == difference ? difference : INFINITY;
  }
  return largest;
}

// Tiles take the gradients of gates as bfloat16: they differ by parts of the largest.
template <class Number>
bool are_close(const Array<Number>& a, const Array<Number>& b, float tolerance) {
  float largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); i++) {
    largest = std::fmax(largest, std::fabs(value(b[i])));
    const float one = std::fabs(value(a[i]) - value(b[i]));
    if (!(one <= difference)) difference = one == one ? one : INFINITY;
  }
  return difference <= tolerance * largest;
}

template <class Number>
bool check_backward(const Sizes& of, const Arguments<Number>& arguments, const Results<Number>& results) {
  const Results<Number> grads{random_array<Number>(results.y.size(), 1),
                              random_array<Number>(results.h_n.size(), 1),
                              random_array<Number>(results.c_n.size(), 1),
                              {}};
  const Gradients<Number> by_tiles = run_backward(of, arguments.p, results, grads, true);
  const Gradients<Number> by_vectors = run_backward(of, arguments.p, results, grads, false);
  const float tolerance = of.parts == 2 ? 1e-4f : 0.03f;
  bool good = are_close(by_tiles.x, by_vectors.x, tolerance) && are_close(by_tiles.h_0, by_vectors.h_0, tolerance) &&
              are_close(by_tiles.c_0, by_vectors.c_0, tolerance);
  for (int i = 0; i < 10; i++) good = good && are_close(by_tiles.weights[i], by_vectors.weights[i], tolerance);
  return good;
}

// Packed weights that stay make no difference: when they are packed, when they are found, and when one has changed.
template <class Number>
bool check_kept(const Sizes& of, Arguments<Number>& arguments) {
  KeptWeights kept;
  for (int call = 0; call < 4; call++) {
    const auto packed = run<Number>(of, arguments.p, true), found = run<Number>(of, arguments.p, true, &kept);
    if (packed.y != found.y || packed.saved != found.saved) return false;
    Array<Number>& weight = arguments.weights[random_number(0, 1)];
    if (call > 1 && !weight.empty()) set(weight[random_number(0, weight.size() - 1)], 0.125f);
  }
  return true;
}

// After one step products of bfloat16 are exact: all bits agree. After more, sums in another order are rounded
// differently. Those of float32 differ by what its factors lose.
template <class Number>
bool check(const Sizes& of) {
  Arguments<Number> arguments(of);
  const auto by_tiles = run<Number>(of, arguments.p, true), by_vectors = run<Number>(of, arguments.p, false);
  const Array<Number> Results<Number>::* all[] = {&Results<Number>::y, &Results<Number>::h_n, &Results<Number>::c_n,
                                                  &Results<Number>::saved};
  const float tolerance = of.parts == 2 ? 1e-4f : of.parts == 0 && of.T == 1 && of.P == of.H ? 0 : 0.05f;
  bool good = true;
  for (const auto result : all) good = good && largest_difference(by_tiles.*result, by_vectors.*result) <= tolerance;
  return check_backward(of, arguments, by_vectors) && check_kept(of, arguments) && good;
}

}  // namespace

int main(int, char** arguments) {
  const auto choose = [](Sizes& of) {
    of.T = random_number(0, 1) ? 1 : random_number(2, 9);
    if (random_number(0, 1)) of.H += of.H % 2;
    of.parts = static_cast<int>(random_number(0, 2));
  };
  return check_random_layers(arguments, 90, choose,
                             [](const Sizes& of) { return of.parts ? check<float>(of) : check<uint16_t>(of); });
}
