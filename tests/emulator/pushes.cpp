// Pushes to other CTAs, which arrive at some later time, and the phases of mbarriers that count them.
#include <algorithm>

#include "state.h"

namespace seqkernels::emulator {

Phases& phases_of(Block& block, int byte, const char* does) {
  const auto found = block.mbarriers.find(byte);
  if (found == block.mbarriers.end() || !is_ordered(found->second.init, group_begin))
    fail(std::string("no mbarrier: ") + name(now) + does + "byte " + std::to_string(byte) + " of " + name(block) +
         ", which was not initialised before");
  return found->second;
}

void end_phase(Phases& phases, const Block& block) {
  if (!phases.expected) return;
  if (phases.bytes < 0)
    fail("overrun: " + name(phases, block) + " has got " + std::to_string(-phases.bytes) +
         " bytes more than were expected of phase " + std::to_string(phases.ended));
  if (phases.bytes > 0) return;
  phases.gathering.bring(nullptr, phases.actor, phases.time);
  phases.gathering.close();
  phases.ended++;
  phases.expected = false;
  phases.time = ++latest;
  wake(phases.waiting);
}

void arrive(Push push) {
  std::copy(push.words.begin(), push.words.end(), push.to->memory.get() + push.at);
  for (int half = push.at / 2; half < (push.at + 16) / 2; half++)
    push.to->shadows[half].write = push.phases->time << kActorBits | push.phases->actor;
  push.phases->gathering.bring(push.known, push.actor, push.time, push.seen);
  push.phases->bytes -= 16;
  push.phases->under_way--;
  push.phases->last = push.phases->time;
  end_phase(*push.phases, *push.to);
}

void end_block(const Block& block) {
  for (const auto& [byte, phases] : block.mbarriers) {
    uint64_t known = 0;
    for (int thread = 0; thread < threads; thread++)
      known = std::max(known, fibers[block.rank * threads + thread].known->of[phases.actor]);
    if (phases.under_way || phases.last > known)
      fail("exit: " + name(block) + " ended without waiting for all that was pushed to it and counted by " +
           name(phases, block));
  }
}

void push(int begin, int64_t size, int64_t offset, const void* words, int peer, int mbarrier) {
  if (goes_wrong(Fault::push)) return;
  if (cluster_blocks == 1) fail("no cluster: " + name(now) + " pushed, whose block has no peers");
  if (peer < 0 || peer >= cluster_blocks)
    fail("out of bounds: " + name(now) + " pushed to block " + std::to_string(peer) + " of " +
         std::to_string(cluster_blocks));
  counted.pushes++;
  Block& to = peer_of(*mine->block, peer);
  const int at = at_in(to, begin, size, offset, 16, " pushed ");
  if (to.finished == threads) fail("exit: " + name(now) + " pushed to " + name(to) + ", which has ended");
  Phases& phases = phases_of(to, mbarrier, " pushed with ");
  for (int half = at / 2; half < (at + 16) / 2; half++) {
    Shadow& shadow = to.shadows[half];
    check_race(shadow, Access::write, group_begin, [&] { return place_in(to, half * 2); });
    shadow.write = kUnderWay << kActorBits | phases.actor;
  }
  phases.under_way++;
  pushes.push_back({&to, &phases, at, {}, mine->known, mine->seen, mine->index, mine->time});
  std::memcpy(pushes.back().words.data(), words, 16);
  set_time(++latest);
}

}  // namespace seqkernels::emulator
