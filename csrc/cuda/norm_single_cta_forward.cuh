// The forward pass of a single CTA with layer norm.
#pragma once
#include "norm_single_cta.cuh"

namespace seqkernels::device {

template <class C>
class NormSingleCtaForward : NormedTile<C> {
  using Base = NormedTile<C>;
  using Base::G, Base::S, Base::norm_, Base::tile_, Base::mine_, Base::hidden_;
  using typename Base::Step;

 public:
  static constexpr int threads = C::threads;
  static constexpr SingleCtaLayout layout = C::layout;
  using Parameters = SingleCtaArgs<NormStepForward>;

  static DEVICE void run(const Parameters& p) {
    const Tile tile(p, p.tile);
    const PackedWeights<C> weights(p, tile.direction());
    NormSingleCtaForward(p, tile).run(weights);
  }

 private:
  DEVICE NormSingleCtaForward(const NormStepForward& p, const Tile& tile) : Base(p, tile), p_(p) {}

  DEVICE void run(const PackedWeights<C>& weights) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      to_acc(mine_.load_state(p_.h, 0, s), h_[s]);
      to_acc(mine_.load_state(p_.c, 0, s), c_[s]);
      put_factors(mine_.factors(0), s);
    }
    Step now = tile_.step(tile_.prefetch(0)), next = tile_.step(tile_.prefetch(1));
    synchronize();
    for (int64_t k = 0; k < tile_.count(); k++) {
      const typename Tile::Prefetched after_next = tile_.prefetch(k + 2);
      run_step(weights, now, mine_.factors(k % 2), mine_.factors((k + 1) % 2));
      now = next, next = tile_.step(after_next);
      synchronize();
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
      mine_.store_state(p_.h, 0, s, from_acc<float>(h_[s]));
      if (kHasC<C::CELL>) mine_.store_state(p_.c, 0, s, from_acc<float>(c_[s]));
    }
  }

  DEVICE void run_step(const PackedWeights<C>& weights, const Step& now, Shared<float> before, Shared<float> after) {
    const bool of_sum = norm_.norms.of_sum;
    float x[G][kElements], sum[G][kElements] = {}, h[2][2] = {}, c[2][2] = {};
    this->each(now.running, [&](int i, int s, bool runs) {
#pragma unroll
      for (int gate = 0; gate < G; gate++)
        x[gate][i * 2 + s] = runs ? this->load(norm_.norms.gates_x, G, gate, now, i, s) : 0;
    });
    SingleCtaForward<C>::multiply_all(weights, 0, before, now.running, sum);
    if (of_sum) {
#pragma unroll
      for (int gate = 0; gate < G; gate++)
#pragma unroll
        for (int e = 0; e < kElements; e++) sum[gate][e] += x[gate][e], x[gate][e] = 0;
    }
    Moments<float> of_gates[2], of_c[2] = {};
    this->template moments<G>(0, [&](int gate, int i, int s) { return sum[gate][i * 2 + s]; }, of_gates);
    this->each(now.running, [&](int i, int s, bool runs) {
      if (runs) run_cell(now, i, s, of_gates[s], x, sum, h[s][i], c[s][i]);
    });
    if constexpr (kHasC<C::CELL>)
      if (this->normalizes_c()) {
        this->template moments<1>(1, [&](int, int i, int s) { return c[s][i]; }, of_c);
        this->each(now.running, [&](int i, int s, bool) { h[s][i] *= tanh(this->scaled_c(i, of_c[s].of(c[s][i]))); });
      }
    this->each(now.running, [&](int i, int s, bool runs) {
      if (runs) store_state(now, i, s, h[s][i], c[s][i]);
    });
#pragma unroll
    for (int s = 0; s < 2; s++) {
      if (p_.statistics && mine_.lane.unit == 0 && mine_.lane.sequence + s < now.running)
        store_statistics(now, s, of_gates[s], of_c[s]);
      put_factors(after, s);
    }
  }

  // c and h; where c is normalized o instead of h.
  DEVICE void run_cell(const Step& now, int i, int s, const Moments<float>& moments, const float (&x)[G][kElements],
                       const float (&sum)[G][kElements], float& h, float& c) const {
    float x_i[G], recurrent[G];
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      const float normalized = moments.of(sum[gate][i * 2 + s]);
      if (p_.saved) this->store(p_.saved, S, gate, now, i, s, normalized);
      recurrent[gate] = this->scaled(gate, i, normalized);
      x_i[gate] = x[gate][i * 2 + s];
    }
    const NormedUnit<C::CELL, float> u(this->masked(now, i, s), x_i, recurrent, h_[s][i], c_[s][i]);
    h = this->normalizes_c() ? u.blocks[3] : u.h;
    c = u.c;
  }

  DEVICE void store_state(const Step& now, int i, int s, float h, float c) {
    const auto masked = this->masked(now, i, s);
    masked.zone_h(0, h_[s][i], h);
    h_[s][i] = h;
    this->store(p_.y, 1, 0, now, i, s, h);
    if constexpr (kHasC<C::CELL>) {
      masked.zone_c(0, c_[s][i], c);
      c_[s][i] = c;
      if (p_.saved) this->store(p_.saved, S, G, now, i, s, c);
    }
  }

  DEVICE void store_statistics(const Step& now, int s, const Moments<float>& of_gates, const Moments<float>& of_c) {
    const Global<float> to = this->statistics(static_cast<float*>(p_.statistics));
    to.store(this->statistic(now, s, 0), of_gates.inverse);
    if (!this->normalizes_c()) return;
    to.store(this->statistic(now, s, 1), of_c.mean);
    to.store(this->statistic(now, s, 2), of_c.inverse);
  }

  // h as products read it, also of sequences that do not run.
  DEVICE void put_factors(Shared<float> to, int s) const {
    float factors[2] = {h_[s][0], h_[s][1]};
    const auto masked = mine_.masks(norm_.masks, norm_, 0, 0, s);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < mine_.count(0, s, tile_.sequences())) factors[i] = masked.in_products(i, factors[i]);
    to.store_pair(mine_.place(0, s), pair(factors[0], factors[1]));
  }

  const NormStepForward& p_;
  float h_[2][2], c_[2][2];  // of either sequence
};

}  // namespace seqkernels::device
