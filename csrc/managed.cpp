// CUDA's unified memory as DLPack tensors, through a driver that is loaded at run time: building needs nothing of CUDA.
#include "managed.h"

#include <cstddef>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

// As DLPack 0.8 lays it out; torch takes it in a capsule named "dltensor".
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

namespace lisa {
namespace {

constexpr int32_t kDLCPU = 1, kDLCUDA = 2;
constexpr uint8_t kDLUInt = 1;

// Of cuda.h: types, by their size, and numbers.
using Result = int;
using Address = unsigned long long;
using Context = void*;
using Stream = void*;
struct Location {
  int type, id;
};
constexpr int kOnDevice = 1, kOnHost = 2;
constexpr int kHostAsDevice = -1;
constexpr int kManagedMemory = 83, kConcurrentManagedAccess = 89;
constexpr unsigned kSeenByAllStreams = 1;
constexpr int kPreferredLocation = 3, kAccessedBy = 5;

using Failure = std::runtime_error;

void* load_library(const std::string& name) {
#ifdef _WIN32
  void* const library = reinterpret_cast<void*>(LoadLibraryA(name.c_str()));
  const std::string reason = "error " + std::to_string(GetLastError());
#else
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string reason = library == nullptr ? dlerror() : "";
#endif
  if (library == nullptr) throw Failure("CUDA's driver cannot be loaded (" + reason + ")");
  return library;
}

void* find_symbol(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

// The driver's functions. The library stays loaded to the end of the process, as torch's own use of it does.
class Driver {
 public:
  explicit Driver(const std::string& path) : path_(path), library_(load_library(path)) {
    require(init, "cuInit");
    require(device_get, "cuDeviceGet");
    require(device_attribute, "cuDeviceGetAttribute");
    require(context_retain, "cuDevicePrimaryCtxRetain");
    require(context_release, "cuDevicePrimaryCtxRelease_v2");
    require(context_push, "cuCtxPushCurrent_v2");
    require(context_pop, "cuCtxPopCurrent_v2");
    require(allocate, "cuMemAllocManaged");
    require(synchronize, "cuCtxSynchronize");
    require(free, "cuMemFree_v2");
    require(error_string, "cuGetErrorString");
    // Of drivers since CUDA 12.2; each falls back to the form before.
    if (!find(prefetch_v2, "cuMemPrefetchAsync_v2")) require(prefetch_v1, "cuMemPrefetchAsync");
    if (!find(advise_v2, "cuMemAdvise_v2")) require(advise_v1, "cuMemAdvise");
  }

  Result (*init)(unsigned);
  Result (*device_get)(int*, int);
  Result (*device_attribute)(int*, int, int);
  Result (*context_retain)(Context*, int);
  Result (*context_release)(int);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*allocate)(Address*, size_t, unsigned);
  Result (*synchronize)();
  Result (*free)(Address);
  Result (*error_string)(Result, const char**);
  Result (*prefetch_v2)(Address, size_t, Location, unsigned, Stream) = nullptr;
  Result (*prefetch_v1)(Address, size_t, int, Stream) = nullptr;
  Result (*advise_v2)(Address, size_t, int, Location) = nullptr;
  Result (*advise_v1)(Address, size_t, int, int) = nullptr;

  Result prefetch(Address address, size_t bytes, Location to, Stream stream) const {
    if (prefetch_v2 != nullptr) return prefetch_v2(address, bytes, to, 0, stream);
    return prefetch_v1(address, bytes, device_of(to), stream);
  }

  Result advise(Address address, size_t bytes, int advice, Location location) const {
    if (advise_v2 != nullptr) return advise_v2(address, bytes, advice, location);
    return advise_v1(address, bytes, advice, device_of(location));
  }

  // Throws what the driver says of a call that failed.
  void check(Result result, const std::string& call) const {
    if (result == 0) return;
    const char* words = nullptr;
    const bool known = error_string(result, &words) == 0 && words != nullptr;
    throw Failure(call + " failed with error " + std::to_string(result) + (known ? ": " + std::string(words) : ""));
  }

 private:
  static int device_of(Location location) { return location.type == kOnHost ? kHostAsDevice : location.id; }

  template <class Function>
  bool find(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(find_symbol(library_, name));
    return function != nullptr;
  }

  template <class Function>
  void require(Function& function, const char* name) const {
    if (!find(function, name)) throw Failure(path_ + " has no " + name + ", so it is too old or no driver of CUDA");
  }

  std::string path_;
  void* library_;
};

// Makes a context current while it lives. Tensors die on threads that have none.
class Current {
 public:
  Current(const Driver& driver, Context context) : driver_(driver) {
    driver.check(driver.context_push(context), "cuCtxPushCurrent");
  }
  ~Current() {
    Context ours;
    driver_.context_pop(&ours);  // whose failure takes nothing from what was done
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

class Memory;

// A tensor, what it holds, and the next one that was dropped.
struct Block {
  DLManagedTensor managed;
  int64_t bytes;
  std::shared_ptr<Memory> memory;
  Block* next;

  Address address() const { return reinterpret_cast<Address>(managed.tensor.data); }
};

void drop(DLManagedTensor* tensor);

// One device's unified memory. It lives as long as its handle or any of its tensors.
class Memory : public std::enable_shared_from_this<Memory> {
 public:
  Memory(const std::string& path, int32_t ordinal) : driver_(path), ordinal_(ordinal) {
    driver_.check(driver_.init(0), "cuInit");
    driver_.check(driver_.device_get(&device_, ordinal), "cuDeviceGet of device " + std::to_string(ordinal));
    require(kManagedMemory, " has no unified memory");
    require(kConcurrentManagedAccess,
            " cannot share memory with the host while it computes, as none can under Windows and WSL");
    driver_.check(driver_.context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  }

  ~Memory() {
    try_free_dropped();
    while (dropped_ != nullptr) {
      const std::unique_ptr<Block> lost(dropped_);
      dropped_ = lost->next;
    }
    driver_.context_release(device_);
  }

  DLManagedTensor* allocate(int64_t bytes, bool on_device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Current current(driver_, context_);
    free_dropped();
    auto block = std::make_unique<Block>();
    Address address = 0;
    driver_.check(driver_.allocate(&address, static_cast<size_t>(bytes), kSeenByAllStreams),
                  "cuMemAllocManaged of " + std::to_string(bytes) + " bytes");
    live_bytes_ += bytes;
    block->bytes = bytes;
    DLTensor& tensor = block->managed.tensor;
    tensor.data = reinterpret_cast<void*>(address);
    tensor.device_type = on_device ? kDLCUDA : kDLCPU;
    tensor.device_id = on_device ? ordinal_ : 0;
    tensor.dimensions = tensor.lanes = 1;
    tensor.type_code = kDLUInt;
    tensor.bits = 8;
    tensor.shape = &block->bytes;
    try {
      advise(*block, kPreferredLocation, {kOnHost, 0});
      advise(*block, kAccessedBy, {kOnDevice, device_});
    } catch (...) {
      keep_dropped(block.release());
      try_free_dropped();
      throw;
    }
    block->memory = shared_from_this();
    block->managed.manager_ctx = block.get();
    block->managed.deleter = drop;
    return &block.release()->managed;
  }

  void prefetch(const void* address, int64_t bytes, bool to_device, Stream stream) {
    const Current current(driver_, context_);
    const Location to = to_device ? Location{kOnDevice, device_} : Location{kOnHost, 0};
    driver_.check(driver_.prefetch(reinterpret_cast<Address>(address), static_cast<size_t>(bytes), to, stream),
                  "cuMemPrefetchAsync of " + std::to_string(bytes) + " bytes");
  }

  // A tensor's end. No error can be told there: what the driver refuses waits for the next call.
  void free(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    keep_dropped(block);
    try_free_dropped();
  }

  int64_t live_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return live_bytes_;
  }

 private:
  void require(int attribute, const std::string& otherwise) {
    int value = 0;
    driver_.check(driver_.device_attribute(&value, attribute, device_), "cuDeviceGetAttribute");
    if (value == 0) throw Failure("device " + std::to_string(ordinal_) + otherwise);
  }

  void advise(const Block& block, int advice, Location location) {
    driver_.check(driver_.advise(block.address(), static_cast<size_t>(block.bytes), advice, location), "cuMemAdvise");
  }

  void keep_dropped(Block* block) {
    block->next = dropped_;
    dropped_ = block;
  }

  // cuMemFree alone promises no wait for work that still uses the memory.
  void free_dropped() {
    if (dropped_ == nullptr) return;
    driver_.check(driver_.synchronize(), "cuCtxSynchronize");
    while (dropped_ != nullptr) {
      driver_.check(driver_.free(dropped_->address()), "cuMemFree of " + std::to_string(dropped_->bytes) + " bytes");
      const std::unique_ptr<Block> freed(dropped_);
      dropped_ = freed->next;
      live_bytes_ -= freed->bytes;
    }
  }

  void try_free_dropped() {
    if (dropped_ == nullptr) return;
    try {
      const Current current(driver_, context_);
      free_dropped();
    } catch (const std::exception&) {
    }
  }

  Driver driver_;
  int32_t ordinal_;
  int device_ = 0;
  Context context_ = nullptr;
  std::mutex mutex_;
  int64_t live_bytes_ = 0;
  Block* dropped_ = nullptr;
};

void drop(DLManagedTensor* tensor) {
  auto* const block = static_cast<Block*>(tensor->manager_ctx);
  const std::shared_ptr<Memory> memory = std::move(block->memory);
  memory->free(block);
}

using Handle = std::shared_ptr<Memory>;

// Runs the work of one function and tells its failure.
template <class Work>
void told(char* error, int64_t capacity, const Work& work) {
  error[0] = '\0';
  try {
    work();
  } catch (const std::exception& failure) {
    std::snprintf(error, static_cast<size_t>(capacity), "%s", failure.what());
  }
}

}  // namespace
}  // namespace lisa

using namespace lisa;

extern "C" {

void lisa_kernels_managed_open(const char* driver, int32_t device, void** memory, char* error, int64_t capacity) {
  told(error, capacity, [&] { *memory = new Handle(std::make_shared<Memory>(driver, device)); });
}

void lisa_kernels_managed_close(void* memory, char* error, int64_t capacity) {
  told(error, capacity, [&] { delete static_cast<Handle*>(memory); });
}

void lisa_kernels_managed_allocate(void* memory, int64_t bytes, int32_t on_device, DLManagedTensor** tensor,
                                   char* error, int64_t capacity) {
  told(error, capacity, [&] { *tensor = (*static_cast<Handle*>(memory))->allocate(bytes, on_device != 0); });
}

void lisa_kernels_managed_prefetch(void* memory, const void* address, int64_t bytes, int32_t to_device, void* stream,
                                   char* error, int64_t capacity) {
  told(error, capacity, [&] { (*static_cast<Handle*>(memory))->prefetch(address, bytes, to_device != 0, stream); });
}

void lisa_kernels_managed_drop(DLManagedTensor* tensor, char* error, int64_t capacity) {
  told(error, capacity, [&] { tensor->deleter(tensor); });
}

void lisa_kernels_managed_live_bytes(void* memory, int64_t* bytes, char* error, int64_t capacity) {
  told(error, capacity, [&] { *bytes = (*static_cast<Handle*>(memory))->live_bytes(); });
}
}
