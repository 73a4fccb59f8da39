// Who does what: the choice of tasks and teams for a layer.
#pragma once
#include <vector>

#include "kernels.h"

namespace seqkernels {

// A schedule and what it points to.
class OwnSchedule : public Schedule {
 public:
  OwnSchedule(const Layer& p, int threads);
  OwnSchedule(const OwnSchedule&) = delete;

 private:
  std::vector<Task> tasks_;
  std::vector<Barrier> barriers_;
};

// Of the members of an ensemble, how many run alone on a thread, side by side with others: all or none, or as many as
// there are threads for, time and again. The others have all threads, one after another.
int64_t members_alone(const Layer& p, int64_t members, int64_t layers, int threads);

}  // namespace seqkernels
