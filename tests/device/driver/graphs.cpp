// CUDA graphs: a capture keeps the work in order, a launch queues it again.
#include <utility>

#include "simulation.h"

namespace sim {

namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaStreamCaptureStatus status_of(const Stream* stream) {
  return stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

cudaError_t begin(cudaStream_t handle, Graph* graph) {
  Lock lock;
  Stream* stream = stream_of(handle);
  drain(stream);
  stream->capture = graph;
  stream->capture_id = world().next_capture++;
  return cudaSuccess;
}

}  // namespace

bool refused_in_capture(const char* what) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  for (Stream* stream : world().streams)
    if (stream->capture) {
      fault(std::string("under capture: ") + what);
      return true;
    }
  return false;
}

}  // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) { return begin(stream, new Graph); }

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  return begin(stream, reinterpret_cast<Graph*>(graph));
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Lock lock;
  Graph* graph = stream_of(handle)->capture;
  for (Stream* stream : world().streams)
    if (stream->capture == graph) {
      stream->capture = nullptr;
      stream->capture_id = 0;
    }
  *out = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = status_of(stream_of(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Stream* stream = stream_of(handle);
  *status = status_of(stream);
  if (id) *id = stream->capture_id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(stream->capture);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                unsigned) {
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  Lock lock;
  for (auto& work : reinterpret_cast<Graph*>(graph)->work) enqueue(stream_of(stream), work);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!nodes) *count = reinterpret_cast<Graph*>(graph)->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = reinterpret_cast<cudaUserObject_t>(1);
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

}  // extern "C"
