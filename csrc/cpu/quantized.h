// The forward sweep over time of a quantized layer: as that of forward.h, with weights of int8 that are packed already,
// and rows of x and h that are quantized where they are multiplied. Gates and states are float32.
#pragma once
#include "product_int8.h"
#include "vec_math.h"

namespace seqkernels::SEQKERNELS_ISA {

// The gates of a chunk have at most so many bytes, but a chunk has at least so many rows.
constexpr int64_t kInt8ChunkBytes = 256 << 10, kInt8ChunkRows = 48;

// The memory of one call.
struct QuantizedMemory {
  // Rows of int8 and their scales.
  struct Rows {
    uint8_t* data;
    float* scales;
    int64_t stride;
  };
  struct PerTask {
    float *h, *h_next;   // [count, ldp]
    float* c;            // [count, ldh]
    float* unprojected;  // [count, ldh]: h before its projection
    float* gates;        // [chunk, ldg]: W_ih x and bias
    // Of each member of the team, which quantizes for itself what all have computed.
    int64_t* rows;  // [members, chunk]: which rows of the layer a chunk has
    Rows states;    // [members, count]: h, or what is projected
  };

  const int64_t ldh, ldp, ldg, chunk;
  Rows x;  // [N]
  TaskArenas tasks;

  QuantizedMemory(const LayerForward& p, const Schedule& schedule, void* base)
      : ldh(panels_of(p.hidden) * kPanelUnits),
        ldp(panels_of(p.projected) * kPanelUnits),
        ldg(gates_of(p.cell) * ldh),
        chunk(chunk_rows(p, schedule)) {
    Arena arena{static_cast<char*>(base)};
    x = take_rows(arena, p.rows, p.input);
    tasks = TaskArenas(arena, [&](Arena& task) { take_task(p, schedule, task); });
  }

  int64_t bytes(const Schedule& schedule) const { return tasks.end(schedule.tasks); }

  PerTask task(const LayerForward& p, const Schedule& schedule, int64_t i) const {
    Arena arena = tasks.of(i);
    return take_task(p, schedule, arena);
  }

 private:
  static Rows take_rows(Arena& arena, int64_t count, int64_t n) {
    const int64_t stride = leading_bytes(n);
    uint8_t* data = arena.take<uint8_t>(count * stride);
    return {data, arena.take<float>(count), stride};
  }

  PerTask take_task(const LayerForward& p, const Schedule& schedule, Arena& arena) const {
    const int64_t count = schedule.max_sequences, members = schedule.team_size;
    PerTask task;
    task.h = arena.take<float>(count * ldp);
    task.h_next = arena.take<float>(count * ldp);
    task.c = arena.take<float>(p.c_0 ? count * ldh : 0);
    task.unprojected = arena.take<float>(p.has_projection ? count * ldh : 0);
    task.gates = arena.take<float>(chunk * ldg);
    task.rows = arena.take<int64_t>(members * chunk);
    task.states = take_rows(arena, members * count, max(p.projected, p.has_projection ? p.hidden : 0));
    return task;
  }

  int64_t chunk_rows(const LayerForward& p, const Schedule& schedule) const {
    const int64_t fitting = max(kInt8ChunkBytes / (ldg * static_cast<int64_t>(sizeof(float))), kInt8ChunkRows);
    return min(max(fitting, schedule.max_sequences), p.steps * schedule.max_sequences);
  }
};

template <Cell kCell, class F>
class QuantizedSweep {
  using Memory = QuantizedMemory;
  using V = Vec<float>;
  using Traits = CellTraits<kCell>;
  static constexpr int kLane = kLanes<float>;
  static constexpr int G = Traits::gates;
  static constexpr bool kHasC = Traits::states == 2;

