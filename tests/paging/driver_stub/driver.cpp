// A stand-in for CUDA's driver library: memory is the host's, every call is counted and written down, and any call can
// be told to fail. Built by the test that loads it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int kInvalidValue = 1, kNotInitialized = 3, kInvalidContext = 201, kTold = 999;
constexpr int kEveryCall = -1;

std::mutex mutex;
bool initialized = false;
int retained = 0;
thread_local int current = 0;
std::map<std::string, int> calls;
std::map<std::string, int> until_failure;
std::map<int, int> attributes;
std::map<uintptr_t, size_t> live;
std::string log_text;
int context_of_device;

// Counts one call, writes it down, and says whether it fails.
bool fails(const std::string& name, const std::string& words = "") {
  ++calls[name];
  log_text += name + (words.empty() ? "" : " " + words) + "\n";
  const auto told = until_failure.find(name);
  if (told == until_failure.end()) return false;
  if (told->second == kEveryCall) return true;
  if (--told->second > 0) return false;
  until_failure.erase(told);
  return true;
}

bool is_live(unsigned long long address, size_t bytes) {
  const auto next = live.upper_bound(address);
  if (next == live.begin()) return false;
  const auto block = std::prev(next);
  return address + bytes <= block->first + block->second;
}

std::string place_of(int device) { return device < 0 ? "host" : "device " + std::to_string(device); }

struct Location {
  int type, id;
};

std::string place_of(Location location) { return location.type == 2 ? "host" : place_of(location.id); }

int advise(const char* name, unsigned long long address, size_t bytes, int advice, const std::string& place) {
  const std::lock_guard<std::mutex> lock(mutex);
  const char* words = advice == 3 ? "prefers " : advice == 5 ? "accessed by " : "? ";
  if (fails(name, words + place)) return kTold;
  return is_live(address, bytes) ? 0 : kInvalidValue;
}

int prefetch(const char* name, unsigned long long address, size_t bytes, const std::string& place) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails(name, std::to_string(bytes) + " to " + place)) return kTold;
  if (current == 0) return kInvalidContext;
  return is_live(address, bytes) ? 0 : kInvalidValue;
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuInit")) return kTold;
  initialized = true;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuDeviceGet")) return kTold;
  if (!initialized) return kNotInitialized;
  *device = ordinal;
  return ordinal == 0 ? 0 : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuDeviceGetAttribute")) return kTold;
  const auto found = attributes.find(attribute);
  *value = found == attributes.end() ? 1 : found->second;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuDevicePrimaryCtxRetain")) return kTold;
  ++retained;
  *context = &context_of_device;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuDevicePrimaryCtxRelease_v2")) return kTold;
  --retained;
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuCtxPushCurrent_v2")) return kTold;
  if (context != &context_of_device || retained == 0) return kInvalidContext;
  ++current;
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuCtxPopCurrent_v2")) return kTold;
  if (current == 0) return kInvalidContext;
  --current;
  *context = &context_of_device;
  return 0;
}

int cuMemAllocManaged(unsigned long long* address, size_t bytes, unsigned) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuMemAllocManaged", std::to_string(bytes))) return kTold;
  if (current == 0) return kInvalidContext;
  if (bytes == 0) return kInvalidValue;
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) return 2;
  // Nobody may count on fresh memory's contents.
  std::memset(memory, 0xAB, bytes);
  *address = reinterpret_cast<unsigned long long>(memory);
  live[*address] = bytes;
  return 0;
}

int cuCtxSynchronize() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuCtxSynchronize")) return kTold;
  return current == 0 ? kInvalidContext : 0;
}

int cuMemFree_v2(unsigned long long address) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuMemFree_v2")) return kTold;
  if (current == 0) return kInvalidContext;
  if (live.erase(address) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(address));
  return 0;
}

int cuMemAdvise_v2(unsigned long long address, size_t bytes, int advice, Location location) {
  return advise("cuMemAdvise_v2", address, bytes, advice, place_of(location));
}

int cuMemAdvise(unsigned long long address, size_t bytes, int advice, int device) {
  return advise("cuMemAdvise", address, bytes, advice, place_of(device));
}

int cuMemPrefetchAsync_v2(unsigned long long address, size_t bytes, Location location, unsigned, void*) {
  return prefetch("cuMemPrefetchAsync_v2", address, bytes, place_of(location));
}

int cuMemPrefetchAsync(unsigned long long address, size_t bytes, int device, void*) {
  return prefetch("cuMemPrefetchAsync", address, bytes, place_of(device));
}

int cuGetErrorString(int error, const char** words) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuGetErrorString")) return kTold;
  *words = error == kTold ? "told to fail" : error == 101 ? "invalid device ordinal" : "misused";
  return 0;
}

// What the test asks and tells.

// The n-th call of a function from now on fails, or with -1 every call, or with 0 none.
void stub_fail(const char* name, int nth) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (nth == 0) {
    until_failure.erase(name);
  } else {
    until_failure[name] = nth;
  }
}

void stub_set_attribute(int attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  attributes[attribute] = value;
}

int stub_calls(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return calls[name];
}

int stub_live() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(live.size());
}

int stub_retained() {
  const std::lock_guard<std::mutex> lock(mutex);
  return retained;
}

int stub_current() { return current; }

// All calls so far, one a line.
const char* stub_log() {
  const std::lock_guard<std::mutex> lock(mutex);
  return log_text.c_str();
}
}
