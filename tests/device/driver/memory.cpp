// Memory of the devices, page-locked memory of the host, and unified memory.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simulation.h"

namespace sim {

namespace {

constexpr size_t PAGE = 4096, SMALL = 512, LARGE = 2 << 20;
constexpr size_t POISON_BYTES = 64 << 20;
// As floats of any size these are NaN.
constexpr int UNSET = 0xFF, FREED = 0xFD, HOST_UNSET = 0xFB;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

bool inside(const std::map<uintptr_t, size_t>& ranges, const void* address, size_t bytes) {
  auto first = reinterpret_cast<uintptr_t>(address);
  auto found = ranges.upper_bound(first);
  if (found == ranges.begin()) return false;
  --found;
  return first + bytes <= found->first + found->second;
}

void fill(const void* address, int value, size_t bytes) {
  if (world().poison) memset(alias_of(address), value, std::min(bytes, POISON_BYTES));
}

void* take_hole(Device& device, size_t bytes) {
  for (auto hole = device.holes.begin(); hole != device.holes.end(); ++hole) {
    auto [first, room] = *hole;
    if (room < bytes) continue;
    device.holes.erase(hole);
    if (room > bytes) device.holes[first + bytes] = room - bytes;
    return reinterpret_cast<void*>(first);
  }
  if (device.top + bytes > world().device_bytes) return nullptr;
  void* first = device.base + device.top;
  device.top += bytes;
  return first;
}

void* allocate(int number, size_t wanted) {
  world().allocations++;
  auto& device = world().devices[number];
  size_t bytes = round_up(std::max<size_t>(wanted, 1), wanted >= LARGE / 2 ? LARGE : SMALL);
  void* first = take_hole(device, bytes);
  if (first == nullptr) return nullptr;
  device.live[reinterpret_cast<uintptr_t>(first)] = bytes;
  device.used += bytes;
  fill(first, UNSET, bytes);
  return first;
}

// Holes that touch become one.
void leave_hole(Device& device, uintptr_t first, size_t bytes) {
  auto here = device.holes.emplace(first, bytes).first;
  auto next = std::next(here);
  if (next != device.holes.end() && first + bytes == next->first) {
    here->second += next->second;
    device.holes.erase(next);
  }
  if (here == device.holes.begin()) return;
  auto before = std::prev(here);
  if (before->first + before->second == first) {
    before->second += here->second;
    device.holes.erase(here);
  }
}

bool may_lock(size_t bytes) {
  auto& w = world();
  return w.lock_limit < 0 || w.locked_bytes + static_cast<int64_t>(bytes) <= w.lock_limit;
}

void lock_range(void* address, size_t bytes) {
  world().locked[reinterpret_cast<uintptr_t>(address)] = bytes;
  world().locked_bytes += static_cast<int64_t>(bytes);
}

void unlock_range(std::map<uintptr_t, size_t>::iterator range) {
  world().locked_bytes -= static_cast<int64_t>(range->second);
  world().locked.erase(range);
}

CUresult prefetch(CUdeviceptr address, size_t bytes, CUstream stream) {
  Lock lock;
  if (!is_managed(reinterpret_cast<void*>(address))) return CUDA_ERROR_INVALID_VALUE;
  enqueue(stream_of(stream), {"prefetch of " + std::to_string(bytes) + " bytes"});
  return CUDA_SUCCESS;
}

}  // namespace

int device_of(const void* address) {
  auto& devices = world().devices;
  for (size_t number = 0; number < devices.size(); number++)
    if (address >= devices[number].base && address < devices[number].base + world().device_bytes)
      return static_cast<int>(number);
  return -1;
}

char* alias_of(const void* address) {
  int number = device_of(address);
  auto* bytes = static_cast<char*>(const_cast<void*>(address));
  if (number < 0) return bytes;
  auto& device = world().devices[number];
  return device.alias + (bytes - device.base);
}

bool is_live(const void* address, size_t bytes) {
  int number = device_of(address);
  return number < 0 || inside(world().devices[number].live, address, bytes);
}

bool is_locked(const void* address, size_t bytes) { return inside(world().locked, address, bytes); }
bool is_managed(const void* address) { return inside(world().managed, address, 1); }

void check_live(const void* address, size_t bytes, const char* what) {
  if (!is_live(address, bytes)) fault(std::string(what) + " touches freed or foreign device memory");
}

}  // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) {
  Lock lock;
  if (refused_in_capture("cudaMalloc")) return failed(cudaErrorStreamCaptureUnsupported);
  *address = allocate(current_device, bytes);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

