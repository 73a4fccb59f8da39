// The instructions of csrc/cpu/tiles.h on machines without AMX. Ends the process where a machine with it would: an
// instruction before a configuration, a configuration that is none, shapes that do not fit, a tile twice in a product.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tile_emulation {

struct State {
  bool configured = false;
  int64_t configurations = 0, products = 0;  // so far
  int row_bytes[8], rows[8];
  unsigned char data[8][16][64];
};
inline thread_local State state;

inline void demand(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "tiles: %s\n", what);
  abort();
}

template <class Config>
void load_tile_config(const Config& config) {
  unsigned char bytes[64];
  static_assert(sizeof(config) == sizeof(bytes));
  memcpy(bytes, &config, sizeof(bytes));
  demand(bytes[0] == 1 && bytes[1] == 0, "palette 1, from the first row on");
  for (int i = 2; i < 64; i++) {
    const bool of_tile = (i >= 16 && i < 32) || (i >= 48 && i < 56);
    demand(of_tile || bytes[i] == 0, "reserved bytes are zero");
  }
  for (int tile = 0; tile < 8; tile++) {
    state.row_bytes[tile] = bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8;
    state.rows[tile] = bytes[48 + tile];
    demand(state.rows[tile] >= 1 && state.rows[tile] <= 16, "1 to 16 rows");
    demand(state.row_bytes[tile] >= 1 && state.row_bytes[tile] <= 64, "1 to 64 bytes a row");
  }
  memset(state.data, 0, sizeof(state.data));
  state.configured = true;
  state.configurations++;
}

inline void release_tiles() { state.configured = false; }

template <int kTile>
void zero_tile() {
  demand(state.configured, "configured before use");
  memset(state.data[kTile], 0, sizeof(state.data[kTile]));
}

template <int kTile>
void load_tile(const void* rows, int64_t stride) {
  zero_tile<kTile>();
  for (int r = 0; r < state.rows[kTile]; r++)
    memcpy(state.data[kTile][r], static_cast<const char*>(rows) + r * stride, state.row_bytes[kTile]);
}

template <int kTile>
void store_tile(void* rows, int64_t stride) {
  demand(state.configured, "configured before use");
  for (int r = 0; r < state.rows[kTile]; r++)
    memcpy(static_cast<char*>(rows) + r * stride, state.data[kTile][r], state.row_bytes[kTile]);
}

// A bfloat16 as TDPBF16PS takes it: no denormal.
inline float factor(const unsigned char* bytes) {
  const uint32_t bits = static_cast<uint32_t>(bytes[0]) << 16 | static_cast<uint32_t>(bytes[1]) << 24;
  const uint32_t taken = bits & 0x7f800000 ? bits : bits & 0x80000000;
  float x;
  memcpy(&x, &taken, sizeof(x));
  return x;
}

// add(sum of type Sum, four bytes of A, four bytes of B) for every pair that a product of tiles multiplies.
template <class Sum, int kC, int kA, int kB, class Add>
void multiply_all(const Add& add) {
  static_assert(kC != kA && kC != kB && kA != kB, "three tiles");
  demand(state.configured, "configured before use");
  demand(state.rows[kA] == state.rows[kC], "as many rows of A as of C");
  demand(state.row_bytes[kB] == state.row_bytes[kC], "as many columns of B as of C");
  demand(state.row_bytes[kA] == 4 * state.rows[kB] && state.row_bytes[kC] % 4 == 0, "fours of A are rows of B");
  state.products++;
  for (int r = 0; r < state.rows[kC]; r++)
    for (int k = 0; k < state.rows[kB]; k++)
      for (int column = 0; column < state.row_bytes[kC] / 4; column++) {
        Sum sum;
        memcpy(&sum, state.data[kC][r] + 4 * column, sizeof(sum));
        add(sum, state.data[kA][r] + 4 * k, state.data[kB][k] + 4 * column);
        memcpy(state.data[kC][r] + 4 * column, &sum, sizeof(sum));
      }
}

template <int kC, int kA, int kB>
void multiply_tiles() {
  multiply_all<float, kC, kA, kB>([](float& sum, const unsigned char* a, const unsigned char* b) {
    sum += factor(a) * factor(b);
    sum += factor(a + 2) * factor(b + 2);
  });
}

// Of uint8 in A and int8 in B, without saturation.
template <int kC, int kA, int kB>
void multiply_byte_tiles() {
  multiply_all<uint32_t, kC, kA, kB>([](uint32_t& sum, const unsigned char* a, const unsigned char* b) {
    for (int i = 0; i < 4; i++) sum += static_cast<uint32_t>(a[i] * static_cast<signed char>(b[i]));
  });
}

}  // namespace tile_emulation
