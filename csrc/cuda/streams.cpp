#include "streams.h"

#ifndef SEQKERNELS_EMULATOR
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>

namespace seqkernels {

namespace {

void check_cuda(cudaError_t error) {
  check(error == cudaSuccess, "CUDA cannot let layers run at the same time: ", cudaGetErrorString(error));
}

// Allows, in this thread, what a capture elsewhere would forbid.
class Relaxed {
 public:
  Relaxed() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

class StreamSet {
 public:
  StreamSet(int device, cudaStream_t of_call) : device(device), of_call(of_call) {
    const Relaxed relaxed;
    for (int i = 0; i < kMaxStreams; i++) {
      check_cuda(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
      check_cuda(cudaEventCreateWithFlags(&events[i], cudaEventDisableTiming));
    }
  }

  // Lets `stream` wait for what the i-th one has been given.
  cudaError_t wait_for(int64_t i, cudaStream_t stream) const {
    const cudaError_t error = cudaEventRecord(events[i], streams[i]);
    return error == cudaSuccess ? cudaStreamWaitEvent(stream, events[i], 0) : error;
  }

  const int device;
  const cudaStream_t of_call;
  cudaStream_t streams[kMaxStreams];
  cudaEvent_t events[kMaxStreams];
};

namespace {

// Sets that no call is issuing work to, each for the calls of one stream. So layers wait for nothing that the call's
// stream does not wait for; a capture holds streams that only captured calls use; and the workspaces that torch keeps
// for cuBLAS on them are shared by no more calls and graphs than that of the call's stream. They live as long as the
// process: when it ends, CUDA may have before.
class Pool {
 public:
  StreamSet* take(int device, cudaStream_t of_call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(free_.begin(), free_.end(), [&](const StreamSet* set) {
      return set->device == device && set->of_call == of_call;
    });
    if (found == free_.end()) return new StreamSet(device, of_call);
    StreamSet* const set = *found;
    free_.erase(found);
    return set;
  }

  void give_back(StreamSet* set) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(set);
  }

 private:
  std::mutex mutex_;
  std::vector<StreamSet*> free_;
};

Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

cudaStream_t stream_of(const CallContext& call) { return static_cast<cudaStream_t>(call.stream()); }

}  // namespace

Streams::Streams(const CallContext& call, int64_t count)
    : Streams(call, count, count == 1 ? nullptr : pool().take(call.device(), stream_of(call))) {
  if (!set_) return;  // from here on an error runs the destructor, which gives the set back
  check_cuda(cudaEventRecord(set_->events[0], stream_of(call)));
  for (int64_t i = 0; i < count; i++) check_cuda(cudaStreamWaitEvent(set_->streams[i], set_->events[0], 0));
}

// After an error as well: memory that these streams use is about to be given to others, on the call's stream.
Streams::~Streams() { end(); }

void Streams::wait(int64_t stream, int64_t other) {
  if (stream != other) check_cuda(set_->wait_for(other, set_->streams[stream]));
}

void Streams::join() { check_cuda(static_cast<cudaError_t>(end())); }

int Streams::end() {
  if (!set_) return cudaSuccess;
  cudaError_t first = cudaSuccess;
  for (int64_t i = 0; i < count_; i++) {
    const cudaError_t error = set_->wait_for(i, stream_of(call_));
    if (first == cudaSuccess) first = error;
  }
  pool().give_back(set_);
  set_ = nullptr;
  return first;
}

void* Streams::at(int64_t stream) const { return set_->streams[stream]; }

}  // namespace seqkernels

#endif
