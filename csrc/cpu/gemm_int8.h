// Products of quantized numbers: rows of int8, offset by 128 and so uint8, with weights of int8, added up in int32.
#pragma once
#include "gemm_pack.h"

namespace seqkernels::SEQKERNELS_ISA {

// Four successive numbers of a row, or of an output channel's weights.
struct int8x4 {
  uint8_t bytes[4];
};
// The same, multiplied by AVX512-VNNI or by tiles, where the machine has them (see Layer::int8_products).
struct int8x4_vnni {
  uint8_t bytes[4];
};
template <>
constexpr bool kInTiles<int8x4_vnni> = true;

typedef Vec<int32_t> i32;

template <>
struct SumOf<int8x4> {
  typedef int32_t type;
};
template <>
struct SumOf<int8x4_vnni> {
  typedef int32_t type;
};

template <>
inline i32 broadcast(int8x4 x) {
  return bits_of<int32_t>(x) + i32{};
}
template <>
inline i32 broadcast(int8x4_vnni x) {
  return bits_of<int32_t>(x) + i32{};
}

// Sums of two products of int16.
#if defined(__AVX512BW__)
inline i32 multiply_pairs(i32 a, i32 b) {
  return bits_of<i32>(_mm512_madd_epi16(bits_of<__m512i>(a), bits_of<__m512i>(b)));
}
#elif defined(__AVX2__)
inline i32 multiply_pairs(i32 a, i32 b) {
  return bits_of<i32>(_mm256_madd_epi16(bits_of<__m256i>(a), bits_of<__m256i>(b)));
}
#elif defined(__SSE2__) && !defined(SEQKERNELS_EMULATED_TILES)
inline i32 multiply_pairs(i32 a, i32 b) {
  return bits_of<i32>(_mm_madd_epi16(bits_of<__m128i>(a), bits_of<__m128i>(b)));
}
#else
inline i32 multiply_pairs(i32 a, i32 b) { return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
#endif

// Bytes 0 and 2 of each lane become int16, and so do bytes 1 and 3: of w with their signs, of x as they are.
template <>
inline i32 add_product<int8x4>(i32 sum, i32 w, i32 x) {
  typedef int16_t i16 __attribute__((vector_size(kVectorBytes)));
  const i16 halves = bits_of<i16>(w);
  const i32 even = multiply_pairs(bits_of<i32>(halves << 8 >> 8), x & 0x00ff00ff);
  const i32 odd = multiply_pairs(bits_of<i32>(halves >> 8), bits_of<i32>(bits_of<u32>(x) >> 8) & 0x00ff00ff);
  return sum + even + odd;
}

template <>
SEQKERNELS_PRODUCT_TARGET inline i32 add_product<int8x4_vnni>(i32 sum, i32 w, i32 x) {
#if defined(__AVX512F__)
  return bits_of<i32>(_mm512_dpbusd_epi32(bits_of<__m512i>(sum), bits_of<__m512i>(x), bits_of<__m512i>(w)));
#else
  return add_product<int8x4>(sum, w, x);
#endif
}

}  // namespace seqkernels::SEQKERNELS_ISA
