// Events: markers in a stream's work that the host and other streams wait for.
#include "simulation.h"

using namespace sim;

extern "C" {

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event{current_device});
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete reinterpret_cast<Event*>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  Lock lock;
  auto* event = reinterpret_cast<Event*>(handle);
  Stream* stream = stream_of(stream_handle);
  if (event->device != stream->device) {
    fault("an event of device " + std::to_string(event->device) + " is recorded on a stream of device " +
          std::to_string(stream->device));
    return failed(cudaErrorInvalidResourceHandle);
  }
  event->marker = std::make_shared<Marker>(Marker{stream});
  // Under capture it is an edge of the graph, and a graph's work runs in order here.
  if (!stream->capture) enqueue(stream, {"event", {}, {}, event->marker});
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  auto& marker = reinterpret_cast<Event*>(handle)->marker;
  if (refused_in_capture("cudaEventQuery")) return failed(cudaErrorStreamCaptureUnsupported);
  progress();
  return !marker || marker->reached ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock;
  if (refused_in_capture("cudaEventSynchronize")) return failed(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaEventSynchronize");
  auto marker = reinterpret_cast<Event*>(handle)->marker;
  if (marker && !marker->reached) drain(marker->stream, marker.get());
  return cudaSuccess;
}

// There is no time here.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Lock lock;
  auto marker = reinterpret_cast<Event*>(event)->marker;
  if (!marker) return cudaSuccess;
  Stream *stream = stream_of(handle), *from = marker->stream;
  if (from->capture && !stream->capture) {
    // The waiting stream joins the capture.
    stream->capture = from->capture;
    stream->capture_id = from->capture_id;
  } else if (!stream->capture) {
    enqueue(stream, {"wait", {}, marker});
  }
  return cudaSuccess;
}

}  // extern "C"
