#include "schedule.h"

#include <algorithm>
#include <numeric>

namespace seqkernels {

namespace {

// The states of a task's sequences should stay in the second-level cache beside the weights.
constexpr int64_t kMaxSequences = 64;
// Below so many multiplications a second thread costs more than it brings: of a whole call, and of one step of a team,
// whose members wait for each other after every step.
constexpr double kSmallCall = 1e6;
constexpr double kSmallStep = 5e4;
// With fewer sequences in a task it is better that members divide its units. Large weights do not fit into one core's
// second-level cache, so that half of them for each core is worth a barrier in every step.
constexpr int64_t kMinSequences = 4;
constexpr int64_t kMinSequencesOfLargeWeights = 32;
constexpr double kWeightsOfOneCore = 1 << 20;  // bytes

// Multiplications of a row of one direction.
double work_per_row(const Layer& p) {
  const double gates = static_cast<double>(gates_of(p.cell)) * p.hidden;
  return gates * (p.projected + p.input) + (p.has_projection ? p.hidden * p.projected : 0);
}

}  // namespace

OwnSchedule::OwnSchedule(const Layer& p, int threads) {
  const int64_t B = p.sequences, D = p.directions;
  const double bytes = 1.0 * gates_of(p.cell) * p.hidden * p.projected * (p.scalar == Scalar::float64 ? 8 : 4);
  const double per_row = work_per_row(p);
  members = p.rows * D * per_row < kSmallCall ? 1 : threads;

  // So many tasks of each direction that all divide evenly among the members.
  const int64_t even = members / std::gcd<int64_t>(members, D);
  const int64_t needed = (B + kMaxSequences - 1) / kMaxSequences;
  const int64_t min_sequences = bytes > kWeightsOfOneCore ? kMinSequencesOfLargeWeights : kMinSequences;
  int64_t per_direction = std::max<int64_t>(needed + even - 1, 1) / even * even;
  if (B / std::max<int64_t>(per_direction, 1) < min_sequences)
    per_direction = std::max<int64_t>(1, std::min(needed, per_direction));
  tasks = D * per_direction;

  // Fewer tasks than members: members divide the units of a task, where a step is worth it.
  const int64_t spare = members % tasks == 0 ? members / tasks : members;
  const int64_t vectors = std::max<int64_t>(1, p.hidden * (p.scalar == Scalar::float64 ? 8 : 4) / 64);
  const double step = per_row * std::min(B, (B + per_direction - 1) / per_direction);
  team_size = static_cast<int>(tasks >= members || step < kSmallStep ? 1 : std::min(spare, vectors));
  teams = static_cast<int>(std::min<int64_t>(tasks, members / team_size));
  if (team_size > 1 && members % tasks) teams = 1;

  const bool ragged = p.steps && p.batch_sizes[p.steps - 1] < B;
  for (int64_t i = 0; i < per_direction; i++)
    for (int direction = 0; direction < D; direction++) {
      const int64_t begin = B * i / per_direction, end = B * (i + 1) / per_direction;
      // Ragged sequences are sorted by length. Interleaved, every task has the same mixture of them.
      Task one;
      one.direction = direction;
      one.first = ragged ? i : begin;
      one.stride = ragged ? per_direction : 1;
      one.count = ragged ? (B - i + per_direction - 1) / per_direction : end - begin;
      tasks_.push_back(one);
    }
  max_sequences = 0;
  for (const Task& one : tasks_) max_sequences = std::max(max_sequences, one.count);
  barriers_.resize(1 + teams);
  task = tasks_.data();
  barriers = barriers_.data();
}

int64_t members_alone(const Layer& p, int64_t members, int64_t layers, int threads) {
  if (members == 1 || threads == 1 || p.rows * p.directions * work_per_row(p) * layers * members < kSmallCall) return 0;
  // A thread for each member pays where so at least as many of them work as would for one member.
  const OwnSchedule together(p, threads);
  const int64_t working = together.teams * together.team_size, left = members % threads;
  return left >= working ? members : members - left;
}

}  // namespace seqkernels
