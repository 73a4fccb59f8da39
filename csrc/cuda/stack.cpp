#include "stack.h"

#include "streams.h"

namespace seqkernels {

namespace {

// ---- forward

// Where layer `l` writes its results.
void set_results(const CallContext& context, LayerForward& p, const CheckedArguments& arguments, int64_t l,
                 ForwardResults& results, Between& between, bool ragged) {
  const int64_t rows = results.y.size(0), D = p.directions, C = p.states;
  const SavedLayout layout(p, rows);
  void* saved = results.save ? pointer(results.saved) : nullptr;
  p.y = l == arguments.layers() - 1 ? pointer(results.y)
        : results.save              ? arguments.at(saved, layout.y_of(l))
                                    : between.of(context, l);
  p.saved = layout.blocks ? arguments.at(saved, layout.blocks_of(l)) : nullptr;
  p.h_n = arguments.at(pointer(results.h_n), l * D * C * p.projected);
  p.c_n = arguments.at(pointer(results.c_n), l * D * C * p.hidden);
  zero_rows(context, p, p.y, layout.y, rows, ragged);
  zero_rows(context, p, p.saved, layout.blocks, rows, ragged);
}

// The arguments of a sweep through one layer.
void set_layer(ForwardArgs& sweep, const LayerForward& p) {
  for (int d = 0; d < p.directions; d++) {
    const auto& w = p.weights[d];
    sweep.w_hh[d] = w.w_hh, sweep.b_ih[d] = w.b_ih, sweep.b_hh[d] = w.b_hh;
  }
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0;
  sweep.y = p.y, sweep.saved = p.saved;
  sweep.h_n = p.h_n, sweep.c_n = p.c_n;
}

// Leaves the layer and its sweep a chunk of the steps.
void take_chunk(const CallContext& context, const Chunk& chunk, const States& between, LayerForward& p,
                ForwardArgs& sweep) {
  if (chunk.all()) return;
  const auto at = [&](auto* data, int64_t width) { return data ? context.at(data, chunk.begin * width) : nullptr; };
  const int into = chunk.index % 2, from = 1 - into;
  p.x = at(p.x, p.input);
  sweep.y = at(sweep.y, p.hidden), sweep.saved = at(sweep.saved, p.saved_blocks * p.hidden);
  sweep.steps = chunk.steps, sweep.rows = chunk.rows;
  if (!chunk.first) sweep.h_0 = between.h[from], sweep.c_0 = between.c[from];
  if (!chunk.last) sweep.h_n = between.h[into], sweep.c_n = between.c[into];
}

struct LayerOfForward {
  LayerForward p;
  ForwardArgs sweep;
};

}  // namespace

void run_forward(const CallContext& context, LayerForward& p, const CheckedArguments& arguments, const Plan& plan,
                 bool tf32, const Optional& batch_sizes, const StepMasks& masks, ForwardResults& results) {
  const int64_t rows = results.y.size(0), L = arguments.layers();
  const bool ragged = batch_sizes.has_value();
  const Wavefront wavefront(plan, p, L, rows, ragged, masks.any());
  ForwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, masks, false);
  const Workspace<CallWorkspace<ForwardWorkspace>> memory(context, StepOffsets::bytes(p, batch_sizes),
                                                          wavefront.streams(), context, p, wavefront, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  SavedLayout(p, rows).each_gap(results.save ? L : 1, [&](int64_t begin, int64_t end) {
    Tensor gap = context.view(context.at(pointer(results.saved), begin), {end - begin});
    zero(gap);
  });
  Between between(context, results.save ? 1 : L, wavefront, p, rows);
  std::vector<LayerOfForward> layers(L, {p, sweep});
  Streams streams(context, wavefront.streams());
  wavefront.each(false, [&](const Wavefront::Task& task) {
    const int64_t l = task.layer;
    LayerOfForward& layer = layers[l];
    if (task.chunk.first) {
      if (l) arguments.set_layer(layer.p, l, layers[l - 1].p.y);
      set_results(context, layer.p, arguments, l, results, between, ragged);
      set_layer(layer.sweep, layer.p);
    }
    streams.wait(task.stream, task.after);
    streams.run(task.stream, [&, l, task](const CallContext& context) {
      const ForwardWorkspace& own = memory->streams[task.stream];
      auto [p, sweep] = layers[l];
      take_chunk(context, task.chunk, own.between, p, sweep);
      if (task.chunk.first) pack_weights(context, sweep, sweep.w_hh, launch, own.sweep);
      project_input(context, p, task.chunk.rows, own, sweep);
      if (masks.pieces || plan.path == Path::stepwise) {
        Tensor h_n = of_layer(context, results.h_n, L, l), c_n = of_layer(context, results.c_n, L, l);
        if (masks.pieces) {  // those without rows keep their states
          begin_as(context, h_n, p.h_0);
          begin_as(context, c_n, p.c_0);
        }
        if (plan.path == Path::stepwise) return stepwise_forward(context, p, steps, sweep, masks, h_n, c_n);
      }
      sweep_forward(context, launch, own.sweep, sweep, masks);
    });
  });
  streams.join();
}

// ---- backward

namespace {

// Rows that no step uses have no gradient.
SweepGradients begin_gradients(const CallContext& context, const Layer& p, int64_t rows, bool ragged,
                               const BackwardWorkspace& memory) {
  const int64_t D = p.directions, FH = stored_gradients_of(p.cell) * p.hidden;
  SweepGradients grads(context.view(memory.gates, {D, rows, FH}));
  if (p.has_projection) grads.projected = context.view(memory.projected, {D, rows, p.projected});
  if (ragged && !(p.batch_sizes && p.rows == rows)) {
    zero(grads.gates);
    if (grads.projected) zero(*grads.projected);
  }
  return grads;
}

// The arguments of a sweep back through one layer.
void set_layer(BackwardArgs& sweep, const LayerBackward& p, BackwardResults& results) {
  for (int d = 0; d < p.directions; d++) sweep.w_hh[d] = p.weights[d].w_hh;
  sweep.h_0 = p.h_0, sweep.c_0 = p.c_0, sweep.y = p.y, sweep.saved = p.saved;
  sweep.grad_y = p.grad_y, sweep.grad_h_n = p.grad_h_n, sweep.grad_c_n = p.grad_c_n;
  sweep.grad_h_0 = pointer(results.grad_h_0), sweep.grad_c_0 = pointer(results.grad_c_0);
}

// What chunks but the first one start from lies among what was saved, a row of it for each sequence.
void gather_c(const CallContext& context, const Wavefront& wavefront, const LayerBackward& p, void* result) {
  if (!result) return;
  const int64_t B = p.sequences, H = p.hidden, row = p.saved_blocks * H, chunk = wavefront.steps_of_chunk() * B * row;
  const Shape shape{wavefront.chunks() - 1, B, H};
  Tensor gathered = context.view(result, shape);
  copy(gathered, context.view(context.at(p.saved, chunk - B * row + row - H), shape, {chunk, row, 1}));
}

// Leaves the layer, its sweep and their gradients a chunk of the steps.
void take_chunk(const CallContext& context, const Chunk& chunk, const BackwardWorkspace& memory, LayerBackward& p,
                BackwardArgs& sweep, SweepGradients& grads, Tensor& grad_x) {
  if (chunk.all()) return;
  const int64_t H = p.hidden, FH = stored_gradients_of(p.cell) * H, state = p.sequences * H;
  const auto at = [&](auto* data, int64_t width) { return data ? context.at(data, chunk.begin * width) : nullptr; };
  const int into = chunk.index % 2, from = 1 - into;
  if (!chunk.first) {  // y of the step before is the h that the chunk starts from
    sweep.h_0 = context.at(p.y, chunk.begin * H - state);
    sweep.c_0 = memory.c ? context.at(memory.c, (chunk.index - 1) * state) : nullptr;
    sweep.grad_h_0 = memory.between.h[into], sweep.grad_c_0 = memory.between.c[into];
  }
  if (!chunk.last) sweep.grad_h_n = memory.between.h[from], sweep.grad_c_n = memory.between.c[from];
  sweep.y = at(sweep.y, H), sweep.saved = at(sweep.saved, p.saved_blocks * H), sweep.grad_y = at(sweep.grad_y, H);
  sweep.grad_gates = at(sweep.grad_gates, FH);
  sweep.steps = chunk.steps, sweep.rows = chunk.rows;
  p.rows = chunk.rows;
  grads.gates = context.view(sweep.grad_gates, {1, chunk.rows, FH});
  if (grad_x.numel()) grad_x = context.view(at(grad_x.mutable_data_ptr(), p.input), {chunk.rows, p.input});
}

struct LayerOfBackward {
  LayerBackward p;
  BackwardArgs sweep;
  std::optional<BackwardResults> results;  // once its turn has come
};

}  // namespace

void run_backward(const CallContext& context, LayerBackward& p, const CheckedArguments& arguments, const Plan& plan,
                  bool tf32, int64_t rows, const Optional& batch_sizes, const StepMasks& masks,
                  BackwardResults& results) {
  const int64_t L = arguments.layers();
  const Wavefront wavefront(plan, p, L, rows, batch_sizes.has_value(), masks.any());
  BackwardArgs sweep{};
  set_sweep(sweep, p, rows, tf32);
  const SweepLaunch launch(context, p, plan, sweep, masks, true);
  const Workspace<CallWorkspace<BackwardWorkspace>> memory(context, StepOffsets::bytes(p, batch_sizes),
                                                           wavefront.streams(), context, p, wavefront, rows,
                                                           results.wants_weights, launch);
  const StepOffsets steps(context, p, batch_sizes, memory->steps);
  sweep.starts = steps.starts(), sweep.sizes = steps.sizes();
  std::vector<SweepGradients> gradients;
  for (const BackwardWorkspace& own : memory->streams)
    gradients.push_back(begin_gradients(context, p, rows, batch_sizes.has_value(), own));
  Between between(context, L, wavefront, p, rows);
  std::vector<LayerOfBackward> layers(L, {p, sweep, {}});
  Streams streams(context, wavefront.streams());
  const auto take = [&](const Wavefront::Task& task) {
    const int64_t l = task.layer;
    LayerOfBackward& layer = layers[l];
    if (task.chunk.last) {
      arguments.set_layer_backward(layer.p, l);
      if (l < L - 1) layer.p.grad_y = layers[l + 1].results->grad_x.const_data_ptr();
      const Tensor grad_x = l ? context.view(between.of(context, l), {rows, layer.p.input}) : results.grad_x;
      layer.results.emplace(context, results, L, l, grad_x, l || results.wants_x);
      set_layer(layer.sweep, layer.p, *layer.results);
      layer.sweep.grad_gates = memory->streams[task.stream].gates;
    }
    streams.wait(task.stream, task.after);
    streams.run(task.stream, [&, l, task](const CallContext& context) {
      const BackwardWorkspace& own = memory->streams[task.stream];
      LayerBackward p = layers[l].p;
      BackwardArgs sweep = layers[l].sweep;
      BackwardResults& found = *layers[l].results;
      if (task.chunk.last) {
        if (masks.pieces) {
          begin_as(context, found.grad_h_0, p.grad_h_n);
          begin_as(context, found.grad_c_0, p.grad_c_n);
        }
        gather_c(context, wavefront, p, own.c);
        pack_weights(context, sweep, sweep.w_hh, launch, own.sweep);
      }
      SweepGradients grads = gradients[task.stream];
      Tensor grad_x = found.grad_x;
      take_chunk(context, task.chunk, own, p, sweep, grads, grad_x);
      if (plan.path != Path::stepwise)
        sweep_backward(context, launch, own.sweep, sweep, masks);
      else
        stepwise_backward(context, p, steps, sweep, masks, grads, found.grad_h_0, found.grad_c_0);
      if (found.wants_x) multiply_grad_x(context, p, grads, grad_x);
    });
  };
  wavefront.each(true, take, [&](int64_t l, int64_t stream) {
    if (!results.wants_weights) return;
    streams.run(stream, [&, l, stream](const CallContext& context) {
      LayerOfBackward& layer = layers[l];
      multiply_grad_weights(context, layer.p, layer.sweep, gradients[stream], memory->streams[stream], masks,
                            layer.results->grad_weights);
    });
  });
  streams.join();
}

}  // namespace seqkernels
