// Launches: torch's kernels are counted and compute nothing, those that come as modules (Triton's) go to Python.
#include <dlfcn.h>

#include "simulation.h"

namespace sim {

namespace {

// What Python is told of the launch of a module's function: its handle, and where its arguments lie.
struct Launched {
  void* function;
  int64_t grid[3], threads, shared_bytes;
  void* stream;
  void** arguments;
};

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

std::unordered_map<const void*, std::string> kernels;
thread_local std::vector<Configuration> configurations;
void (*on_launch)(const Launched*) = nullptr;

const std::string& name_of(const void* kernel) {
  static const std::string unknown = "unknown kernel";
  auto found = kernels.find(kernel);
  return found == kernels.end() ? unknown : found->second;
}

CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

}  // namespace

cudaError_t count_launch(const std::string& name, dim3 grid, dim3 block, cudaStream_t stream) {
  Lock lock;
  uint64_t threads = uint64_t{block.x} * block.y * block.z;
  bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_fits || threads == 0 || threads > 1024) {
    fault("kernel " + name + " is launched with a grid of " + std::to_string(grid.x) + " × " + std::to_string(grid.y) +
          " × " + std::to_string(grid.z) + " of " + std::to_string(threads) + " threads");
    return failed(cudaErrorInvalidConfiguration);
  }
  if (stream_of(stream)->device != current_device)
    fault("kernel " + name + " is launched on a stream of another device");
  world().launches[name]++;
  return cudaSuccess;
}

}  // namespace sim

using namespace sim;

extern "C" {

void sim_listen_to_launches(void (*call)(const Launched*)) { on_launch = call; }

// What the compiler of CUDA puts around each kernel.
void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Lock lock;
  kernels[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  auto last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return count_launch(name_of(kernel), grid, block, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return count_launch(name_of(kernel), grid, block, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t,
                                        cudaStream_t stream) {
  return count_launch(name_of(kernel), grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  return count_launch(name_of(kernel), how->gridDim, how->blockDim, how->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = world().capability;
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// Modules: the image is not looked at, for Python knows what was compiled; a function is its name.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new std::string(name));
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = 0;
  if (which == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 64;
  if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  *blocks = 2;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 2;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction function, void** arguments, void**) {
  dim3 grid(how->gridDimX, how->gridDimY, how->gridDimZ), block(how->blockDimX, how->blockDimY, how->blockDimZ);
  auto& name = *reinterpret_cast<std::string*>(function);
  if (count_launch("triton " + name, grid, block, how->hStream) != cudaSuccess) {
    failed(cudaSuccess);
    return CUDA_ERROR_INVALID_VALUE;
  }
  Launched launched{function, {grid.x, grid.y, grid.z}, block.x, how->sharedMemBytes, stream_of(how->hStream),
                    arguments};
  if (on_launch) on_launch(&launched);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** arguments,
                        void** extra) {
  CUlaunchConfig how{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream, nullptr, 0};
  return cuLaunchKernelEx(&how, function, arguments, extra);
}

// What torch's own library looks up by name: ours, or a function that refuses.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  static void* self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  *function = dlsym(self, name);
  if (!*function) *function = dlsym(self, (std::string(name) + "_v2").c_str());
  if (!*function) *function = reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
