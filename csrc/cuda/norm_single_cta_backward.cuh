// The backward pass of a single CTA with layer norm.
#pragma once
#include "norm_single_cta.cuh"

namespace seqkernels::device {

template <class C>
class NormSingleCtaBackward : NormedTile<C> {
  using Base = NormedTile<C>;
  using Base::G, Base::S, Base::norm_, Base::tile_, Base::mine_, Base::hidden_;
  using typename Base::Masked, typename Base::Step;
  using Unit = NormedUnit<C::CELL, float>;
  using OfStates = StateGradients<C::CELL, float>;
  static constexpr int kApart = CellTraits<C::CELL>::apart;

  // What a step reads of the thread's elements, and of their rows.
  struct Inputs {
    float normalized[G][kElements], x[G][kElements], grad_y[kElements], h_before[kElements], c_before[kElements];
    float inverse[2];
    Moments<float> of_c[2];
  };

 public:
  static constexpr int threads = C::threads;
  static constexpr SingleCtaLayout layout = C::layout;
  using Parameters = SingleCtaArgs<NormStepBackward>;

  static DEVICE void run(const Parameters& p) {
    const Tile tile(p, p.tile);
    const PackedWeights<C> weights(p, tile.direction());  // transposed
    NormSingleCtaBackward(p, tile).run(weights);
  }

 private:
  DEVICE NormSingleCtaBackward(const NormStepBackward& p, const Tile& tile) : Base(p, tile), p_(p) {}

