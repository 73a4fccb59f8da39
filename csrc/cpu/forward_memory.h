// What the forward pass of a layer works in: packed weights and biases, and each task's states and gates.
#pragma once
#include "layout.h"

namespace seqkernels::SEQKERNELS_ISA {

// The gates of a chunk have at most so many bytes, but a chunk has at least so many rows: enough to use each panel of
// W_ih often.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kChunkRows = 48;
// Weights of more bytes come from beyond the second-level cache whenever a chunk uses them: let it be seldom.
constexpr int64_t kLargeWeights = 1 << 20;
constexpr int64_t kChunkBytesOfLargeWeights = 2 << 20;
// Packing costs as much as multiplying some ten rows, so that it pays only where the packed weights are used again.
enum class WeightsUsed {
  by_rows,    // of at most kFewRows rows: where they lie, one row after the other
  by_turned,  // in few steps of few rows, not by tiles: where they lie, all rows of a step at once (turn_rows)
  packed,
};

// They may be multiplied in an order of their own.
inline bool has_few_rows(const Layer& p) { return p.rows <= kFewRows && !p.as_among_others; }

// Whether factors of float32 become bfloat16, for tiles. Few rows wait for the weights, not for products.
inline bool splits_for_tiles(const Layer& p) {
  return p.bfloat16_parts && p.bfloat16_tiles && p.scalar == Scalar::float32 && !has_few_rows(p);
}

// sequences: of a task.
template <class F>
WeightsUsed weights_used(const LayerForward& p, int64_t sequences, bool by_tiles) {
  if (has_few_rows(p)) return WeightsUsed::by_rows;
  const int64_t lanes = vectors_of<Sum<F>>(sequences) * kLanes<Sum<F>>;
  return !by_tiles && p.steps * lanes <= kRowsOnce ? WeightsUsed::by_turned : WeightsUsed::packed;
}

// Panels that stay between calls, with a copy of the weights that they were packed from.
template <class S>
struct KeptPanels {
  S* source;        // [groups * units, n]; null where the panels do not stay
  int64_t* packed;  // how often each was

  // Packs panel j of weights `from`, unless it is what they would become. It is packed from the copy, as others may
  // change the weights meanwhile.
  template <class F>
  void renew(const Panels<F>& shape, int64_t j, const S* from, int64_t n, F* to) const {
    if (!source || !n) return pack_transposed(shape, j, from, n, to);
    const int64_t first = j * shape.width * shape.V, last = min(first + shape.width * shape.V, shape.units);
    const size_t bytes = (last - first) * n * sizeof(S);
    const auto at = [&](int64_t group) { return (group * shape.units + first) * n; };
    bool same = packed[j];
    for (int64_t group = 0; same && group < shape.groups; group++)
      same = !memcmp(source + at(group), from + at(group), bytes);
    if (same) return;
    for (int64_t group = 0; group < shape.groups; group++) memcpy(source + at(group), from + at(group), bytes);
    pack_transposed(shape, j, source, n, to);
    packed[j]++;
  }
};

// The packed weights of a layer. S is the type of the layer's numbers, F what products take of them: the type of
// computation, or pairs of bfloat16 as they are.
template <class S, class F>
struct PackedWeights {
  static constexpr bool kSplits = std::is_same<S, float>::value && !std::is_same<F, float>::value;
  // Packing shows in the time of calls of no more rows, and of no fewer bytes; comparing takes half of its time.
  static constexpr int64_t kKeptRows = 256, kKeptRowsByTiles = 2048, kKeptBytes = 128 << 10;
  struct PerDirection {
    F *w_ih, *w_hh, *w_hr;
    KeptPanels<S> kept_ih, kept_hh, kept_hr;
  };

  const bool by_tiles;  // products are
  const int parts;      // of a number, as which it is multiplied
  const Panels<F> ih, hh, hr;

  explicit PackedWeights(const LayerForward& p)
      : by_tiles(p.bfloat16_tiles && std::is_same<F, bfloat16x2>::value),
        parts(kSplits && by_tiles ? p.bfloat16_parts : 1),
        ih(factors_of<F>(p.input), gates_of(p.cell) * p.hidden, 1, by_tiles, parts),
        hh(factors_of<F>(p.projected), p.hidden, gates_of(p.cell), by_tiles, parts),
        hr(factors_of<F>(p.hidden), p.has_projection ? p.projected : 0, 1, by_tiles, parts) {}

  int64_t panels() const { return ih.count() + hh.count() + hr.count(); }  // of a direction

  // Those of a direction; where they stay between calls, `packed` [panels] counts.
  PerDirection take(const LayerForward& p, Arena& arena, bool stay, int64_t* packed) const {
    PerDirection of{};
    of.w_ih = arena.take<F>(ih.size());
    of.w_hh = arena.take<F>(hh.size());
    of.w_hr = arena.take<F>(hr.size());
    if (stay) {
      of.kept_ih = {arena.take<S>(ih.units * p.input), packed};
      of.kept_hh = {arena.take<S>(hh.groups * hh.units * p.projected), packed + ih.count()};
      of.kept_hr = {arena.take<S>(hr.units * p.hidden), packed + ih.count() + hh.count()};
    }
    return of;
  }

