// Sweeps of layers with layer norm in one launch, as single_cta.cuh says. A CTA has all units of its sequences, so that
// a norm is one exchange more between its warps.
#pragma once
#include "norms.cuh"
#include "single_cta_backward.cuh"
#include "single_cta_forward.cuh"

namespace seqkernels::device {

template <Arch ARCH, Cell CELL, class MathPolicy, bool BACKWARD, int WIDTH>
struct NormConfig : SingleCtaConfig<ARCH, CELL, MathPolicy, BACKWARD, WIDTH, false> {
  using Plain = SingleCtaConfig<ARCH, CELL, MathPolicy, BACKWARD, WIDTH, false>;
  static constexpr SingleCtaLayout layout = norm_single_cta_layout(Plain::variant, WIDTH);
  static_assert(Plain::M_TILES == 1);
};

// What both passes have. An element of a thread is unit i of its two in sequence s of its two.
template <class C>
class NormedTile {
 protected:
  static constexpr int G = C::G, S = G + (kHasC<C::CELL> ? 1 : 0);
  static constexpr int kWarps = C::threads / kWarpSize;
  using Masked = MaskedStep<C::CELL, float>;
  using Step = typename Tile::Step;

  DEVICE NormedTile(const NormStep& p, const Tile& tile)
      : norm_(p), tile_(tile), mine_(p, tile), hidden_(static_cast<int>(p.hidden)) {}

  // Scales of unit i. They and the shifts are read in every step: weights and sums take the registers.
  DEVICE float scale(int gate, int i) const { return parameter(norm_.norms.scale, G, gate, i); }
  DEVICE float scale_c(int i) const { return parameter(norm_.norms.scale_c, 1, 0, i); }

  // What a normalized number becomes.
  DEVICE float scaled(int gate, int i, float normalized) const {
    return normalized * scale(gate, i) + parameter(norm_.norms.shift, G, gate, i);
  }
  DEVICE float scaled_c(int i, float normalized) const {
    return normalized * scale_c(i) + parameter(norm_.norms.shift_c, 1, 0, i);
  }

  DEVICE bool normalizes_c() const { return kHasC<C::CELL> && norm_.norms.scale_c; }

  // Calls with each element, and whether the layer has it and it runs.
  template <class Do>
  DEVICE void each(int running, Do act) const {
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int i = 0; i < 2; i++) act(i, s, i < mine_.count(0, s, running));
  }

  DEVICE Masked masked(const Step& at, int i, int s) const {
    return {norm_.masks,        norm_, tile_.direction(), tile_.first() + mine_.lane.sequence + s, row(at, s),
            mine_.lane.unit + i};
  }

  // Of an array [N, D, blocks*H], an element that runs.
  DEVICE float load(const void* rows, int blocks, int block, const Step& at, int i, int s) const {
    return Global<const float>(static_cast<const float*>(rows), size(blocks)).load(place(blocks, block, at, i, s));
  }
  DEVICE void store(void* rows, int blocks, int block, const Step& at, int i, int s, float value) const {
    Global<float>(static_cast<float*>(rows), size(blocks)).store(place(blocks, block, at, i, s), value);
  }

  // Statistic k of a row, of an array [N, D, statistics_of_row].
  DEVICE int64_t statistic(const Step& at, int s, int k) const {
    return (row(at, s) * norm_.directions + tile_.direction()) * norm_.norms.statistics_of_row + k;
  }
  template <class T>
  DEVICE Global<T> statistics(T* data) const {
    return {data, norm_.rows * norm_.directions * norm_.norms.statistics_of_row};
  }

