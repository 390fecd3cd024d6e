// What a program asks about devices, contexts and errors.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "simulation.h"

#undef cuCtxPopCurrent
#undef cuCtxPushCurrent

namespace sim {

thread_local int current_device = 0;

namespace {

constexpr int VERSION = 13000;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<int> pushed;

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<intptr_t>(device + 1)); }
int device_of_context(CUcontext context) { return static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1; }
int shared_bytes() { return world().capability >= 90 ? 232448 : 101376; }

}  // namespace

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return shared_bytes();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 102400;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMultiProcessorCount:
      return 16;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      return 1000000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 384;
    case cudaDevAttrComputeCapabilityMajor:
      return world().capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return world().capability % 10;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 1536;
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch:
      return 1;
    default:
      return 0;
  }
}

}  // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(world().devices.size());
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(world().devices.size())) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {};
  auto& p = *properties;
  snprintf(p.name, sizeof p.name, "Simulated device %d", device);
  p.uuid.bytes[0] = static_cast<char>(device + 1);
  p.major = world().capability / 10;
  p.minor = world().capability % 10;
  p.totalGlobalMem = world().device_bytes;
  p.totalConstMem = 65536;
  p.memPitch = 2147483647;
  p.memoryBusWidth = 384;
  p.l2CacheSize = 1 << 25;
  p.warpSize = 32;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 49152;
  p.sharedMemPerBlockOptin = static_cast<size_t>(shared_bytes());
  p.sharedMemPerMultiprocessor = 102400;
  p.maxThreadsPerBlock = p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.multiProcessorCount = 16;
  p.maxThreadsPerMultiProcessor = 1536;
  p.maxBlocksPerMultiProcessor = 24;
  p.pciBusID = device + 1;
  p.asyncEngineCount = 2;
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = p.streamPrioritiesSupported = 1;
  p.managedMemory = p.concurrentManagedAccess = p.cooperativeLaunch = p.hostRegisterSupported = 1;
  p.memoryPoolsSupported = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int device) {
  snprintf(text, static_cast<size_t>(room), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  if (refused_in_capture("cudaDeviceSynchronize")) return failed(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaDeviceSynchronize");
  drain_device(current_device);
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorSimulated";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      static thread_local char text[64];
      snprintf(text, sizeof text, "error %d of the simulated device", static_cast<int>(error));
      return text;
  }
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  cudaGetDeviceCount(count);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) {
  if (number < 0 || number >= static_cast<int>(world().devices.size())) return CUDA_ERROR_INVALID_DEVICE;
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* text, int room, CUdevice device) {
  snprintf(text, static_cast<size_t>(room), "Simulated device %d", device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = attribute(static_cast<int>(which));
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  pushed.push_back(current_device);
  current_device = device_of_context(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = context_of(current_device);
  current_device = pushed.back();
  pushed.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) { return cuCtxPushCurrent_v2(context); }
CUresult cuCtxPopCurrent(CUcontext* context) { return cuCtxPopCurrent_v2(context); }

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) current_device = device_of_context(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  cudaDeviceSynchronize();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* bytes, CUlimit) {
  *bytes = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  static thread_local char words[64];
  snprintf(words, sizeof words, "error %d of the simulated driver", static_cast<int>(error));
  *text = words;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

}  // extern "C"
