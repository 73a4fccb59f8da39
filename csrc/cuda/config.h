// What the CUDA kernels are made of, and what fits on a GPU: paths, math policies, tile sizes, how many fragments of
// the weights stay in registers, and where everything lies in shared memory. Each fact stands here once: the kernels
// take their layouts from here, the planner (plan.cpp) what fits. Plain constexpr C++, no CUDA header, so that both can
// be compiled anywhere. Letters as in layer.h; a CTA is a block of threads, a target is a compute capability (90
// is 9.0).
//
// To support another architecture: a row in Arch, its paths in has_path(), and rows in kResident where its compiler
// needs other numbers than those of the architecture before it.
#pragma once
#include "../layer.h"

namespace seqkernels {

// ---- paths, arithmetic, architectures

enum class Path { stepwise, single_cta, cluster, persistent_grid };

// How a CTA multiplies by the recurrent weights: float32 by plain multiply-adds, float32 rounded to TF32 by tensor
// cores, or 16-bit numbers by tensor cores. mma.cuh has a policy for each.
enum class Math { fp32_fma, tf32, tensor_core };

constexpr Math math_of(Scalar scalar, bool tf32) {
  return scalar == Scalar::bfloat16 || scalar == Scalar::float16 ? Math::tensor_core
         : tf32                                                  ? Math::tf32
                                                                 : Math::fp32_fma;
}
constexpr int element_bytes(Math math) { return math == Math::tensor_core ? 2 : 4; }

// Architectures that differ in what fits; each number is the first target that it is for.
enum class Arch { sm_80 = 80, sm_90 = 90 };

constexpr Arch arch_of(int target) { return target >= 90 ? Arch::sm_90 : Arch::sm_80; }

// The lowest target that the kernels of a path can be compiled for; native_build/cuda.py compiles them for those.
constexpr int min_target(Path path) { return path == Path::stepwise ? 70 : path == Path::single_cta ? 80 : 90; }

// Whether a GPU runs a path. The persistent grid is tuned for 9.0 alone, where copies to a cluster are quick (PTX ISA,
// cp.async.bulk).
constexpr bool has_path(Path path, int target) {
  return path == Path::persistent_grid ? target == 90 : target >= min_target(path);
}

// ---- tiles

constexpr int ceil_div(int64_t n, int divisor) { return static_cast<int>((n + divisor - 1) / divisor); }

constexpr int kMaxTile = 8;         // sequences that a CTA takes at most: the columns of one MMA
constexpr int kMmaRows = 16;        // rows of a matrix that a warp multiplies at once: hidden units
constexpr int kWarpSize = 32;       // lanes of a warp
constexpr int kKBlockBytes = 64;    // of a row that a warp multiplies at once: 16 for each of the lanes that share it
constexpr int kFragmentBytes = 32;  // what a lane has of 16 rows by a k-block

// Columns of a matrix that are multiplied at once.
constexpr int k_block_width(Math math) { return kKBlockBytes / element_bytes(math); }

// Factors from one sequence's row to the next in shared memory, for rows of `width`, a multiple of a k-block. Rows
// begin 64 bytes apart modulo 128, so that 8 lanes read 16 bytes each from different banks.
constexpr int row_stride(int width, Math math) {
  return width + (width / k_block_width(math) % 2 ? 0 : k_block_width(math));
}

// Two buffers, so that one barrier or one exchange a step is enough; each has a row of factors for every sequence.
constexpr int factor_buffer_bytes(int stride, Math math) { return kMaxTile * stride * element_bytes(math); }

// What distinguishes the kernels of one path, besides their sizes.
struct Variant {
  Arch arch;
  Cell cell;
  Math math;
  bool backward;
  bool even;  // the layer has an even number of units: two are read in one access
};

constexpr Variant variant_of(Arch arch, Cell cell, Math math, bool backward, bool even) {
  Variant v{};
  v.arch = arch;
  v.cell = cell;
  v.math = math;
  v.backward = backward;
  v.even = even;
  return v;
}

// A gate whose products stay apart has two biases, one for W_ih x and one for W_hh h; of others these are one sum.
constexpr int bias_blocks_of(Cell cell) { return gates_of(cell) + apart_of(cell); }
// Bytes of the biases of so many units, in the layer's dtype: in registers they would take the place of weights.
constexpr int shared_biases(Cell cell, int units, Math math) {
  return bias_blocks_of(cell) * units * element_bytes(math);
}

// ---- register-resident weights: as many as a thread can have beside all else without spilling, as the compiler's code
// shows (tests/cuda/test_cuda_compiled.py reads it there)

struct ResidentRow {
  Path path;
  Arch arch;  // and newer ones, up to the next with a row for the same
  int gates;
  Math math;
  int max_width;  // units of the widest kernel; of a cluster or the grid: any
  struct {
    int even, odd;  // for even and odd numbers of units
  } forward, backward;
};

constexpr int kAnyWidth = 1 << 30;

// For a single CTA groups of fragments, a group having one of each gate; for the others fragments.
constexpr ResidentRow kResident[] = {
    {Path::single_cta, Arch::sm_80, 1, Math::fp32_fma, 128, {16, 16}, {16, 16}},
    {Path::single_cta, Arch::sm_80, 1, Math::tf32, 128, {16, 16}, {16, 16}},
    {Path::single_cta, Arch::sm_80, 1, Math::tensor_core, 256, {16, 16}, {16, 14}},
    {Path::single_cta, Arch::sm_80, 2, Math::fp32_fma, 128, {4, 4}, {5, 5}},
    {Path::single_cta, Arch::sm_80, 2, Math::tf32, 128, {7, 7}, {6, 6}},
    {Path::single_cta, Arch::sm_80, 2, Math::tensor_core, 256, {6, 6}, {5, 5}},
    {Path::single_cta, Arch::sm_80, 3, Math::fp32_fma, 128, {4, 4}, {4, 4}},
    {Path::single_cta, Arch::sm_80, 3, Math::tf32, 128, {6, 6}, {5, 5}},
    {Path::single_cta, Arch::sm_80, 3, Math::tensor_core, 128, {4, 4}, {4, 4}},
    {Path::single_cta, Arch::sm_80, 3, Math::tensor_core, 256, {5, 5}, {4, 3}},
    {Path::single_cta, Arch::sm_80, 4, Math::fp32_fma, 64, {1, 1}, {2, 2}},
    {Path::single_cta, Arch::sm_80, 4, Math::fp32_fma, 128, {1, 1}, {2, 2}},
    {Path::single_cta, Arch::sm_80, 4, Math::tf32, 128, {4, 3}, {3, 3}},
    {Path::single_cta, Arch::sm_80, 4, Math::tensor_core, 128, {4, 4}, {4, 4}},
    {Path::single_cta, Arch::sm_80, 4, Math::tensor_core, 256, {3, 2}, {2, 2}},

    {Path::cluster, Arch::sm_90, 1, Math::fp32_fma, kAnyWidth, {17, 17}, {12, 12}},
    {Path::cluster, Arch::sm_90, 1, Math::tf32, kAnyWidth, {22, 22}, {18, 18}},
    {Path::cluster, Arch::sm_90, 1, Math::tensor_core, kAnyWidth, {22, 22}, {18, 18}},
    {Path::cluster, Arch::sm_90, 2, Math::fp32_fma, kAnyWidth, {12, 12}, {11, 11}},
    {Path::cluster, Arch::sm_90, 2, Math::tf32, kAnyWidth, {18, 18}, {18, 18}},
    {Path::cluster, Arch::sm_90, 2, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},
    {Path::cluster, Arch::sm_90, 3, Math::fp32_fma, kAnyWidth, {12, 12}, {11, 11}},
    {Path::cluster, Arch::sm_90, 3, Math::tf32, kAnyWidth, {18, 18}, {18, 18}},
    {Path::cluster, Arch::sm_90, 3, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},
    {Path::cluster, Arch::sm_90, 4, Math::fp32_fma, kAnyWidth, {10, 10}, {11, 11}},
    {Path::cluster, Arch::sm_90, 4, Math::tf32, kAnyWidth, {18, 18}, {18, 18}},
    {Path::cluster, Arch::sm_90, 4, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},

    {Path::persistent_grid, Arch::sm_90, 1, Math::fp32_fma, kAnyWidth, {17, 17}, {10, 10}},
    {Path::persistent_grid, Arch::sm_90, 1, Math::tf32, kAnyWidth, {18, 18}, {17, 17}},
    {Path::persistent_grid, Arch::sm_90, 1, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},
    {Path::persistent_grid, Arch::sm_90, 2, Math::fp32_fma, kAnyWidth, {10, 10}, {9, 9}},
    {Path::persistent_grid, Arch::sm_90, 2, Math::tf32, kAnyWidth, {18, 18}, {17, 17}},
    {Path::persistent_grid, Arch::sm_90, 2, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},
    {Path::persistent_grid, Arch::sm_90, 3, Math::fp32_fma, kAnyWidth, {10, 10}, {9, 9}},
    {Path::persistent_grid, Arch::sm_90, 3, Math::tf32, kAnyWidth, {18, 18}, {17, 17}},
    {Path::persistent_grid, Arch::sm_90, 3, Math::tensor_core, kAnyWidth, {18, 18}, {18, 18}},
    {Path::persistent_grid, Arch::sm_90, 4, Math::fp32_fma, kAnyWidth, {8, 8}, {8, 8}},
    {Path::persistent_grid, Arch::sm_90, 4, Math::tf32, kAnyWidth, {17, 17}, {16, 15}},
    {Path::persistent_grid, Arch::sm_90, 4, Math::tensor_core, kAnyWidth, {18, 17}, {17, 17}},
};

// Of a single CTA that takes one sequence and multiplies without tensor cores, which needs few registers for sums.
constexpr ResidentRow kResidentOfOne[] = {
    {Path::single_cta, Arch::sm_80, 2, Math::fp32_fma, 128, {8, 8}, {8, 8}},
    {Path::single_cta, Arch::sm_80, 3, Math::fp32_fma, 128, {8, 8}, {8, 8}},
    {Path::single_cta, Arch::sm_80, 4, Math::fp32_fma, 128, {5, 4}, {5, 5}},
};

// The row for a kernel of so many units; null: there is none.
template <int ROWS>
constexpr const ResidentRow* find_row(const ResidentRow (&rows)[ROWS], Path path, const Variant& v, int width) {
  const ResidentRow* best = nullptr;
  for (const ResidentRow& row : rows) {
    if (row.path != path || row.gates != gates_of(v.cell) || row.math != v.math || row.max_width < width) continue;
    if (row.arch <= v.arch && (!best || row.arch > best->arch)) best = &row;
  }
  return best;
}
constexpr const ResidentRow* resident_row(Path path, const Variant& v, int width) {
  return find_row(kResident, path, v, width);
}
constexpr int resident_in(const ResidentRow* row, const Variant& v) {
  if (!row) return 0;
  const auto& pass = v.backward ? row->backward : row->forward;
  return v.even ? pass.even : pass.odd;
}
constexpr int resident_of(Path path, const Variant& v, int width) {
  return resident_in(resident_row(path, v, width), v);
}
// Kernels are compiled for the architecture of their row, so that GPUs with the same row share a kernel.
constexpr Arch resident_arch(Path path, const Variant& v, int width) { return resident_row(path, v, width)->arch; }

// ---- single CTA: a CTA owns up to 8 sequences; its weights lie in registers, then shared memory, then the L2 cache

struct SingleCtaLayout {
  int width;     // hidden units that the kernel is made for
  int m_tiles;   // of 16 rows that a warp takes
  int threads;   // of a CTA
  int stride;    // of a row of factors
  int buffers;   // bytes of both buffers of factors, at the beginning of shared memory
  int biases;    // bytes of what is added to the gates, behind them; weights follow
  int groups;    // of fragments that a thread needs: one of each gate, for one k-block and one of its tiles of 16 rows
  int resident;  // of them in registers
  int group_bytes;  // of a group of all threads

