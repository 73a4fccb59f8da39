// Products with packed matrices of int8, and the rows they multiply: quantized, each with its scale.
#pragma once
#include "layout.h"
#include "packed_int8.h"

namespace seqkernels::SEQKERNELS_ISA {

// A packed matrix [G * units, n].
template <int G, class F>
struct Int8Matrix {
  static constexpr int64_t kStride = G * kPanelUnits;
  const F* data;
  int64_t n;

  int64_t depth() const { return leading_bytes(n) / 4; }
  const F* head(int64_t panel) const { return data + panel * panel_rows(n) * kStride; }
  const F* weights(int64_t panel) const { return head(panel) + kPanelRows * kStride; }
};

// A row's product with units [16 panel + first, + lanes of a vector) of each gate, of which `sums` are sums.
template <int G>
SEQKERNELS_INLINE void dequantize(const void* head, int64_t first, const i32* sums, float row_scale, Vec<float>* out) {
  const int32_t* correction = static_cast<const int32_t*>(head) + first;
  const float* scale = static_cast<const float*>(head) + kScale * G * kPanelUnits + first;
  const float* bias = static_cast<const float*>(head) + kBias * G * kPanelUnits + first;
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    const i32 sum = sums[g] + load(correction + g * kPanelUnits);
    out[g] = __builtin_convertvector(sum, Vec<float>) * (load(scale + g * kPanelUnits) * row_scale) +
             load(bias + g * kPanelUnits);
  }
}

// Multiplies rows (row(r) points to them, row_scale(r) is theirs) with panels [first, last). each(r, unit, x) sees the
// product with a vector of units of each of the G gates.
template <int G, class F, class Row, class RowScale, class Each>
SEQKERNELS_INLINE void product_int8(const Int8Matrix<G, F>& w, int64_t first, int64_t last, int64_t rows,
                                    const Row& row, const RowScale& row_scale, Tiles* tiles, const Each& each) {
  constexpr int kLane = kLanes<float>;
  const auto finish = [&](int64_t panel, int64_t r, int64_t lane, const i32* sums) {
    Vec<float> x[G];
    dequantize<G>(w.head(panel), lane, sums, row_scale(r), x);
    each(r, panel * kPanelUnits + lane, x);
  };
  const Depth depth = Depth::of(tiles ? w.depth() : (w.n + 3) / 4, tiles);
#if defined(SEQKERNELS_TILES)
  if constexpr (kInTiles<F>)
    if (tiles)
      return for_panels_by_tiles<G, false>(
          last - first, [&](int64_t i) { return w.weights(first + i); }, w.kStride, rows, depth, row,
          [&](int64_t i, int64_t r, const i32* sums) { finish(first + i, r, 0, sums); });
#endif
  for (int64_t panel = first; panel < last; panel++) {
    if constexpr (kLane == kPanelUnits) {
      for_rows<G>(rows, depth, row, w.weights(panel), w.kStride,
                  [&](int64_t r, const i32* sums) { finish(panel, r, 0, sums); });
    } else {  // a row of a gate is several vectors
      constexpr int N = kPanelUnits / kLane;
      i32 sums[G][kMc * N];
      for (int64_t r0 = 0; r0 < rows; r0 += kMc) {
        const int64_t count = min(rows - r0, kMc);
        for (int g = 0; g < G; g++)
          for_rows<N>(
              count, depth, [&](int64_t r) { return row(r0 + r); }, w.weights(panel) + g * kPanelUnits, w.kStride,
              [&](int64_t r, const i32* out) {
                for (int v = 0; v < N; v++) sums[g][r * N + v] = out[v];
              });
        for (int64_t r = 0; r < count; r++)
          for (int v = 0; v < N; v++) {
            i32 of_unit[G];
            for (int g = 0; g < G; g++) of_unit[g] = sums[g][r * N + v];
            finish(panel, r0 + r, v * kLane, of_unit);
          }
      }
    }
  }
}

// ---- quantized rows

// To nearest, ties to even, which is the processor's way.
inline i32 round_to_int(Vec<float> x) {
#if defined(__AVX512F__)
  return bits_of<i32>(_mm512_cvtps_epi32(x));
#elif defined(__AVX2__)
  return bits_of<i32>(_mm256_cvtps_epi32(x));
#elif defined(__SSE2__) && !defined(SEQKERNELS_EMULATED_TILES)
  return bits_of<i32>(_mm_cvtps_epi32(x));
#else
  i32 rounded;
  for (int i = 0; i < kLanes<float>; i++) rounded[i] = static_cast<int32_t>(__builtin_rintf(x[i]));
  return rounded;
#endif
}

inline int32_t largest_lane(i32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(bits_of<__m512i>(x));
#else
  int32_t largest = x[0];
  for (int i = 1; i < kLanes<int32_t>; i++) largest = largest > x[i] ? largest : x[i];
  return largest;
#endif
}

// Stores lanes between 0 and 255 as bytes, which a compiler would do one by one.
inline void store_bytes(uint8_t* to, i32 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits_of<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i all = bits_of<__m256i>(x);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#elif defined(__SSE2__) && !defined(SEQKERNELS_EMULATED_TILES)
  const __m128i halves = _mm_packs_epi32(bits_of<__m128i>(x), bits_of<__m128i>(x));
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  memcpy(to, &bytes, sizeof(bytes));
#else
  for (int i = 0; i < kLanes<int32_t>; i++) to[i] = static_cast<uint8_t>(x[i]);
#endif
}

// Quantizes a row of n numbers, x = scale * (to - kOffset), and returns the scale: the largest number becomes 127. A
// row without a number from kSmallest on is zeros, and one with an infinity or NaN has NaN for its scale, so that all
// its products are NaN.
inline float quantize_row(const float* x, int64_t n, uint8_t* to) {
  constexpr int kLane = kLanes<float>;
  constexpr float kLargest = 127, kSmallest = 0x1p-120f;  // whose reciprocal times kLargest is finite
  i32 lanes{};  // as integers, the bits of numbers without sign are in the order of the numbers; NaN comes last
  for (int64_t i = 0; i < n; i += kLane) {
    const i32 bits = bits_of<i32>(load(x + i, n - i)) & 0x7fffffff;
    lanes = bits > lanes ? bits : lanes;
  }
  const int32_t bits = largest_lane(lanes);
  const float largest = bits_of<float>(bits);
  const bool finite = bits < 0x7f800000, zero = !finite || largest < kSmallest;
  const float factor = zero ? 0 : kLargest / largest;
  for (int64_t i = 0; i < n; i += kLane)
    store_bytes(to + i, (zero ? i32{} : round_to_int(load(x + i, n - i) * factor)) + kOffset);
  return finite ? (zero ? 0 : largest / kLargest) : __builtin_nanf("");
}

}  // namespace seqkernels::SEQKERNELS_ISA