 public:
  QuantizedSweep(const LayerForward& p, const Memory& memory, const Memory::PerTask& mine, const Schedule& schedule,
                 const Task& task, const WorkRange& work, Tiles* tiles)
      : p(p),
        at{p, task},
        memory(memory),
        mine(mine),
        work(work),
        tiles(tiles),
        w_ih{static_cast<const F*>(p.weights[task.direction].w_ih), p.input},
        w_hh{static_cast<const F*>(p.weights[task.direction].w_hh), p.projected},
        w_hr{static_cast<const F*>(p.weights[task.direction].w_hr), p.hidden},
        units(panels_in(panels_of(p.hidden))),
        outputs(panels_in(panels_of(p.projected))),
        rows(mine.rows + work.begin * memory.chunk),
        states{mine.states.data + work.begin * schedule.max_sequences * mine.states.stride,
               mine.states.scales + work.begin * schedule.max_sequences, mine.states.stride} {}

  void run() {
    change_states(-1, at.step(0));
    for (int64_t i = 0; i < p.steps;) {
      const auto [count, end] = at.list_rows(i, memory.chunk, rows);
      project_inputs(count);
      for (int64_t first = 0; i < end; first += at.running(at.step(i++))) run_step(at.step(i), first);
    }
  }

 private:
  Units panels_in(int64_t panels) const { return {work.first(panels), work.last(panels)}; }

  // Of a state of n numbers, what lies in this range's panels; lanes behind the last number are zeros.
  static Units lanes_of(Units panels) { return {panels.first * kPanelUnits, panels.last * kPanelUnits}; }

  // Between step t and the next: what ended leaves its states, what begins takes them.
  void change_states(int64_t t, int64_t next) const {
    const int64_t H = p.hidden, P = p.projected;
    const auto end = [](const float* from, float* to, int64_t n, Units lanes) {
      for (int64_t i = lanes.first; i < min(lanes.last, n); i += kLane) store(to + i, load(from + i), n - i);
    };
    const auto begin = [](const float* from, float* to, int64_t n, Units lanes) {
      for (int64_t i = lanes.first; i < lanes.last; i += kLane) store(to + i, i < n ? load(from + i, n - i) : V{});
    };
    at.change_states(
        t, next,
        [&](int64_t r, int64_t state) {
          end(mine.h + r * memory.ldp, at.at_state(static_cast<float*>(p.h_n), state, P), P, lanes_of(outputs));
          if (kHasC)
            end(mine.c + r * memory.ldh, at.at_state(static_cast<float*>(p.c_n), state, H), H, lanes_of(units));
        },
        [&](int64_t r, int64_t state) {
          begin(at.at_state(static_cast<const float*>(p.h_0), state, P), mine.h + r * memory.ldp, P, lanes_of(outputs));
          if (kHasC)
            begin(at.at_state(static_cast<const float*>(p.c_0), state, H), mine.c + r * memory.ldh, H, lanes_of(units));
        });
  }

  // gates = W_ih x + b_ih of the chunk's `count` rows: this range's panels, which it reads itself.
  void project_inputs(int64_t count) const {
    const auto row = [&](int64_t i) { return reinterpret_cast<const F*>(memory.x.data + rows[i] * memory.x.stride); };
    product_int8(
        w_ih, units.first, units.last, count, row, [&](int64_t i) { return memory.x.scales[rows[i]]; }, tiles,
        [gates = mine.gates, ldg = memory.ldg, ldh = memory.ldh](int64_t i, int64_t unit, const V* x) {
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) store(gates + i * ldg + g * ldh + unit, x[g]);
        });
  }

  // Waits until all of a state [running, n], its rows `stride` apart, is there, and quantizes it.
  void quantize_states(const float* state, int64_t stride, int64_t n, int64_t running) const {
    work.wait();
    for (int64_t r = 0; r < running; r++)
      states.scales[r] = quantize_row(state + r * stride, n, states.data + r * states.stride);
  }

