// The layout of packed weights of int8, which seqkernels/quantized.py makes.
//
// A matrix [G * units, n] is [panels, kPanelRows + depth, G * 64] bytes: for each 16 units of all G gates a panel of
// rows [G, 16] of four bytes; first those of PanelRow, then the weights, four successive ones in each place, zeros
// behind the last. So a row is G rows of tiles, and G vectors of AVX-512, whatever the machine: packed weights may
// move.
#pragma once
#include <cstdint>

namespace seqkernels {

constexpr int64_t kPanelUnits = 16;
// What to add to sums because of the offset (int32), scales and biases (float32).
enum PanelRow { kCorrection, kScale, kBias, kPanelRows };

// What is added to a quantized number of x and h, so that it is a uint8.
constexpr int kOffset = 128;

// Sums of so many products fit into int32.
constexpr int64_t kMaxDepth = 1 << 16;

constexpr int64_t panels_of(int64_t units) { return (units + kPanelUnits - 1) / kPanelUnits; }

// The distance between quantized rows of n numbers, in bytes: whole tiles, of 64.
constexpr int64_t leading_bytes(int64_t n) { return (n + 63) / 64 * 64; }

constexpr int64_t panel_rows(int64_t n) { return kPanelRows + leading_bytes(n) / 4; }

}  // namespace seqkernels
