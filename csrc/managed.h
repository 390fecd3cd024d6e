// The C interface of CUDA's unified memory, called through ctypes by lisa_kernels/paging/managed.py.
//
// Every function writes into `error`, of `capacity` bytes, what went wrong, or an empty string. Any thread may call it.
// A change of any signature or meaning here raises kAbiVersion in api.cpp.
#pragma once

#include <cstdint>

#include "api.h"

struct DLManagedTensor;

extern "C" {

// Loads CUDA's driver library and takes hold of a device: *memory is then to be closed. Fails where host and device
// cannot share memory while the device computes.
LISA_EXPORT void lisa_kernels_managed_open(const char* driver, int32_t device, void** memory, char* error,
                                           int64_t capacity);

// Lets go of the device once the last of its tensors has died.
LISA_EXPORT void lisa_kernels_managed_close(void* memory, char* error, int64_t capacity);

// *tensor becomes a DLPack tensor uint8 [bytes], which lives on the host and is seen by the device: a tensor of the
// CPU, or with on_device of the device. Its deleter frees the memory, on any thread; where the driver refuses, the next
// call here tries once more.
LISA_EXPORT void lisa_kernels_managed_allocate(void* memory, int64_t bytes, int32_t on_device, DLManagedTensor** tensor,
                                               char* error, int64_t capacity);

// Moves pages to the device or back to the host, in the order of `stream`. Only speed depends on it.
LISA_EXPORT void lisa_kernels_managed_prefetch(void* memory, const void* address, int64_t bytes, int32_t to_device,
                                               void* stream, char* error, int64_t capacity);

// What a tensor's owner calls at its end; for tensors that found none.
LISA_EXPORT void lisa_kernels_managed_drop(DLManagedTensor* tensor, char* error, int64_t capacity);

// *bytes becomes what the driver has given and not got back.
LISA_EXPORT void lisa_kernels_managed_live_bytes(void* memory, int64_t* bytes, char* error, int64_t capacity);
}
