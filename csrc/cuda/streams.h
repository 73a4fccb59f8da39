// The streams of a call in which several layers run at the same time.
#pragma once
#include "context.h"

#ifdef SEQKERNELS_EMULATOR
#include "emulator/streams.h"
#endif

namespace seqkernels {

#ifdef SEQKERNELS_EMULATOR

using Streams = emulator::Streams<CallContext>;

#else

class StreamSet;  // of a GPU, with an event for each

// What a stream is given it does in order. Nothing begins before all that the call's own stream has been given until
// now; what that is given after join() begins after all. A CUDA graph that captures the call's stream captures these as
// well. One stream is the call's own.
class Streams {
 public:
  Streams(const CallContext& call, int64_t count);
  ~Streams();
  Streams(const Streams&) = delete;

  // Lets what a stream is given from now on begin after all that another one has been given until now.
  void wait(int64_t stream, int64_t other);

  // work(context)
  template <class Work>
  void run(int64_t stream, const Work& work) {
    if (count_ == 1) return work(call_);
    work(CallContext(call_, at(stream)));
  }

  void join();

 private:
  Streams(const CallContext& call, int64_t count, StreamSet* set) : call_(call), count_(count), set_(set) {}

  void* at(int64_t stream) const;
  int end();  // join(), whose error it returns

  const CallContext& call_;
  const int64_t count_;
  StreamSet* set_;  // null: there is none, or it is joined
};

#endif

}  // namespace seqkernels