  // Groups in shared memory, where a CTA may have so many bytes of it; the others are read from L2 in every step.
  constexpr int shared_groups(int shared_memory) const {
    const int others = groups - resident, fitting = (shared_memory - weights()) / group_bytes;
    return fitting < others ? fitting : others;
  }
  constexpr int weights() const { return buffers + biases; }
  constexpr int least_bytes() const { return weights() + group_bytes; }  // all groups pass through shared memory
  constexpr int bytes(int shared_memory) const {
    const int all = weights() + shared_groups(shared_memory) * group_bytes;
    return all < least_bytes() ? least_bytes() : all;
  }
  constexpr bool fits(int shared_memory) const { return width > 0 && least_bytes() <= shared_memory; }
  // Of the groups that are left.
  constexpr int first_packed(int shared_memory) const { return resident + shared_groups(shared_memory); }
  constexpr int64_t packed_bytes(int shared_memory) const {
    return int64_t{groups - first_packed(shared_memory)} * group_bytes;
  }
};

constexpr int kSingleCtaWidths[] = {32, 64, 96, 128, 192, 256};
constexpr int max_single_cta_width(Math math) { return math == Math::tensor_core ? 256 : 128; }

// Units of the narrowest kernel for a layer; 0: there is none. For odd numbers of units there are fewer kernels.
constexpr int single_cta_width(Math math, int64_t hidden) {
  for (const int width : kSingleCtaWidths) {
    const bool for_odd = width == 64 || width == 128 || width == 256;
    if (hidden <= width && width <= max_single_cta_width(math) && (for_odd || hidden % 2 == 0)) return width;
  }
  return 0;
}

// For a kernel of so many units, as single_cta_width() says.
constexpr SingleCtaLayout single_cta_layout(const Variant& v, int width) {
  SingleCtaLayout l{};
  if (width == 0) return l;
  const int gates = gates_of(v.cell);
  l.width = width;
  l.m_tiles = width > 128 ? 2 : 1;
  l.threads = width / kMmaRows / l.m_tiles * kWarpSize;
  l.stride = row_stride(v.backward ? gates * width : width, v.math);
  l.buffers = 2 * factor_buffer_bytes(l.stride, v.math);
  l.biases = v.backward ? 0 : shared_biases(v.cell, width, v.math);
  l.groups = width / k_block_width(v.math) * l.m_tiles;
  const int resident = resident_of(Path::single_cta, v, width);
  l.resident = resident < l.groups ? resident : l.groups;
  l.group_bytes = gates * l.threads * kFragmentBytes;
  return l;
}

// Tiles of one sequence have a kernel of their own where it has more of the weights in registers. Plans estimate their
// steps as of any tile: nobody has measured yet what this kernel gains.
constexpr SingleCtaLayout one_sequence_layout(const Variant& v, int width) {
  SingleCtaLayout l = single_cta_layout(v, width);
  const int resident = resident_in(find_row(kResidentOfOne, Path::single_cta, v, width), v);
  if (resident > l.resident) l.resident = resident < l.groups ? resident : l.groups;
  return l;
}
constexpr bool has_one_sequence(const Variant& v, int width) {
  return one_sequence_layout(v, width).resident > single_cta_layout(v, width).resident;
}

// Of layers with masks there are few kernels: for these, and for even numbers of units those for odd ones, with one
// group of fragments in registers, so that there is space for all else.
constexpr bool has_masked_single_cta(Cell cell, Scalar scalar) {
  return (cell == Cell::gru || cell == Cell::lstm) && (scalar == Scalar::float32 || scalar == Scalar::bfloat16);
}
constexpr int64_t as_odd(int64_t hidden) { return hidden - (hidden % 2 == 0); }
constexpr SingleCtaLayout masked_single_cta_layout(const Variant& v, int width) {
  SingleCtaLayout l = single_cta_layout(v, width);
  l.resident = 1;
  return l;
}

// Layers with layer norm, with masks or without, have as few, which multiply float32 exactly. Behind each buffer of
// factors lies what warps exchange for means of rows: two numbers for each warp and sequence.
constexpr bool has_norm_single_cta(Cell cell, Scalar scalar) {
  return has_masked_single_cta(cell, scalar) && scalar == Scalar::float32;
}
constexpr int kMeansBytes = 2 * (max_single_cta_width(Math::fp32_fma) / kMmaRows) * kMaxTile * 4;
constexpr SingleCtaLayout norm_single_cta_layout(const Variant& v, int width) {
  SingleCtaLayout l = masked_single_cta_layout(v, width);
  l.buffers += 2 * kMeansBytes;
  l.biases = 0;                                             // are in the gates already
  if (v.backward && gates_of(v.cell) == 4) l.resident = 0;  // an LSTM's step takes all registers
  return l;
}

constexpr SingleCtaLayout single_cta_layout(const Variant& v, int width, bool masked, bool layer_norm) {
  return layer_norm ? norm_single_cta_layout(v, width)
         : masked   ? masked_single_cta_layout(v, width)
                    : single_cta_layout(v, width);
}

// ---- cluster and persistent grid: a group of CTAs shares the hidden units of a layer, a slice for each

constexpr int kClusterUnits[] = {32, 48, 64};     // hidden units of a CTA of a cluster
constexpr int kMinCluster = 2, kMaxCluster = 16;  // CTAs of a cluster; st.async needs a peer
constexpr int kGridUnits = 16;                    // hidden units of a CTA of the grid
constexpr int kGridClusters[] = {4, 2};           // CTAs of a cluster of the grid

// How the hidden units of a layer are divided among CTAs.
struct SliceShape {
  Path path;
  int units;    // of a CTA
  int blocks;   // CTAs of a group
  int cluster;  // CTAs of a cluster
};
constexpr SliceShape cluster_shape(int64_t hidden, int units) {
  SliceShape shape{};
  shape.path = Path::cluster;
  shape.units = units;
  shape.blocks = shape.cluster = ceil_div(hidden, units);
  return shape;
}
constexpr SliceShape grid_shape(int64_t hidden, int cluster) {
  SliceShape shape{};
  shape.path = Path::persistent_grid;
  shape.units = kGridUnits;
  shape.cluster = cluster;
  shape.blocks = ceil_div(hidden, cluster * kGridUnits) * cluster;
  return shape;
}

constexpr int slice_warps(int units, bool backward) { return units == 48 && !backward ? 6 : 8; }
// Warps that own states: two units of one sequence a thread.
constexpr int owner_warps(int units) { return units / 2 * kMaxTile / kWarpSize; }

// Forward: warps that share the columns of 16 rows, each having a part of the k-blocks.
constexpr int forward_parts(int units) { return slice_warps(units, false) / (units / kMmaRows); }
// Their sums lie so far apart that 16 lanes store two each to different banks.
constexpr int kSumsGap = 4;
constexpr int sums_stride(int units) { return units + kSumsGap; }
constexpr int forward_sums(int gates, int units) {
  return forward_parts(units) * gates * kMaxTile * sums_stride(units) - kSumsGap;
}
// Where between them is space for biases, these lie there: for the largest layers every byte counts.
constexpr bool biases_in_gaps(Cell cell, int units, Math math) {
  const int gaps = forward_parts(units) * gates_of(cell) * kMaxTile - 1;
  return shared_biases(cell, units, math) <= gaps * kSumsGap * 4;
}

// Backward: a warp multiplies for 32 states at once, so that factors are read half as often.
constexpr int kBackwardRows = 2 * kMmaRows;
// A CTA of a cluster multiplies the gates' gradients of its own units, for the states of all units. On the grid a CTA
// multiplies those of all units of its cluster, two CTAs' at a time (a set), for its part of the states.
constexpr int backward_set_units(Path path, int units) { return path == Path::persistent_grid ? 2 * units : units; }
constexpr int backward_sets(const SliceShape& shape) {
  return shape.path == Path::persistent_grid ? shape.cluster / 2 : 1;
}
constexpr int backward_states(const SliceShape& shape, int64_t hidden) {
  return shape.path == Path::persistent_grid ? shape.blocks / shape.cluster * shape.units : static_cast<int>(hidden);
}
constexpr int backward_k_blocks(Path path, int gates, int units, Math math) {
  return ceil_div(gates * backward_set_units(path, units), k_block_width(math));
}
// On the grid all threads add up partial gradients. They are divided into reducers, sets of threads with one for each
// owner; the first reducer is the owners themselves.
constexpr int grid_reducers() { return slice_warps(kGridUnits, true) / owner_warps(kGridUnits); }
constexpr int grid_reducer_sums() { return (grid_reducers() - 1) * owner_warps(kGridUnits) * kWarpSize * 2; }

// Shared memory of a CTA, in bytes from its beginning: two mbarriers, two buffers of factors, what is exchanged
// (forward the sums of the parts, and biases; backward, for two exchanges, partial gradients, on the grid the reducers'
// sums), weights.
struct SliceLayout {
  int stride;                        // of a row of factors
  int factors, exchange, weights;    // where they begin
  int bytes;                         // of all parts
  int fragments, resident, threads;  // fragments that a thread needs at most, and has in registers at most

