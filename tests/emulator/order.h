// Which accesses happen before which, by vector clocks. A thread's time advances with everything that others may wait
// for. It has a clock with a time of every other thread: what that thread did until then happens before all that it
// does itself from now on. Pushes are done by actors of their own, one for each mbarrier, whose times are its phases.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

namespace seqkernels::emulator {

// The latest time. It grows as long as the program runs, so that shadows of earlier blocks need not be cleared.
extern uint64_t latest;

struct Clock {
  std::vector<uint64_t> of;        // [actors]
  std::vector<uint64_t> of_block;  // the minimum over a block's threads
};
using Known = std::shared_ptr<const Clock>;

Known clock_of(std::vector<uint64_t> of);
int actors();

// By block, until when all that its threads did happens before: what passes by vectors with tags as well, which order
// nothing but vectors. Null: nothing.
using Seen = std::shared_ptr<const std::vector<uint64_t>>;
Seen joined(const Seen& one, const Seen& other);

// The clock that a barrier, a phase or a flag passes on: the maximum of the clocks of those that come to it.
class Gathering {
 public:
  // Adds the clock `known` (null: none), what the actor has done until a time, and what it has seen.
  void bring(const Known& known, int actor, uint64_t time, const Seen& seen = nullptr) {
    seen_ = joined(seen_, seen);
    of_.resize(actors());
    if (known && std::find(joined_.begin(), joined_.end(), known) == joined_.end()) {
      for (size_t i = 0; i < of_.size(); i++) of_[i] = std::max(of_[i], known->of[i]);
      joined_.push_back(known);
    }
    of_[actor] = std::max(of_[actor], time);
  }

  // Adds all that these actors have done: none of them continues before the gathering closes.
  void bring_all(int begin, int end) { std::fill(of_.begin() + begin, of_.begin() + end, latest); }

  void close() {
    closed_ = clock_of(std::move(of_));
    closed_seen_ = std::move(seen_), seen_ = nullptr;
    of_.clear(), joined_.clear(), passed_.clear();
  }

  // The clock `known` of an actor that comes after, joined with this one.
  const Known& pass(const Known& known) {
    if (!closed_) return known;
    for (const auto& [before, after] : passed_)
      if (before == known) return after;
    std::vector<uint64_t> of = closed_->of;
    for (size_t i = 0; i < of.size(); i++) of[i] = std::max(of[i], known->of[i]);
    passed_.emplace_back(known, of == closed_->of ? closed_ : clock_of(std::move(of)));
    return passed_.back().second;
  }

  const Seen& seen() const { return closed_seen_; }

 private:
  std::vector<uint64_t> of_;
  std::vector<Known> joined_;
  Known closed_;
  Seen seen_, closed_seen_;
  std::deque<std::pair<Known, Known>> passed_;
};

}  // namespace seqkernels::emulator
