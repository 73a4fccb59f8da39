// What went wrong, in words.
#include <algorithm>
#include <iterator>

#include "state.h"

namespace seqkernels::emulator {

std::string block_name(int64_t x, int y) { return "block (" + std::to_string(x) + ", " + std::to_string(y) + ")"; }
std::string name(const Block& block) { return block_name(block.x, block.y); }
std::string name(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.place.thread) + " of " + name(*fiber.block);
}
std::string name(const Phases& phases, const Block& block) {
  return "the mbarrier at byte " + std::to_string(phases.byte) + " of " + name(block);
}

std::string name(Stamp access) {
  const auto& group = std::prev(begun.upper_bound(access >> kActorBits))->second;
  const auto block = [&](int rank) {
    return block_name(group.x + rank % group.width, static_cast<int>(group.y + rank / group.width));
  };
  int actor = static_cast<int>(access & kActors);
  if (Stamp(actor) == kSeveralBlocks) return "threads of several blocks";
  if (Stamp(actor) >= kBlock) return "several threads of " + block(actor - int(kBlock));
  if (actor < blocks * threads) return "thread " + std::to_string(actor % threads) + " of " + block(actor / threads);
  return "a push to " + block((actor - blocks * threads) / kMaxMbarriers);
}

void describe_deadlock() {
  failure = (blocks == 1 ? "deadlock in " : "deadlock around ") + name(running[0]) + ":";
  const char* separator = " ";
  for (const auto& [state, does] :
       {std::pair(State::finished, "finished"), std::pair(State::in_barrier, "in a barrier"),
        std::pair(State::in_cluster, "in a barrier of the cluster"), std::pair(State::in_phase, "waiting for pushes"),
        std::pair(State::in_tag, "waiting for a tag"), std::pair(State::in_warp, "in a warp's operation")}) {
    const auto is = [state = state](const Fiber& fiber) { return fiber.state == state; };
    const auto end = fibers.begin() + blocks * threads;
    const auto count = std::count_if(fibers.begin(), end, is);
    if (count == 0) continue;
    failure += separator + std::to_string(count) + " threads " + does + " (" +
               name(*std::find_if(fibers.begin(), end, is)) + ")";
    separator = ", ";
  }
  for (const Block& block : running)
    for (const auto& [byte, phases] : block.mbarriers)
      if (block.rank < blocks && !phases.waiting.empty()) {
        failure += "; " + name(phases, block) + ", in phase " + std::to_string(phases.ended) +
                   (phases.expected ? ", awaits " + std::to_string(phases.bytes) + " bytes" : ", expects nothing");
        return;
      }
}

}  // namespace seqkernels::emulator