  // The product of the states that quantize_states left with w.
  template <int kGroups, class Each>
  void multiply_states(const Int8Matrix<kGroups, F>& w, Units panels, int64_t running, const Each& each) const {
    const auto row = [&](int64_t r) { return reinterpret_cast<const F*>(states.data + r * states.stride); };
    product_int8(w, panels.first, panels.last, running, row, [&](int64_t r) { return states.scales[r]; }, tiles, each);
  }

  // One step; the gates of its first row are row `first` of the chunk.
  void run_step(int64_t t, int64_t first) {
    const int64_t running = at.running(t);
    const int64_t later = at.task.direction ? t - 1 : t + 1;
    row0 = at.row(t, 0);
    gates = mine.gates + first * memory.ldg;
    quantize_states(mine.h, memory.ldp, p.projected, running);
    multiply_states(w_hh, units, running, [&](int64_t r, int64_t unit, const V* x) { finish(r, unit, x); });
    if constexpr (Traits::can_project) {
      if (p.has_projection) {
        quantize_states(mine.unprojected, memory.ldh, p.hidden, running);
        multiply_states(w_hr, outputs, running, [&](int64_t r, int64_t unit, const V* x) { put_h(r, unit, *x); });
      }
    }
    swap(mine.h, mine.h_next);
    change_states(t, later);
  }

  // The new states of one vector of units of sequence r, from the gates' W_hh h + b_hh.
  SEQKERNELS_INLINE void finish(int64_t r, int64_t unit, const V* recurrent) const {
    V x[G], unused[kMaxBlocks], h{}, c{};
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) x[g] = load(gates + r * memory.ldg + g * memory.ldh + unit);
    float* const c_of = mine.c + r * memory.ldh + unit;
    if constexpr (Traits::needs_h_prev) h = load(mine.h + r * memory.ldp + unit);
    if constexpr (kHasC) c = load(c_of);
    cell_forward<kCell>(x, recurrent, h, c, unused);
    if constexpr (kHasC) {
      store(c_of, c);
      if (p.saved && unit < p.hidden)
        store(at.at_row(static_cast<float*>(p.saved), row0 + r * at.task.stride, p.hidden) + unit, c, p.hidden - unit);
    }
    if (Traits::can_project && p.has_projection)
      store(mine.unprojected + r * memory.ldh + unit, h);
    else
      put_h(r, unit, h);
  }

  SEQKERNELS_INLINE void put_h(int64_t r, int64_t unit, V h) const {
    const int64_t P = p.projected;
    store(mine.h_next + r * memory.ldp + unit, h);
    if (unit < P) store(at.at_row(static_cast<float*>(p.y), row0 + r * at.task.stride, P) + unit, h, P - unit);
  }

  const LayerForward& p;
  const Layout at;
  const Memory& memory;
  Memory::PerTask mine;
  const WorkRange work;
  Tiles* const tiles;  // null where products are not by tiles
  const Int8Matrix<G, F> w_ih, w_hh;
  const Int8Matrix<1, F> w_hr;
  const Units units, outputs;  // this range's panels, of H and of P
  int64_t* const rows;         // of the chunk
  const Memory::Rows states;   // this range's
  // Of the step that runs.
  const float* gates;
  int64_t row0;
};

template <Cell kCell, class F>
void quantized_forward(const LayerForward& p, const Schedule& schedule, int begin, int end, void* base) {
  const QuantizedMemory memory(p, schedule, base);
  const WorkRange all = whole_range(schedule, begin, end);
  for (int64_t row = all.first(p.rows); row < all.last(p.rows); row++)
    memory.x.scales[row] =
        quantize_row(static_cast<const float*>(p.x) + row * p.input, p.input, memory.x.data + row * memory.x.stride);
  all.wait();
  Tiles tiles;
  const bool by_tiles = kInTiles<F> && p.int8_tiles;
  run_tasks(schedule, begin, end, [&](int64_t i, const WorkRange& work) {
    const auto& mine = memory.task(p, schedule, i);
    QuantizedSweep<kCell, F>(p, memory, mine, schedule, schedule.task[i], work, by_tiles ? &tiles : nullptr).run();
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