// Waits for the device, as CUDA does.
cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  Lock lock;
  int number = device_of(address);
  if (number < 0) return failed(cudaErrorInvalidValue);
  drain_device(number);
  auto& device = world().devices[number];
  auto piece = device.live.find(reinterpret_cast<uintptr_t>(address));
  if (piece == device.live.end()) {
    fault("cudaFree of what is not allocated");
    return failed(cudaErrorInvalidValue);
  }
  auto [first, bytes] = *piece;
  device.live.erase(piece);
  device.used -= bytes;
  fill(address, FREED, bytes);
  leave_hole(device, first, bytes);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) { return cudaMalloc(address, bytes); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* bytes) {
  *bytes = world().device_bytes;
  *free_bytes = *bytes - world().devices[current_device].used;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  Lock lock;
  if (refused_in_capture("cudaHostAlloc")) return failed(cudaErrorStreamCaptureUnsupported);
  world().allocations++;
  if (!may_lock(bytes)) return failed(cudaErrorMemoryAllocation);
  *address = aligned_alloc(PAGE, round_up(std::max<size_t>(bytes, 1), PAGE));
  memset(*address, HOST_UNSET, bytes);
  lock_range(*address, bytes);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  Lock lock;
  auto range = world().locked.find(reinterpret_cast<uintptr_t>(address));
  if (range == world().locked.end()) return failed(cudaErrorInvalidValue);
  drain_all();
  unlock_range(range);
  free(address);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  Lock lock;
  world().allocations++;
  if (!may_lock(bytes)) return failed(cudaErrorMemoryAllocation);
  auto first = reinterpret_cast<uintptr_t>(address);
  for (auto& [other, size] : world().locked)
    if (other < first + bytes && first < other + size) return failed(cudaErrorHostMemoryAlreadyRegistered);
  lock_range(address, bytes);
  world().registered.insert(first);
  return cudaSuccess;
}

// Does not wait: work that is queued on the memory then finds it unlocked.
cudaError_t cudaHostUnregister(void* address) {
  Lock lock;
  auto first = reinterpret_cast<uintptr_t>(address);
  if (!world().registered.erase(first)) return failed(cudaErrorHostMemoryNotRegistered);
  unlock_range(world().locked.find(first));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock;
  *attributes = {};
  auto* plain = const_cast<void*>(address);
  int number = device_of(address);
  if (is_managed(address)) {
    *attributes = {cudaMemoryTypeManaged, number, plain, plain, {}};
  } else if (number >= 0) {
    *attributes = {cudaMemoryTypeDevice, number, plain, nullptr, {}};
  } else if (is_locked(address, 1)) {
    *attributes = {cudaMemoryTypeHost, 0, plain, plain, {}};
  } else {
    *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, nullptr, {}};
  }
  return cudaSuccess;
}

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr pointer) {
  Lock lock;
  auto* address = reinterpret_cast<void*>(pointer);
  bool on_device = device_of(address) >= 0;
  if (!on_device && !is_locked(address, 1)) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *static_cast<CUdeviceptr*>(out) = pointer;
  else if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *static_cast<unsigned*>(out) = on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else
    *static_cast<uint64_t*>(out) = 0;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* first, size_t* bytes, CUdeviceptr pointer) {
  Lock lock;
  auto* address = reinterpret_cast<void*>(pointer);
  int number = device_of(address);
  if (number < 0 || !is_live(address, 1)) return CUDA_ERROR_INVALID_VALUE;
  auto piece = std::prev(world().devices[number].live.upper_bound(pointer));
  if (first) *first = piece->first;
  if (bytes) *bytes = piece->second;
  return CUDA_SUCCESS;
}

// Unified memory lies on the device, and the host may touch it.
CUresult cuMemAllocManaged(CUdeviceptr* pointer, size_t wanted, unsigned) {
  Lock lock;
  size_t bytes = round_up(std::max<size_t>(wanted, 1), LARGE);
  void* address = allocate(current_device, bytes);
  if (address == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  if (mprotect(address, bytes, PROT_READ | PROT_WRITE) != 0) {
    perror("unified memory");
    abort();
  }
  *pointer = reinterpret_cast<CUdeviceptr>(address);
  world().managed[*pointer] = bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
  Lock lock;
  auto range = world().managed.find(pointer);
  if (range == world().managed.end()) return CUDA_ERROR_INVALID_VALUE;
  auto& streams = world().streams;
  auto* address = reinterpret_cast<void*>(pointer);
  // The work of another device has nothing to do with it.
  auto busy = [owner = device_of(address)](Stream* stream) {
    return stream->device == owner && !stream->queue.empty() && !stream->capture;
  };
  if (std::any_of(streams.begin(), streams.end(), busy)) fault("unified memory is freed while streams have work");
  mprotect(address, range->second, PROT_NONE);
  world().managed.erase(range);
  cudaFree(address);
  return CUDA_SUCCESS;
}

CUresult cuMemPrefetchAsync_v2(CUdeviceptr address, size_t bytes, CUmemLocation, unsigned, CUstream stream) {
  return prefetch(address, bytes, stream);
}

CUresult cuMemAdvise_v2(CUdeviceptr, size_t, CUmem_advise, CUmemLocation) { return CUDA_SUCCESS; }

// Memory pools hold nothing here.
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

}  // extern "C"
