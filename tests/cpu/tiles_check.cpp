// Both passes of random layers in bfloat16 with their products by tiles, which are emulated (tile_emulation.h), beside
// the same with products by vectors. Knows neither torch nor Python; test_tiles.py compiles and runs it,
// and so does `make sanitize`, with sanitizers. Arrays are no larger than they have to be, and memory starts as NaN.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/backward.h"
#include "../../csrc/cpu/forward.h"
#include "../../csrc/cpu/schedule.h"

using namespace seqkernels;

namespace {

uint64_t state = 1;
int64_t random_number(int64_t least, int64_t most) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return least + static_cast<int64_t>(state >> 33) % (most - least + 1);
}

float value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return x;
}

typedef std::vector<uint16_t> Array;  // of bfloat16

// Multiples of 1/4 and less than 1, so that sums of their products are exact in any order.
Array random_array(int64_t size, float scale) {
  Array array(size);
  for (uint16_t& number : array) {
    const float x = scale * static_cast<float>(random_number(-3, 3)) / 4;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    number = static_cast<uint16_t>(bits >> 16);
  }
  return array;
}

struct Sizes {
  Cell cell;
  int64_t T, B, I, H, P;
  int D, threads;
  bool ragged;
};

// A layer's arguments, and the offsets and batch sizes of its steps.
struct Arguments {
  LayerForward p{};
  std::vector<int64_t> batch_sizes, offsets;
  Array x, h_0, c_0, weights[10];

  explicit Arguments(const Sizes& of) {
    for (int64_t t = 0; t < of.T; t++) {
      offsets.push_back(p.rows);
      batch_sizes.push_back(!of.ragged ? of.B : t ? random_number(1, batch_sizes.back()) : of.B);
      p.rows += batch_sizes.back();
    }
    const int64_t G = gates_of(of.cell);
    p.cell = of.cell;
    p.scalar = Scalar::bfloat16;
    p.steps = of.T, p.sequences = of.B, p.input = of.I, p.hidden = of.H, p.projected = of.P;
    p.directions = of.D;
    p.has_projection = of.P != of.H;
    p.bfloat16_products = true;
    p.batch_sizes = batch_sizes.data(), p.offsets = offsets.data();
    p.x = (x = random_array(p.rows * of.I, 1)).data();
    p.h_0 = (h_0 = random_array(of.D * of.B * of.P, 1)).data();
    if (states_of(of.cell) == 2) p.c_0 = (c_0 = random_array(of.D * of.B * of.H, 1)).data();
    for (int d = 0; d < of.D; d++) {
      Array* w = weights + 5 * d;
      p.weights[d] = {(w[0] = random_array(G * of.H * of.I, 0.25f)).data(),
                      (w[1] = random_array(G * of.H * of.P, 0.25f)).data(), (w[2] = random_array(G * of.H, 1)).data(),
                      (w[3] = random_array(G * of.H, 1)).data(),
                      p.has_projection ? (w[4] = random_array(of.P * of.H, 0.25f)).data() : nullptr};
    }
  }
};

struct Results {
  Array y, h_n, c_n, saved;
};

