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

// An array of numbers of a layer's type.
struct Array {
  Scalar scalar;
  std::vector<unsigned char> bytes;

  Array(Scalar scalar, int64_t size, double scale) : scalar(scalar), bytes(size * bytes_of(scalar)) {
    for (int64_t i = 0; i < size; i++) {
      const double x = scale * next_number();
      const float single = static_cast<float>(x);
      uint32_t bits;
      memcpy(&bits, &single, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      const void* from = scalar == Scalar::float64    ? static_cast<const void*>(&x)
                         : scalar == Scalar::bfloat16 ? static_cast<const void*>(&high)
                                                      : static_cast<const void*>(&single);
      memcpy(&bytes[i * bytes_of(scalar)], from, bytes_of(scalar));
    }
  }

  static int bytes_of(Scalar scalar) { return scalar == Scalar::float64 ? 8 : scalar == Scalar::bfloat16 ? 2 : 4; }
  void* data() { return bytes.data(); }

  double norm() const {
    double sum = 0;
    for (size_t i = 0; i < bytes.size(); i += bytes_of(scalar)) {
      double x = 0;
      float single = 0;
      const uint32_t bits = static_cast<uint32_t>(bytes[i]) << 16 | static_cast<uint32_t>(bytes[i + 1]) << 24;
      if (scalar == Scalar::float64) memcpy(&x, &bytes[i], 8);
      if (scalar == Scalar::float32) memcpy(&single, &bytes[i], 4);
      if (scalar == Scalar::bfloat16) memcpy(&single, &bits, 4);
      if (scalar != Scalar::float64) x = single;
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

constexpr int64_t T = 5, B = 3, N = 12, I = 21, H = 37;
constexpr int D = 2;
constexpr int64_t kBatchSizes[T] = {3, 3, 3, 2, 1}, kOffsets[T] = {0, 3, 6, 9, 11};

// A layer and its results; P is the size of h.
class Case {
 public:
  Case(Cell cell, Scalar scalar, int64_t P) : P_(P), has_c_(states_of(cell) == 2) {
    layer_.cell = cell;
    layer_.scalar = scalar;
    layer_.steps = T;
    layer_.sequences = layer_.states = B;
    layer_.rows = N;
    layer_.input = I;
    layer_.hidden = H;
    layer_.projected = P;
    layer_.directions = D;
    layer_.has_projection = P != H;
    layer_.batch_sizes = kBatchSizes;
    layer_.offsets = kOffsets;
    layer_.x = random(N * I, 1);
    set_weights(layer_.weights, [&](int64_t size) { return random(size, 0.2); });
    layer_.h_0 = random(D * B * P, 1);
    layer_.c_0 = has_c_ ? random(D * B * H, 1) : nullptr;
  }

  void run() {
    const int64_t K = saved_blocks_of(layer_.cell);
    LayerForward forward{};
    static_cast<Layer&>(forward) = layer_;
    forward.y = result(N * D * P_);
    forward.h_n = result(D * B * P_);
    forward.c_n = has_c_ ? result(D * B * H) : nullptr;
    forward.saved = result(N * D * K * H);
    ::run(forward, kernels().forward_bytes, kernels().forward);

    LayerBackward backward{};
    static_cast<Layer&>(backward) = layer_;
    backward.grad_y = random(N * D * P_, 1);
    backward.y = forward.y;
    backward.saved = forward.saved;
    backward.grad_x = result(N * I);
    set_weights(backward.grad_weights, [&](int64_t size) { return result(size); });
    backward.grad_h_0 = result(D * B * P_);
    backward.grad_c_0 = has_c_ ? result(D * B * H) : nullptr;
    ::run(backward, kernels().backward_bytes, kernels().backward);
  }

  void print_norms() const {
    for (const Array* array : results_) printf(" %.16e", array->norm());
  }

 private:
  void* random(int64_t size, double scale) {
    arrays_.emplace_back(new Array(layer_.scalar, size, scale));
    return arrays_.back()->data();
  }
  void* result(int64_t size) {
    void* data = random(size, 0);
    results_.push_back(arrays_.back().get());
    return data;
  }

  template <class Pointer, class Make>
  void set_weights(WeightsOf<Pointer> (&weights)[D], const Make& make) const {
    const int64_t G = gates_of(layer_.cell);
    for (WeightsOf<Pointer>& of : weights) {
      of.w_ih = make(G * H * I);
      of.w_hh = make(G * H * P_);
      of.b_ih = make(G * H);
      of.b_hh = make(G * H);
      of.w_hr = P_ != H ? make(P_ * H) : nullptr;
    }
  }

  const int64_t P_;
  const bool has_c_;
  Layer layer_{};
  std::vector<std::unique_ptr<Array>> arrays_;
  std::vector<const Array*> results_;
};

void check(const char* scalar_name, Scalar scalar, Cell cell, int64_t P) {
  Case one(cell, scalar, P);
  one.run();
  printf("%s %s%s", scalar_name, P != H ? "projected_" : "", name_of(cell));
  one.print_norms();
  printf("\n");
}

}  // namespace

int main(int, char** arguments) {
  if (arguments[1] && !force_kernels(arguments[1])) return 2;
  const Scalar scalars[] = {Scalar::float64, Scalar::float32, Scalar::bfloat16};
  const char* names[] = {"float64", "float32", "bfloat16"};
  for (int i = 0; i < 3; i++) {
    for (const Cell cell : kCells) {
      check(names[i], scalars[i], cell, H);
      if (can_project(cell)) check(names[i], scalars[i], cell, 11);
    }
  }
}
