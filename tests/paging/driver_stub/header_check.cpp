// Compiled, never run: what managed.cpp takes for CUDA's numbers and functions is what CUDA's own header says.
#include <cuda.h>

#include <array>

#include "managed.cpp"

// The header's names stand for newer functions; the older forms are not declared.
template <class R, class... Arguments>
constexpr auto sizes(R (*)(Arguments...)) {
  return std::array<size_t, sizeof...(Arguments) + 1>{sizeof(R), sizeof(Arguments)...};
}

#define SAME_CALL(member, function) \
  static_assert(sizes(decltype(lisa::Driver::member){}) == sizes(decltype(&function){}), #function)

SAME_CALL(init, cuInit);
SAME_CALL(device_get, cuDeviceGet);
SAME_CALL(device_attribute, cuDeviceGetAttribute);
SAME_CALL(context_retain, cuDevicePrimaryCtxRetain);
SAME_CALL(context_release, cuDevicePrimaryCtxRelease);
SAME_CALL(context_push, cuCtxPushCurrent);
SAME_CALL(context_pop, cuCtxPopCurrent);
SAME_CALL(allocate, cuMemAllocManaged);
SAME_CALL(synchronize, cuCtxSynchronize);
SAME_CALL(free, cuMemFree);
SAME_CALL(error_string, cuGetErrorString);
SAME_CALL(prefetch_v2, cuMemPrefetchAsync);
SAME_CALL(advise_v2, cuMemAdvise);

namespace lisa {
namespace {
static_assert(kOnDevice == CU_MEM_LOCATION_TYPE_DEVICE && kOnHost == CU_MEM_LOCATION_TYPE_HOST);
static_assert(kHostAsDevice == CU_DEVICE_CPU);
static_assert(kManagedMemory == CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY);
static_assert(kConcurrentManagedAccess == CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS);
static_assert(kSeenByAllStreams == CU_MEM_ATTACH_GLOBAL);
static_assert(kPreferredLocation == CU_MEM_ADVISE_SET_PREFERRED_LOCATION);
static_assert(kAccessedBy == CU_MEM_ADVISE_SET_ACCESSED_BY);
static_assert(offsetof(CUmemLocation, type) == offsetof(Location, type));
static_assert(offsetof(CUmemLocation, id) == offsetof(Location, id));
}  // namespace
}  // namespace lisa
