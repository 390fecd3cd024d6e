// Copies and fills. Those of page-locked memory are queued and find its bytes when they run; those of pageable memory
// take them at once, and make the host wait.
#include <cstring>

#include "simulation.h"

namespace sim {

namespace {

bool on_device(const void* address) { return device_of(address) >= 0; }

std::string name_of(const void* target, const void* source, size_t bytes) {
  std::string from = on_device(source) ? "device" : "host", to = on_device(target) ? "device" : "host";
  return "copy of " + std::to_string(bytes) + " bytes from " + from + " to " + to;
}

bool still_there(const void* address, size_t bytes, const char* does) {
  if (on_device(address)) {
    check_live(address, bytes, "a queued copy");
    return true;
  }
  if (is_locked(address, bytes)) return true;
  fault(std::string("a queued copy ") + does + " host memory that is no longer locked");
  return false;
}

cudaError_t copy_from_pageable(void* target, const void* source, size_t bytes, Stream* stream) {
  note_wait("cudaMemcpyAsync from pageable memory");
  if (stream->capture) fault("under capture: a copy from pageable memory is recorded with its address");
  auto* first = static_cast<const char*>(source);
  auto held = std::make_shared<std::vector<char>>(first, first + bytes);
  auto run = [=] {
    check_live(target, bytes, "a queued copy");
    memcpy(alias_of(target), held->data(), bytes);
  };
  enqueue(stream, {name_of(target, source, bytes), run});
  return cudaSuccess;
}

cudaError_t copy_to_pageable(void* target, const void* source, size_t bytes, Stream* stream) {
  note_wait("cudaMemcpyAsync to pageable memory");
  if (stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
  drain(stream);
  memcpy(target, alias_of(source), bytes);
  return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t bytes, cudaStream_t handle) {
  Lock lock;
  if (bytes == 0) return cudaSuccess;
  Stream* stream = stream_of(handle);
  check_live(target, bytes, "a copy");
  check_live(source, bytes, "a copy");
  if (on_device(target) && !on_device(source) && !is_locked(source, bytes))
    return copy_from_pageable(target, source, bytes, stream);
  if (on_device(source) && !on_device(target) && !is_locked(target, bytes))
    return copy_to_pageable(target, source, bytes, stream);
  auto run = [=] {
    bool there = still_there(target, bytes, "writes");
    if (still_there(source, bytes, "reads") && there) memmove(alias_of(target), alias_of(source), bytes);
  };
  enqueue(stream, {name_of(target, source, bytes), run});
  return cudaSuccess;
}

}  // namespace

}  // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(target, source, bytes, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, cudaStream_t stream) {
  return copy(target, source, bytes, stream);
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    copy(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch, width,
         stream);
  return cudaSuccess;
}

// The default stream waits for streams that block it only; torch makes none of those.
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  Lock lock;
  if (refused_in_capture("cudaMemcpy")) return failed(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaMemcpy");
  drain(stream_of(nullptr));
  check_live(target, bytes, "cudaMemcpy");
  check_live(source, bytes, "cudaMemcpy");
  memmove(alias_of(target), alias_of(source), bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  Lock lock;
  check_live(address, bytes, "a fill");
  auto run = [=] {
    check_live(address, bytes, "a queued fill");
    memset(alias_of(address), value, bytes);
  };
  enqueue(stream_of(stream), {"fill of " + std::to_string(bytes) + " bytes", run});
  return cudaSuccess;
}

cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  return cudaMemsetAsync(address, value, bytes, nullptr);
}

// Constants of kernels that never run.
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void** address, const void*) { return cudaMalloc(address, 1 << 16); }

}  // extern "C"
