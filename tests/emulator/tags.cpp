// Vectors with tags in global memory, by which blocks exchange without any other order: each arrives at some later
// time, those of one place in their order.
#include <deque>

#include "state.h"

namespace seqkernels::emulator {
namespace {

struct Sent {
  std::array<uint32_t, 4> words;
  int begin, end;  // which of them
  Stamp by;
  Seen seen;
};

struct Read {
  int block, thread;  // among all that run
  uint64_t time;
};

struct Vector {
  uint32_t* at;
  std::array<Stamp, 4> writes;  // of the words that are there; 0: before the launch
  Seen seen;                    // by who wrote the tag
  std::deque<Sent> under_way;
  std::vector<Read> reads;  // since the last store
  std::vector<int> waiting;
};

std::unordered_map<const void*, Vector> vectors;
std::vector<Vector*> sent, late;  // of each store that is under way, where to

int block_of(Stamp access) { return static_cast<int>(access & kActors) / threads; }

bool is_seen(int block, int thread, uint64_t time) { return thread == mine->index || mine->seen->at(block) >= time; }

[[noreturn]] void race(Stamp one, const char* did, Stamp other, const char* does, int64_t i) {
  fail("race: " + name(one) + did + name(other) + does + "vector " + std::to_string(i) + ", nothing orders them");
}

// A vector begins without a tag, or one that is left from a launch before might be taken for this one's.
Vector& vector_at(const void* data, int64_t count, int64_t i, const char* does) {
  if (!data || i < 0 || i >= count || reinterpret_cast<uintptr_t>(data) % 16)
    fail("out of bounds: " + name(now) + does + "vector " + std::to_string(i) + " of " + std::to_string(count));
  auto* at = const_cast<uint32_t*>(static_cast<const uint32_t*>(data)) + i * 4;
  const auto [found, begins] = vectors.try_emplace(at);
  Vector& vector = found->second;
  if (!begins) return vector;
  vector.at = at;
  if (goes_wrong(Fault::stale)) at[3] = 1;
  if (at[3] != 0)
    fail("stale: " + name(now) + does + "vector " + std::to_string(i) + ", which begins with tag " +
         std::to_string(at[3]));
  return vector;
}

void arrive_at(Vector& vector) {
  const Sent& store = vector.under_way.front();
  for (int word = store.begin; word < store.end; word++)
    vector.at[word] = store.words[word], vector.writes[word] = store.by;
  if (store.end == 4) vector.seen = store.seen;
  vector.under_way.pop_front();
  wake(vector.waiting);
}

// Take the words that are there; they all have to be of one store.
void take(const Vector& vector, int64_t i, void* words) {
  for (const Stamp write : vector.writes)
    if (write != vector.writes[3])
      fail("torn: " + name(now) + " read vector " + std::to_string(i) + ", of which " + name(vector.writes[3]) +
           " wrote a half");
  std::memcpy(words, vector.at, 16);
}

}  // namespace

void send(void* data, int64_t count, int64_t i, const void* words) {
  Vector& vector = vector_at(data, count, i, " stored ");
  set_time(++latest);
  for (const Read& read : vector.reads)
    if (!is_seen(read.block, read.thread, read.time))
      race(read.time << kActorBits | read.thread, " read and ", now, " wrote ", i);
  vector.reads.clear();
  if (goes_wrong(Fault::tag)) return;
  Sent store{{}, 0, 4, now, mine->seen};
  std::memcpy(store.words.data(), words, 16);
  const bool torn = goes_wrong(Fault::tear);
  if (torn) store.begin = 2;
  vector.under_way.push_back(store);
  sent.push_back(&vector);
  if (!torn) return;
  store.begin = 0, store.end = 2;
  vector.under_way.push_back(store);
  late.push_back(&vector);
}

void receive(const void* data, int64_t count, int64_t i, uint32_t tag, void* words) {
  Vector& vector = vector_at(data, count, i, " read ");
  const bool waits = !goes_wrong(Fault::wait);
  while (waits && vector.at[3] != tag) {
    if (static_cast<int32_t>(vector.at[3] - tag) > 0)
      fail("overrun: " + name(now) + " waited for tag " + std::to_string(tag) + " of vector " + std::to_string(i) +
           ", where " + name(vector.writes[3]) + " has stored " + std::to_string(vector.at[3]));
    wait_among(vector.waiting, State::in_tag);
  }
  set_time(++latest);
  take(vector, i, words);
  // Without a tag to say so, what was stored is there or not.
  const Stamp write = vector.writes[3];
  if (!waits && write && !is_seen(block_of(write), int(write & kActors), write >> kActorBits))
    race(write, " wrote and ", now, " read ", i);
  if (!vector.under_way.empty()) race(vector.under_way.back().by, " wrote and ", now, " read ", i);
  vector.reads.push_back({mine->block->rank, mine->index, mine->time});
  if (waits) mine->seen = joined(mine->seen, vector.seen);
}

size_t sent_vectors() { return sent.size(); }

void arrive(size_t which) {
  Vector& vector = *sent[which];
  sent[which] = sent.back();
  sent.pop_back();
  arrive_at(vector);
}

bool arrive_late_half() {
  if (late.empty()) return false;
  Vector& vector = *late.back();
  late.pop_back();
  arrive_at(vector);
  return true;
}

void forget_vectors() { vectors.clear(), sent.clear(), late.clear(); }

}  // namespace seqkernels::emulator
