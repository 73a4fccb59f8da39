#include "schedule.h"

#include <algorithm>
#include <numeric>

namespace seqkernels {

namespace {

// Sequences of a task at most: their state should stay in the second-level cache beside the weights.
constexpr int64_t kMostSequences = 64;
// Multiplications below which a second thread costs more than it brings: of a whole call, and of one step of a team,
// whose members meet after every step.
constexpr double kSmallCall = 2e5;
constexpr double kSmallStep = 5e4;
// Sequences of a task at least, where members need not share its units. More, where the weights do not fit into one
// core's second-level cache, so that half of them to a core is worth a meeting in every step.
constexpr int64_t kLeastSequences = 4;
constexpr int64_t kLeastSequencesOfLargeWeights = 32;
constexpr double kLargeWeights = 1 << 20;

}  // namespace

OwnSchedule::OwnSchedule(const Layer& p, int threads) {
  const int64_t B = p.sequences, D = p.directions;
  const double gates = static_cast<double>(gates_of(p.cell)) * p.hidden;
  const double bytes = gates * p.projected * (p.scalar == Scalar::float64 ? 8 : 4);
  const double per_row = gates * (p.projected + p.input) + (p.has_projection ? p.hidden * p.projected : 0);
  members = p.rows * D * per_row < kSmallCall ? 1 : threads;

  // Sequences in so many tiles that the tasks of all directions divide evenly among the members.
  const int64_t even = members / std::gcd<int64_t>(members, D);
  const int64_t needed = (B + kMostSequences - 1) / kMostSequences;
  const int64_t least = bytes > kLargeWeights ? kLeastSequencesOfLargeWeights : kLeastSequences;
  int64_t tiles = std::max<int64_t>(needed + even - 1, 1) / even * even;
  if (B / std::max<int64_t>(tiles, 1) < least) tiles = std::max<int64_t>(1, std::min(needed, tiles));
  tasks = D * tiles;

  // Fewer tasks than members: members share units, where a step is worth it.
  const int64_t spare = members % tasks == 0 ? members / tasks : members;
  const int64_t vectors = std::max<int64_t>(1, p.hidden * (p.scalar == Scalar::float64 ? 8 : 4) / 64);
  const double step = per_row * std::min(B, (B + tiles - 1) / tiles);
  team_size = static_cast<int>(tasks >= members || step < kSmallStep ? 1 : std::min(spare, vectors));
  teams = static_cast<int>(std::min<int64_t>(tasks, members / team_size));
  if (team_size > 1 && members % tasks) teams = 1;

  const bool ragged = p.steps && p.batch_sizes[p.steps - 1] < B;
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int direction = 0; direction < D; direction++) {
      const int64_t begin = B * tile / tiles, end = B * (tile + 1) / tiles;
      // Ragged sequences are sorted by length; dealt out like cards, they give every task the same mixture.
      if (ragged)
        tasks_.push_back({direction, tile, tiles, (B - tile + tiles - 1) / tiles});
      else
        tasks_.push_back({direction, begin, 1, end - begin});
    }
  most_sequences = 0;
  for (const Task& one : tasks_) most_sequences = std::max(most_sequences, one.count);
  barriers_.resize(1 + teams);
  task = tasks_.data();
  barriers = barriers_.data();
}

}  // namespace seqkernels