  // From a thread's sums over its units, for either sequence, the means over `count` numbers. There are two places for
  // an exchange, each for one a step.
  DEVICE void means(int exchange, float (&sums)[2][2], int count) const {
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int s = 0; s < 2; s++) sums[k][s] = over_lanes(sums[k][s]);
    publish(exchange, sums);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        sums[k][s] = 0;
        for (int warp = 0; warp < kWarps; warp++) sums[k][s] += of_warp(exchange, k, warp, s);
        sums[k][s] /= static_cast<float>(count);
      }
  }

  // Of the numbers x(block, i, s) of all units. Warps exchange sums, and sums of squares around their own means (Chan,
  // Golub and LeVeque 1983, "Algorithms for computing the sample variance").
  template <int BLOCKS, class Number>
  DEVICE void moments(int exchange, Number x, Moments<float> (&found)[2]) const {
    float own[2][2];
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const auto sum = [&](auto of) {
        float sum = 0;
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            if (i < mine_.present[0]) sum += of(x(block, i, s));
        return over_lanes(sum);
      };
      own[0][s] = sum([](float number) { return number; });
      const float mean = own[0][s] / static_cast<float>(BLOCKS * units_of(thread() / kWarpSize));
      own[1][s] = sum([&](float number) { return (number - mean) * (number - mean); });
    }
    publish(exchange, own);
    const float count = static_cast<float>(BLOCKS * hidden_);
#pragma unroll
    for (int s = 0; s < 2; s++) {
      float mean = 0, squares = 0;
      for (int warp = 0; warp < kWarps; warp++) mean += of_warp(exchange, 0, warp, s);
      mean /= count;
      for (int warp = 0; warp < kWarps && units_of(warp) > 0; warp++) {
        const float of_units = static_cast<float>(BLOCKS * units_of(warp));
        const float apart = of_warp(exchange, 0, warp, s) / of_units - mean;
        squares += of_warp(exchange, 1, warp, s) + of_units * apart * apart;
      }
      found[s] = {mean, 1 / square_root(squares / count + static_cast<float>(kNormEpsilon))};
    }
  }

  const NormStep& norm_;
  const Tile& tile_;
  const ThreadTile<C> mine_;
  const int hidden_;

 private:
  // Of an array [D, blocks*H], what belongs to unit i; 0 where there is none.
  DEVICE float parameter(const void* from, int blocks, int block, int i) const {
    const Global<const float> all(static_cast<const float*>(from), norm_.directions * blocks * norm_.hidden);
    if (!all || i >= mine_.present[0]) return 0;
    return all.load((tile_.direction() * blocks + block) * hidden_ + mine_.lane.unit + i);
  }

  DEVICE int64_t row(const Step& at, int s) const { return at.row + mine_.lane.sequence + s; }
  DEVICE int64_t size(int blocks) const { return norm_.rows * norm_.directions * blocks * norm_.hidden; }
  DEVICE int64_t place(int blocks, int block, const Step& at, int i, int s) const {
    return ((row(at, s) * norm_.directions + tile_.direction()) * blocks + block) * hidden_ + mine_.lane.unit + i;
  }

  // How many units of a warp's 16 the layer has.
  DEVICE int units_of(int warp) const {
    const int left = hidden_ - warp * kMmaRows;
    return left < 0 ? 0 : left < kMmaRows ? left : kMmaRows;
  }

  // Adds up over the lanes that have the same sequences.
  static DEVICE float over_lanes(float x) {
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) x += shfl_xor(x, mask);
    return x;
  }

  static DEVICE Shared<float> exchanged(int which) {
    return {(which + 1) * ThreadTile<C>::buffer_bytes - kMeansBytes, kMeansBytes / 4};
  }
  DEVICE void publish(int exchange, const float (&of_warp)[2][2]) const {
    if (lane() < 4)
#pragma unroll
      for (int k = 0; k < 2; k++)
        exchanged(exchange).store_pair((k * kWarps + thread() / kWarpSize) * kMaxTile + mine_.lane.sequence,
                                       pair(of_warp[k][0], of_warp[k][1]));
    synchronize();
  }
  DEVICE float of_warp(int exchange, int k, int warp, int s) const {
    return exchanged(exchange).load((k * kWarps + warp) * kMaxTile + mine_.lane.sequence + s);
  }
};

}  // namespace seqkernels::device
