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

}  // namespace seqkernels
