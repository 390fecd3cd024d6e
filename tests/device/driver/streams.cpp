// Streams: queues of work, and the order in which it runs.
#include <algorithm>
#include <chrono>
#include <utility>

#include "simulation.h"

namespace sim {

namespace {

// Runs what another stream must do before `work` can begin.
void reach(const Work& work, const Stream* stream) {
  if (!work.wait || work.wait->reached) return;
  Stream* other = work.wait->stream;
  auto& streams = world().streams;
  bool exists = std::find(streams.begin(), streams.end(), other) != streams.end();
  if (other != stream && exists) drain(other, work.wait.get());
  if (!work.wait->reached) fault("a stream waits for an event that nothing will record");
}

void run_next(Stream* stream) {
  Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  bool inside = std::exchange(stream->running, true);
  stream->runner = std::this_thread::get_id();
  reach(work, stream);
  if (work.run) work.run();
  if (work.mark) work.mark->reached = true;
  stream->running = inside;
}

cudaError_t make_stream(cudaStream_t* handle, int priority) {
  Lock lock;
  auto* stream = new Stream{current_device, priority};
  world().streams.push_back(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

}  // namespace

Stream* stream_of(cudaStream_t handle) {
  bool is_default = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? world().devices[current_device].default_stream : reinterpret_cast<Stream*>(handle);
}

void drain(Stream* stream, const Marker* until) {
  while (!(until && until->reached)) {
    if (stream->running && stream->runner != std::this_thread::get_id()) {
      // What another thread runs gives the lock up, and is not over yet.
      Unlocked unlocked;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    } else if (stream->queue.empty()) {
      return;
    } else {
      run_next(stream);
    }
  }
}

void drain_device(int device) {
  for (Stream* stream : std::vector<Stream*>(world().streams))
    if (stream->device == device && !stream->capture) drain(stream);
}

void drain_all() {
  for (size_t device = 0; device < world().devices.size(); device++) drain_device(static_cast<int>(device));
}

void progress() {
  auto& w = world();
  if (w.order != RANDOM) return;
  std::vector<Stream*> busy;
  for (Stream* stream : w.streams)
    if (!stream->queue.empty() && !stream->running) busy.push_back(stream);
  if (busy.empty()) return;
  Stream* stream = busy[w.random() % busy.size()];
  for (auto count = w.random() % 4; count > 0 && !stream->queue.empty(); count--) {
    auto& next = stream->queue.front();
    if (next.wait && !next.wait->reached) return;
    run_next(stream);
  }
}

void enqueue(Stream* stream, Work work) {
  if (stream->capture) {
    stream->capture->work.push_back(std::move(work));
    return;
  }
  stream->queue.push_back(std::move(work));
  if (world().order == EAGER)
    drain(stream);
  else
    progress();
}

}  // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_stream(stream, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make_stream(stream, 0); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  return make_stream(stream, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock;
  Stream* stream = stream_of(handle);
  drain(stream);
  auto& streams = world().streams;
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock;
  Stream* stream = stream_of(handle);
  if (stream->capture || refused_in_capture("cudaStreamSynchronize")) return failed(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaStreamSynchronize");
  drain(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  progress();
  return stream_of(stream)->queue.empty() && !stream_of(stream)->running ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  Lock lock;
  enqueue(stream_of(stream), {"callback", [=] { call(stream, cudaSuccess, data); }});
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  Lock lock;
  enqueue(stream_of(stream), {"host function", [=] { call(data); }});
  return cudaSuccess;
}

}  // extern "C"