  DEVICE void run(const PackedWeights<C>& weights) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const Pair<float> h = mine_.load_state(p_.grad_h, 0, s);
      grad_h_[0][s] = first(h), grad_h_[0][2 + s] = second(h);
      to_acc(mine_.load_state(p_.grad_c, 0, s), grad_c_[s]);
    }
    const int64_t last = tile_.count() - 1;
    Step now = tile_.step(tile_.prefetch(last)), before = tile_.step(tile_.prefetch(last - 1)),
         earlier = tile_.step(tile_.prefetch(last - 2));
    Inputs inputs = {};
    load(now, before, inputs);
    for (int64_t k = last; k >= 0; k--) {
      const Shared<float> gradients = mine_.factors(k % 2);
      const typename Tile::Prefetched prefetched = tile_.prefetch(k - 3);
      run_step(now, inputs, gradients);
      synchronize();
      // Load what the next step reads; the products hide the latency.
      const int running = now.running;
      now = before, before = earlier, earlier = tile_.step(prefetched);
      load(now, before, inputs);
      multiply(weights, gradients, running);
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
      mine_.store_state(p_.grad_h, 0, s, pair(grad_h_[0][s], grad_h_[0][2 + s]));
      if (kHasC<C::CELL>) mine_.store_state(p_.grad_c, 0, s, from_acc<float>(grad_c_[s]));
    }
    store_sums();
  }

  DEVICE void load(const Step& now, const Step& before, Inputs& in) const {
    this->each(now.running, [&](int i, int s, bool runs) {
      if (!runs) return;
      const int e = i * 2 + s;
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
        in.normalized[gate][e] = Base::load(p_.saved, S, gate, now, i, s);
        in.x[gate][e] = norm_.norms.of_sum ? 0 : Base::load(norm_.norms.gates_x, G, gate, now, i, s);
      }
      in.grad_y[e] = p_.grad_y ? Base::load(p_.grad_y, 1, 0, now, i, s) : 0;
      const bool ran = mine_.lane.sequence + s < before.running;
      in.h_before[e] = ran ? Base::load(p_.y, 1, 0, before, i, s) : initial(p_.h_0, i, s);
      if constexpr (kHasC<C::CELL>)
        in.c_before[e] = ran ? Base::load(p_.saved, S, G, before, i, s) : initial(p_.c_0, i, s);
      const Global<const float> from = this->statistics(static_cast<const float*>(p_.statistics));
      in.inverse[s] = from.load(this->statistic(now, s, 0));
      if (this->normalizes_c())
        in.of_c[s] = {from.load(this->statistic(now, s, 1)), from.load(this->statistic(now, s, 2))};
    });
  }

  DEVICE float initial(const void* states, int i, int s) const {
    const Pair<float> units = mine_.load_state(states, 0, s);
    return i ? second(units) : first(units);
  }

  DEVICE Unit computed(const Masked& masked, const Inputs& in, int i, int s) const {
    const int e = i * 2 + s;
    float x[G], recurrent[G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      recurrent[gate] = this->scaled(gate, i, in.normalized[gate][e]);
      x[gate] = in.x[gate][e];
    }
    return {masked, x, recurrent, in.h_before[e], in.c_before[e]};
  }

  DEVICE OfStates gradients_of(const Masked& masked, const Inputs& in, int i, int s) const {
    return {masked, grad_h_[0][i * 2 + s] + in.grad_y[i * 2 + s], grad_c_[s][i]};
  }

  DEVICE ReadC<float> read(const Unit& u, const Inputs& in, int i, int s, float grad_h) const {
    const float normalized = in.of_c[s].of(u.c);
    return read_c(u, normalized, this->scaled_c(i, normalized), grad_h);
  }

  DEVICE void run_step(const Step& now, const Inputs& in, Shared<float> gradients) {
    float of_c[2][2] = {}, of_gates[2][2] = {}, grad[kElements][kMaxBlocks] = {};  // means, gradients of gates
    if (this->normalizes_c()) {
      this->each(now.running, [&](int i, int s, bool runs) {
        if (runs) run_c(now, in, i, s, of_c);
      });
      this->means(1, of_c, hidden_);
    }
    this->each(now.running, [&](int i, int s, bool runs) {
      if (runs) run_cell(now, in, i, s, of_c, grad[i * 2 + s], of_gates);
    });
    this->means(0, of_gates, G * hidden_);
#pragma unroll
    for (int gate = 0; gate < G; gate++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        float of_sums[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
          of_sums[i] =
              i < mine_.count(0, s, now.running) ? normalize(now, in, gate, i, s, of_gates, grad[i * 2 + s][gate]) : 0;
        gradients.store_pair(mine_.place(0, s) + gate * C::WIDTH, pair(of_sums[0], of_sums[1]));
      }
  }

  // Adds to the sums for the means of the gradient of c's norm.
  DEVICE void run_c(const Step& now, const Inputs& in, int i, int s, float (&sums)[2][2]) {
    const Masked masked = this->masked(now, i, s);
    const ReadC<float> found = read(computed(masked, in, i, s), in, i, s, gradients_of(masked, in, i, s).h);
    const float grad = found.grad * this->scale_c(i);
    sums[0][s] += grad, sums[1][s] += grad * found.normalized;
    of_scale_c_[i] += found.grad * found.normalized, of_shift_c_[i] += found.grad;
  }

  // Adds to the sums for the means of the gradient of the gates' norm.
  DEVICE void run_cell(const Step& now, const Inputs& in, int i, int s, const float (&of_c)[2][2],
                       float (&grad)[kMaxBlocks], float (&sums)[2][2]) {
    const Masked masked = this->masked(now, i, s);
    const Unit u = computed(masked, in, i, s);
    OfStates of = gradients_of(masked, in, i, s);
    if (this->normalizes_c()) {
      const ReadC<float> found = read(u, in, i, s, of.h);
      const float means[2] = {of_c[0][s], of_c[1][s]};
      const float grad_c =
          normalized_backward(found.grad * this->scale_c(i), found.normalized, means, in.of_c[s].inverse);
      of.run(masked, u, &found, grad_c, grad);
    } else {
      of.run(masked, u, nullptr, 0, grad);
    }
    grad_h_[0][i * 2 + s] = of.h, grad_c_[s][i] = of.c;
    this->store(p_.factors, 1, 0, now, i, s, masked.in_products(0, u.h_before));
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const float scaled = grad[gate] * this->scale(gate, i);
      sums[0][s] += scaled, sums[1][s] += scaled * in.normalized[gate][i * 2 + s];
      if (p_.grad_gates_x)
        this->store(p_.grad_gates_x, G, gate, now, i, s, grad[gate < G - kApart ? gate : gate + kApart]);
    }
  }

  // The gradient of what was normalized.
  DEVICE float normalize(const Step& now, const Inputs& in, int gate, int i, int s, const float (&of_gates)[2][2],
                         float grad) {
    const float normalized = in.normalized[gate][i * 2 + s], means[2] = {of_gates[0][s], of_gates[1][s]};
    const float of_sum = normalized_backward(grad * this->scale(gate, i), normalized, means, in.inverse[s]);
    this->store(p_.grad_sums, G, gate, now, i, s, of_sum);
    of_scale_[gate][i] += grad * normalized, of_shift_[gate][i] += grad;
    return of_sum;
  }

  // Adds to the gradient of h what reaches it through the products; zeros for sequences that do not run.
  DEVICE void multiply(const PackedWeights<C>& weights, Shared<float> gradients, int running) {
    float products[1][kElements] = {};
    SingleCtaBackward<C>::multiply_all(weights, 0, gradients, running, products);
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const auto masked = mine_.masks(norm_.masks, norm_, 0, 0, s);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (i < mine_.count(0, s, running)) grad_h_[0][i * 2 + s] += masked.in_products(i, products[0][i * 2 + s]);
    }
  }

  // The sums of all of the tile's sequences take the place of its first one's.
  DEVICE void store_sums() const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
        store_sum(p_.grad_scale, G, gate, i, of_scale_[gate][i]);
        store_sum(p_.grad_shift, G, gate, i, of_shift_[gate][i]);
      }
      store_sum(p_.grad_scale_c, 1, 0, i, of_scale_c_[i]);
      store_sum(p_.grad_shift_c, 1, 0, i, of_shift_c_[i]);
    }
  }
  DEVICE void store_sum(void* to, int blocks, int block, int i, float sum) const {
    sum += shfl_xor(sum, 1);
    sum += shfl_xor(sum, 2);
    const Global<float> all(static_cast<float*>(to), norm_.directions * norm_.sequences * blocks * norm_.hidden);
    const int64_t state = tile_.direction() * norm_.sequences + tile_.first();
    if (all && lane() % 4 == 0 && i < mine_.present[0])
      all.store((state * blocks + block) * hidden_ + mine_.lane.unit + i, sum);
  }

  const NormStepBackward& p_;
  float grad_h_[1][kElements], grad_c_[2][2];
  float of_scale_[G][2] = {}, of_shift_[G][2] = {}, of_scale_c_[2] = {}, of_shift_c_[2] = {};  // sums so far
};

}  // namespace seqkernels::device