  constexpr int shared_weights() const { return bytes - weights; }
};

constexpr int kMbarrierBytes = 2 * 8;

constexpr SliceLayout slice_layout(const Variant& v, const SliceShape& shape, int64_t hidden) {
  const int gates = gates_of(v.cell), k_width = k_block_width(v.math), warps = slice_warps(shape.units, v.backward);
  SliceLayout l{};
  int width = 0, exchange = 0;  // factors of a sequence, bytes
  if (v.backward) {
    const int k_blocks = backward_k_blocks(shape.path, gates, shape.units, v.math), sets = backward_sets(shape);
    width = sets * k_blocks * k_width;
    exchange =
        2 * 4 * (shape.path == Path::persistent_grid ? grid_reducer_sums() : shape.blocks * kMaxTile * shape.units);
    l.fragments = ceil_div(ceil_div(backward_states(shape, hidden), kBackwardRows), warps) * sets * 2 * k_blocks;
  } else {
    width = ceil_div(shape.blocks * shape.units, k_width) * k_width;
    exchange = forward_sums(gates, shape.units) * 4;
    if (!biases_in_gaps(v.cell, shape.units, v.math)) exchange += shared_biases(v.cell, shape.units, v.math);
    l.fragments = ceil_div(ceil_div(hidden, k_width), forward_parts(shape.units)) * gates;
  }
  l.threads = warps * kWarpSize;
  l.resident = resident_of(shape.path, v, shape.units);
  l.stride = row_stride(width, v.math);
  l.factors = kMbarrierBytes;
  l.exchange = l.factors + 2 * factor_buffer_bytes(l.stride, v.math);
  l.weights = l.exchange + exchange;
  const int shared = l.fragments > l.resident ? l.fragments - l.resident : 0;
  l.bytes = l.weights + shared * l.threads * kFragmentBytes;
  return l;
}

// ---- persistent grid: groups of CTAs that run at the same time and take the tiles of sequences in waves, and what
// they need in the GPU's memory to exchange

struct GridGroups {
  int directions;  // that run at once
  int groups;      // of a direction
  int vectors;     // that an exchange of a group has
  int64_t bytes;   // of all exchanges; they begin as zeros
};

// What CTAs exchange are vectors of 16 bytes with three words and a tag. Forward a vector has what it can of the states
// that a CTA has of a sequence, backward the partial gradients of two units.
constexpr int kVectorBytes = 16, kVectorWords = 3;
constexpr int grid_words(Math math) { return kGridUnits * element_bytes(math) / 4; }  // of a CTA's states of a sequence
constexpr int grid_vectors(Math math) { return ceil_div(grid_words(math), kVectorWords); }

// Forward [sequence, CTA, vector], backward [cluster, sequence, two units].
constexpr int grid_exchange_vectors(const Variant& v, const SliceShape& shape, int tile) {
  return tile * shape.blocks * (v.backward ? shape.blocks / shape.cluster * shape.units / 2 : grid_vectors(v.math));
}

// How many groups run at the same time, on a GPU that runs so many clusters of the shape's size.
constexpr int grid_groups_at_once(const SliceShape& shape, int clusters) {
  return clusters * shape.cluster / shape.blocks;
}

// No groups: the GPU does not run as many CTAs at the same time as a group has.
constexpr GridGroups grid_groups(const Variant& v, const SliceShape& shape, int directions, int64_t sequences, int tile,
                                 int clusters) {
  GridGroups g{};
  const int at_once = grid_groups_at_once(shape, clusters);
  if (at_once == 0) return g;
  g.directions = at_once < directions ? 1 : directions;
  const int64_t tiles = (sequences + tile - 1) / tile, of_direction = at_once / g.directions;
  g.groups = static_cast<int>(tiles < of_direction ? tiles : of_direction);
  g.vectors = grid_exchange_vectors(v, shape, tile);
  g.bytes = int64_t{directions} * g.groups * 2 * g.vectors * kVectorBytes;
  return g;
}

}  // namespace seqkernels
