// Runs the CPU kernels without torch or Python, prints what they compute. `make arm` compares the output of an ARM
// build, run by an emulator, with that of a build for this machine.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/schedule.h"

using namespace seqkernels;

namespace {

// Numbers in [-1, 1), the same on every machine.
double next_number() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1;
}

// An array of numbers of a problem's type.
struct Array {
  Scalar scalar;
  std::vector<unsigned char> bytes;

  Array(Scalar scalar, int64_t size, double scale) : scalar(scalar), bytes(size * width(scalar)) {
    for (int64_t i = 0; i < size; i++) {
      const double x = scale * next_number();
      const float narrow = static_cast<float>(x);
      uint32_t bits;
      memcpy(&bits, &narrow, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      const void* from = scalar == Scalar::float64    ? static_cast<const void*>(&x)
                         : scalar == Scalar::bfloat16 ? static_cast<const void*>(&high)
                                                      : static_cast<const void*>(&narrow);
      memcpy(&bytes[i * width(scalar)], from, width(scalar));
    }
  }

  static int width(Scalar scalar) { return scalar == Scalar::float64 ? 8 : scalar == Scalar::bfloat16 ? 2 : 4; }
  void* data() { return bytes.data(); }

  double norm() const {
    double sum = 0;
    for (size_t i = 0; i < bytes.size(); i += width(scalar)) {
      double wide = 0;
      float narrow = 0;
      const uint32_t bits = static_cast<uint32_t>(bytes[i]) << 16 | static_cast<uint32_t>(bytes[i + 1]) << 24;
      if (scalar == Scalar::float64) memcpy(&wide, &bytes[i], 8);
      if (scalar == Scalar::float32) memcpy(&narrow, &bytes[i], 4);
      if (scalar == Scalar::bfloat16) memcpy(&narrow, &bits, 4);
      const double x = scalar == Scalar::float64 ? wide : narrow;
      sum += x * x;
    }
    return std::sqrt(sum);
  }
};

template <class P>
void run(const P& p, int64_t (*bytes)(const P&, const Schedule&),
         void (*pass)(const P&, const Schedule&, int begin, int end, void*)) {
  const OwnSchedule schedule(p, 1);
  const std::unique_ptr<char[]> block(new char[bytes(p, schedule) + 64]);
  char* aligned = block.get() + (64 - reinterpret_cast<uintptr_t>(block.get()) % 64) % 64;
  pass(p, schedule, 0, 1, aligned);
}

void check(const char* scalar_name, Scalar scalar, const char* cell_name, Cell cell, int64_t P) {
  const int64_t T = 5, B = 3, I = 21, H = 37, G = gates_of(cell), K = saved_blocks_of(cell), N = 12;
  const int D = 2;
  const int64_t batch_sizes[] = {3, 3, 3, 2, 1}, offsets[] = {0, 3, 6, 9, 11};
  Layer common{};
  common.cell = cell;
  common.scalar = scalar;
  common.steps = T;
  common.sequences = B;
  common.rows = N;
  common.input = I;
  common.hidden = H;
  common.projected = P;
  common.directions = D;
  common.has_projection = P != H;
  common.batch_sizes = batch_sizes;
  common.offsets = offsets;
  std::vector<std::unique_ptr<Array>> arrays;
  const auto make = [&](int64_t size, double scale) {
    arrays.emplace_back(new Array(scalar, size, scale));
    return arrays.back().get();
  };
  const int64_t sizes[] = {G * H * I, G * H * P, G * H, G * H, P * H};
  common.x = make(N * I, 1)->data();
  for (int d = 0; d < D; d++)
    common.weights[d] = {make(sizes[0], 0.2)->data(), make(sizes[1], 0.2)->data(), make(sizes[2], 0.2)->data(),
                         make(sizes[3], 0.2)->data(), P != H ? make(sizes[4], 0.2)->data() : nullptr};
  common.h_0 = make(D * B * P, 1)->data();
  common.c_0 = cell == Cell::lstm ? make(D * B * H, 1)->data() : nullptr;

  LayerForward forward{common, nullptr, nullptr, nullptr, nullptr};
  std::vector<Array*> results{make(N * D * P, 0), make(D * B * P, 0), make(D * B * H, 0), make(N * D * K * H, 0)};
  forward.y = results[0]->data();
  forward.h_n = results[1]->data();
  forward.c_n = cell == Cell::lstm ? results[2]->data() : nullptr;
  forward.saved = results[3]->data();
  run(forward, kernels().forward_bytes, kernels().forward);

  LayerBackward backward{};
  static_cast<Layer&>(backward) = common;
  backward.grad_y = make(N * D * P, 1)->data();
  backward.y = forward.y;
  backward.saved = forward.saved;
  const auto result = [&](int64_t size) {
    results.push_back(make(size, 0));
    return results.back()->data();
  };
  backward.grad_x = result(N * I);
  for (int d = 0; d < D; d++)
    backward.grad_weights[d] = {result(sizes[0]), result(sizes[1]), result(sizes[2]), result(sizes[3]),
                                P != H ? result(sizes[4]) : nullptr};
  backward.grad_h_0 = result(D * B * P);
  backward.grad_c_0 = cell == Cell::lstm ? result(D * B * H) : nullptr;
  run(backward, kernels().backward_bytes, kernels().backward);

  printf("%s %s", scalar_name, cell_name);
  for (const Array* array : results) printf(" %.16e", array->norm());
  printf("\n");
}

}  // namespace

int main(int, char** arguments) {
  if (arguments[1] && !force_kernels(arguments[1])) return 2;
  const Scalar scalars[] = {Scalar::float64, Scalar::float32, Scalar::bfloat16};
  const char* names[] = {"float64", "float32", "bfloat16"};
  for (int i = 0; i < 3; i++) {
    check(names[i], scalars[i], "rnn_tanh", Cell::rnn_tanh, 37);
    check(names[i], scalars[i], "rnn_relu", Cell::rnn_relu, 37);
    check(names[i], scalars[i], "gru", Cell::gru, 37);
    check(names[i], scalars[i], "lstm", Cell::lstm, 37);
    check(names[i], scalars[i], "projected_lstm", Cell::lstm, 11);
  }
}