  PackedLayout layout(const LayerForward& p) const {
    const int64_t of_task = min(p.sequences, kRowsOnce);  // at most
    const bool hardly = weights_used<F>(p, of_task, by_tiles) != WeightsUsed::packed;
    if (hardly || p.rows > (by_tiles ? kKeptRowsByTiles : kKeptRows)) return {};
    int64_t none = 0;
    Arena arena{nullptr};
    arena.take<int64_t>(p.directions * panels());
    for (int d = 0; d < p.directions; d++) take(p, arena, true, &none);
    if (arena.used < kKeptBytes) return {};
    return {.bytes = arena.used,
            .panels = p.directions * panels(),
            .facts = {kLanes<Sum<F>>, static_cast<int64_t>(p.scalar), kPerFactor<F>, by_tiles, parts, p.directions,
                      gates_of(p.cell), p.hidden, p.input, p.has_projection ? p.projected : 0}};
  }
};

// The memory of one forward call.
template <class S, class F>
struct ForwardMemory : PackedWeights<S, F> {
  using C = acc_t<S>;
  using Weights = PackedWeights<S, F>;
  using Weights::by_tiles, Weights::parts, Weights::ih, Weights::hh, Weights::hr, Weights::kSplits;
  struct PerDirection : Weights::PerDirection {
    C* bias;        // [G*H]: all biases but those of b_hh that stay apart
    C* bias_apart;  // [A*H]: those, of the last A gates (CellTraits::apart)
  };
  struct PerTask {
    C *h, *h_next;              // [count, ldp]
    F *factors, *factors_next;  // [count, ldf]: h for products: the same memory where the numbers are the same
    C* c;                       // [count, ldh]
    F* unprojected;             // [count, ldu]: h before its projection
    C* gates;                   // [chunk, ldg]: W_ih x and bias
    int64_t* rows;              // [members of the team, chunk]: which rows of the layer they are
    F* turned;                  // [members of the team, turned_size]: rows, then weights that had to be converted
  };

  const WeightsUsed used;
  const int64_t ldh, ldp, ldg;
  const int64_t ldi, ldf, ldu;  // of rows of factors: x, h, and h before its projection
  const int64_t chunk, turned_rows, turned_size;
  PerDirection direction[2] = {};
  F* x;  // [N, ldi] where the user's x cannot be taken as it is, else null
  TaskArenas tasks;

  ForwardMemory(const LayerForward& p, const Schedule& schedule, void* base)
      : Weights(p),
        used(weights_used<F>(p, schedule.max_sequences, by_tiles)),
        ldh(leading<C>(p.hidden)),
        ldp(leading<C>(p.projected)),
        ldg(leading<C>(ih.units)),
        ldi(parts == 1 ? leading<C>(p.input) : leading<C>(parts * ih.depth)),
        ldf(parts == 1 ? ldp : leading<C>(parts * hh.depth)),
        ldu(parts == 1 ? ldh : leading<C>(parts * hr.depth)),
        chunk(chunk_rows(p, schedule)),
        turned_rows(max(ih.k, max(hh.k, hr.k)) * kRowsOnce),
        turned_size(used == WeightsUsed::by_turned ? turned_rows + turned_rows / kRowsOnce * kLanes<C> : 0) {
    Arena arena{static_cast<char*>(base)}, kept{static_cast<char*>(p.kept)};
    int64_t* const packed = kept.take<int64_t>(p.directions * this->panels());
    for (int d = 0; d < p.directions; d++) {
      typename Weights::PerDirection& weights = direction[d];
      if (used == WeightsUsed::packed)
        weights = this->take(p, p.kept ? kept : arena, p.kept, packed + d * this->panels());
      direction[d].bias = arena.take<C>(ldg);
      direction[d].bias_apart = arena.take<C>(leading<C>(apart_of(p.cell) * p.hidden));
    }
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % sizeof(F) == 0 && p.input % kPerFactor<F> == 0;
    const bool as_it_is = sizeof(S) * kPerFactor<F> == sizeof(F) && aligned;
    x = as_it_is ? nullptr : arena.take<F>(p.rows * ldi);
    tasks = TaskArenas(arena, [&](Arena& task) { take_task(p, schedule, task); });
  }

  // Of rows that are multiplied with panels of that shape. That bfloat16 has one part is known when it is compiled.
  Parts parts_of(const Panels<F>& shape) const { return {kSplits ? parts : 1, shape.depth}; }
  Depth depth_of(const Panels<F>& shape, Tiles* tiles) const { return Depth::of(shape.k, tiles, parts_of(shape)); }
  int64_t bytes(const Schedule& schedule) const { return tasks.end(schedule.tasks); }

  PerTask task(const LayerForward& p, const Schedule& schedule, int64_t i) const {
    Arena arena = tasks.of(i);
    return take_task(p, schedule, arena);
  }

 private:
  PerTask take_task(const LayerForward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.max_sequences;
    PerTask task;
    task.h = arena.take<C>(count * ldp);
    task.h_next = arena.take<C>(count * ldp);
    const bool same = std::is_same<C, F>::value && !p.recurrent;
    task.factors = same ? reinterpret_cast<F*>(task.h) : arena.take<F>(count * ldf);
    task.factors_next = same ? reinterpret_cast<F*>(task.h_next) : arena.take<F>(count * ldf);
    task.c = arena.take<C>(p.c_0 ? count * ldh : 0);
    task.unprojected = arena.take<F>(p.has_projection ? count * ldu : 0);
    task.gates = arena.take<C>(chunk * ldg);
    task.rows = arena.take<int64_t>(schedule.team_size * chunk);
    task.turned = arena.take<F>(schedule.team_size * turned_size);
    return task;
  }

  int64_t chunk_rows(const LayerForward& p, const Schedule& schedule) const {
    const bool large = by_tiles && (ih.size() + hh.size()) * static_cast<int64_t>(sizeof(F)) > kLargeWeights;
    const int64_t fitting = (large ? kChunkBytesOfLargeWeights : kChunkBytes) / (ldg * static_cast<int64_t>(sizeof(C)));
    const int64_t all = p.steps * schedule.max_sequences;
    return min(max(max(fitting, kChunkRows), schedule.max_sequences), all);
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