struct Gradients {
  Array x, h_0, c_0, weights[10];
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

// By tiles, or by vectors.
Results run(const Sizes& of, LayerForward p, bool tiles) {
  const int64_t K = saved_blocks_of(of.cell);
  Results results{Array(p.rows * of.D * of.P), Array(of.D * of.B * of.P), Array(p.c_0 ? of.D * of.B * of.H : 0),
                  Array(p.rows * of.D * K * of.H)};
  p.y = results.y.data(), p.h_n = results.h_n.data(), p.c_n = results.c_n.data(), p.saved = results.saved.data();
  p.bfloat16_tiles = tiles;
  const auto bytes = [&](const Schedule& schedule) {
    return kernels::ForwardMemory<bfloat16, bfloat16x2>(p, schedule, nullptr).bytes(schedule);
  };
  run_members(of, p, tiles && p.rows > kernels::kFewRows, bytes,
              [&](auto traits, const Schedule& schedule, int number, void* memory) {
                kernels::forward<decltype(traits)::cell, bfloat16, bfloat16x2>(p, schedule, number, number + 1, memory);
              });
  return results;
}

// The backward pass of what `run` gave, from gradients of all its results.
Gradients run_backward(const Sizes& of, const LayerForward& forward, const Results& results, const Results& grads,
                       bool tiles) {
  LayerBackward p{};
  static_cast<Layer&>(p) = forward;
  p.bfloat16_tiles = tiles;
  p.grad_y = grads.y.data(), p.grad_h_n = grads.h_n.data(), p.grad_c_n = p.c_0 ? grads.c_n.data() : nullptr;
  p.y = results.y.data(), p.saved = results.saved.data();
  p.wants_x = p.wants_weights = true;
  const int64_t G = gates_of(of.cell);
  Gradients found{Array(p.rows * of.I), Array(of.D * of.B * of.P), Array(p.c_0 ? of.D * of.B * of.H : 0), {}};
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
      return kernels::BackwardMemory<bfloat16, decltype(factor)>(p, schedule, nullptr).bytes(schedule);
    });
  };
  run_members(of, p, kernels::multiplies_gradients_by_tiles(p), bytes,
              [&](auto traits, const Schedule& schedule, int number, void* memory) {
                with_memory([&](auto factor) {
                  kernels::backward<decltype(traits)::cell, bfloat16, decltype(factor)>(p, schedule, number, number + 1,
                                                                                        memory);
                });
              });
  return found;
}

// Infinite if one of them is.
float largest_difference(const Array& a, const Array& b) {
  float largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const float difference = std::fabs(value(a[i]) - value(b[i])) / std::fmax(1, std::fabs(value(b[i])));
    if (!(difference <= largest)) largest = difference == difference ? difference : INFINITY;
  }
  return largest;
}

// Tiles take the gradients of gates as bfloat16: they differ by parts of the largest.
bool are_close(const Array& a, const Array& b) {
  float largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); i++) {
    largest = std::fmax(largest, std::fabs(value(b[i])));
    const float one = std::fabs(value(a[i]) - value(b[i]));
    if (!(one <= difference)) difference = one == one ? one : INFINITY;
  }
  return difference <= 0.03f * largest;
}

bool check_backward(const Sizes& of, const Arguments& arguments, const Results& results) {
  const Results grads{
      random_array(results.y.size(), 1), random_array(results.h_n.size(), 1), random_array(results.c_n.size(), 1), {}};
  const Gradients by_tiles = run_backward(of, arguments.p, results, grads, true);
  const Gradients by_vectors = run_backward(of, arguments.p, results, grads, false);
  bool good = are_close(by_tiles.x, by_vectors.x) && are_close(by_tiles.h_0, by_vectors.h_0) &&
              are_close(by_tiles.c_0, by_vectors.c_0);
  for (int i = 0; i < 10; i++) good = good && are_close(by_tiles.weights[i], by_vectors.weights[i]);
  return good;
}

// After one step products are exact: all bits agree. After more, sums in another order are rounded differently.
bool check(const Sizes& of) {
  const Arguments arguments(of);
  const Results by_tiles = run(of, arguments.p, true), by_vectors = run(of, arguments.p, false);
  const Array Results::* all[] = {&Results::y, &Results::h_n, &Results::c_n, &Results::saved};
  const float tolerance = of.T == 1 && of.P == of.H ? 0 : 0.05f;
  bool good = true;
  for (const auto result : all) {
    const float difference = largest_difference(by_tiles.*result, by_vectors.*result);
    good = good && difference <= tolerance;
  }
  good = check_backward(of, arguments, by_vectors) && good;
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
    of.T = random_number(0, 1) ? 1 : random_number(2, 9);
    of.B = random_number(0, 1) ? random_number(1, 20) : random_number(9, 100);
    of.I = random_number(0, 90), of.H = random_number(1, 90);
    if (random_number(0, 1)) of.H += of.H % 2;
    of.P = can_project(of.cell) && random_number(0, 1) ? random_number(1, of.H) : of.H;
    of.D = static_cast<int>(random_number(1, 2)), of.threads = static_cast<int>(random_number(1, 3));
    of.ragged = random_number(0, 1);
    good = check(of) && good;
  }
  printf("%s\n", good ? "all agree" : "some differ");
  return !good;
}
