// Streams for the CPU: their work runs when they are joined, in a random order among those that what they wait for
// allows.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "run.h"

namespace seqkernels::emulator {

template <class Context>
class Streams {
 public:
  Streams(const Context& call, int64_t count) : call_(call), given_(count), done_(count), counts_(count) {}

  void wait(int64_t stream, int64_t other) {
    if (stream == other || goes_wrong_on_host(Fault::stream)) return;
    given_[stream].push_back({nullptr, other, counts_[other]});
  }

  template <class Work>
  void run(int64_t stream, const Work& work) {
    if (given_.size() == 1) return work(call_);
    given_[stream].push_back({[this, work] { work(call_); }, 0, 0});
    counts_[stream]++;
  }

  void join() {
    for (std::vector<int64_t> ready; find(ready), !ready.empty();) {
      const int64_t stream = ready[random_below(ready.size())];
      const Given next = std::move(given_[stream].front());
      given_[stream].pop_front();
      if (next.work) next.work(), done_[stream]++;
    }
  }

 private:
  struct Given {
    std::function<void()> work;  // or, if there is none, the wait for so much work of another stream
    int64_t other, count;
  };

  // The streams that can go on.
  void find(std::vector<int64_t>& ready) const {
    ready.clear();
    for (size_t i = 0; i < given_.size(); i++) {
      if (given_[i].empty()) continue;
      const Given& next = given_[i].front();
      if (next.work || done_[next.other] >= next.count) ready.push_back(i);
    }
  }

  const Context& call_;
  std::vector<std::deque<Given>> given_;
  std::vector<int64_t> done_, counts_;
};

}  // namespace seqkernels::emulator
