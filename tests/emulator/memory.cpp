// Checks of every access to memory: its bounds, and that it is ordered with the other accesses (else a race).
#include <algorithm>

#include "state.h"

namespace seqkernels::emulator {

std::unordered_map<uintptr_t, std::array<Shadow, kPage / 2>> global_shadows;
std::unordered_map<const Shadow*, std::map<int, Stamp>> readers;

Shadow& shadow_of(const void* global) {
  const auto at = reinterpret_cast<uintptr_t>(global);
  return global_shadows[at / kPage][at % kPage / 2];
}

uint64_t time_known_of(Stamp thread) { return thread == Stamp(mine->index) ? mine->time : mine->known->of[thread]; }

bool is_ordered(Stamp access, uint64_t since) {
  const uint64_t time = access >> kActorBits, actor = access & kActors;
  if (time < since || actor == Stamp(mine->index)) return true;
  if (time < group_begin) return false;
  return time <= (actor < kBlock ? mine->known->of[actor] : mine->known->of_block[actor - kBlock]);
}

bool is_read_ordered(const Shadow& shadow, uint64_t since) {
  if ((shadow.read & kActors) != kSeveralBlocks) return is_ordered(shadow.read, since);
  const auto& all = readers[&shadow];
  return std::all_of(all.begin(), all.end(), [&](const auto& read) { return is_ordered(read.second, since); });
}

void add_read(Shadow& shadow) {
  const auto merged = [](Stamp one, int block) {
    return std::max(one, now) >> kActorBits << kActorBits | (kBlock + block);
  };
  const int block = mine->block->rank;
  const auto block_of = [](Stamp read) {
    const Stamp actor = read & kActors;
    return int(actor < kBlock ? actor / threads : actor - kBlock);
  };
  if ((shadow.read & kActors) != kSeveralBlocks) {
    if (block_of(shadow.read) == block) {
      shadow.read = merged(shadow.read, block);
      return;
    }
    readers[&shadow] = {{block_of(shadow.read), shadow.read}};
    shadow.read = now | kSeveralBlocks;
  }
  Stamp& read = readers[&shadow][block];
  read = read == 0 || is_ordered(read, group_begin) ? now : merged(read, block);
}

int at_in(const Block& block, int begin, int64_t size, int64_t offset, int bytes, const char* does) {
  const int64_t at = begin + offset;
  const bool inside = offset >= 0 && offset + bytes <= size && at >= 0 && at + bytes <= shared_bytes;
  if (!inside || at % bytes)
    fail((inside ? "misaligned: " : "out of bounds: ") + name(now) + does + std::to_string(bytes) +
         " bytes from byte " + std::to_string(at) + " of the shared memory of " + name(block) +
         " on, in an array from byte " + std::to_string(begin) + " to " + std::to_string(begin + size));
  return static_cast<int>(at);
}

std::string place_in(const Block& block, int byte) {
  return "byte " + std::to_string(byte) + " of the shared memory of " + name(block);
}

void check_global(const void* data, int64_t count, int element_bytes, int64_t i, Access access) {
  const auto place = [&] {
    return "element " + std::to_string(i) + " of an array of " + std::to_string(data ? count : 0) + " in global memory";
  };
  if (!data || i < 0 || i >= count)
    fail("out of bounds: " + name(now) + (access == Access::write ? " wrote " : " read ") + place());
  check_race(shadow_of(static_cast<const char*>(data) + i * element_bytes), access, launch_begin, place);
}

void check_pair(const void* at, int element_bytes) {
  if (!at || reinterpret_cast<uintptr_t>(at) % (2 * element_bytes) == 0) return;  // null: check_global says so
  fail("misaligned: " + name(now) + " came to a pair of elements of " + std::to_string(element_bytes) +
       " bytes each in global memory");
}

unsigned char* check_shared(int begin, int64_t size, int64_t offset, int bytes, Access access) {
  Block& block = *mine->block;
  const int at = at_in(block, begin, size, offset, bytes, access == Access::write ? " wrote " : " read ");
  for (int byte = at; byte < at + bytes; byte += 2) {
    Shadow& shadow = block.shadows[byte / 2];
    if (access == Access::read && shadow.write >> kActorBits < group_begin)
      fail("unwritten: " + name(now) + " read " + place_in(block, byte));
    check_race(shadow, access, group_begin, [&] { return place_in(block, byte); });
  }
  return block.memory.get() + at;
}

}  // namespace seqkernels::emulator
