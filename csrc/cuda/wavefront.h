// The order in which layers take the steps of a call: one layer after the other, or, of a padded stack, as a wavefront
// (J. Appleyard et al., 2016): steps are cut into chunks, and a layer takes a chunk as soon as the layer before has, so
// that several layers run at the same time, each on a stream of its own.
#pragma once
#include <algorithm>

#include "../check.h"
#include "plan.h"

namespace seqkernels {

// Some of the steps, and their rows, where every step has all sequences.
struct Chunk {
  int64_t index;        // in the order of time
  int64_t begin, rows;  // the first row, and how many there are; of the only chunk all rows
  int64_t steps;
  bool first, last;  // in the order of time

  bool all() const { return first && last; }
};

class Wavefront {
 public:
  // What one layer does with one chunk, on one of the streams, once another one has done what it has been given so far.
  struct Task {
    int64_t layer;
    Chunk chunk;
    int64_t stream, after;  // after: stream where there is nothing to wait for
  };

  // `rows`: of x, ragged: of which steps may use fewer.
  Wavefront(const Plan& plan, const Layer& p, int64_t layers, int64_t rows, bool ragged, bool masked)
      : layers_(layers), steps_(p.steps), rows_(rows), sequences_(p.sequences) {
    if (plan.chunks == 1 || layers == 1) return;
    check(!ragged && !masked && p.directions == 1, "a wavefront is for padded layers of one direction, without masks");
    check(plan.path == Path::single_cta || plan.path == Path::cluster,
          "a wavefront is for layers that leave multiprocessors to others: single CTA and cluster");
    const int steps = ceil_div(steps_, static_cast<int>(std::min<int64_t>(plan.chunks, steps_)));
    steps_of_chunk_ = steps, chunks_ = ceil_div(steps_, steps);
    if (chunks_ > 1) streams_ = ceil_div(layers, ceil_div(layers, kMaxStreams));  // in groups of about the same size
  }

  int64_t streams() const { return streams_; }
  int64_t chunks() const { return chunks_; }
  // Of every chunk but the last, which may have fewer.
  int64_t steps_of_chunk() const { return steps_of_chunk_; }
  int64_t rows_of_chunk() const { return chunks_ == 1 ? rows_ : steps_of_chunk_ * sequences_; }

  // Calls with the tasks, in an order that gives each stream its work and has `after` given no more than what is to be
  // waited for: diagonal by diagonal of layers and chunks, the layer that is furthest first. Backward it is all
  // mirrored. And with finish(layer, stream), what nobody waits for, once the layer's last chunk has been given, and
  // the one that waits for it.
  template <class Visit>
  void each(bool backward, const Visit& visit) const {
    each(backward, visit, [](int64_t, int64_t) {});
  }
  template <class Visit, class Finish>
  void each(bool backward, const Visit& visit, const Finish& finish) const {
    for (int64_t first = 0; first < layers_; first += streams_) {
      const int64_t count = std::min(streams_, layers_ - first);
      for (int64_t diagonal = 0; diagonal < chunks_ + count; diagonal++) {
        for (int64_t i = std::min(diagonal, count - 1); i >= 0 && diagonal - i < chunks_; i--)
          visit(task(first + i, diagonal - i, backward));
        if (diagonal < chunks_) continue;
        const Task done = task(first + diagonal - chunks_, chunks_ - 1, backward);
        finish(done.layer, done.stream);
      }
    }
  }

 private:
  Task task(int64_t position, int64_t index, bool backward) const {
    Task task{};
    task.layer = backward ? layers_ - 1 - position : position;
    task.chunk = chunk(backward ? chunks_ - 1 - index : index);
    task.stream = position % streams_;
    task.after = position ? (position - 1) % streams_ : task.stream;
    return task;
  }

  Chunk chunk(int64_t index) const {
    Chunk chunk{};
    chunk.index = index;
    chunk.first = index == 0, chunk.last = index == chunks_ - 1;
    const int64_t step = index * steps_of_chunk_;
    chunk.steps = std::min(steps_of_chunk_, steps_ - step);
    chunk.begin = step * sequences_;
    chunk.rows = chunk.all() ? rows_ : chunk.steps * sequences_;
    return chunk;
  }

  int64_t layers_, steps_, rows_, sequences_;
  int64_t streams_ = 1, chunks_ = 1, steps_of_chunk_ = steps_;
};

}  // namespace seqkernels
