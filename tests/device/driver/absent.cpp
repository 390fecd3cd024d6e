// What the simulated device does not have: memory shared between processes, libraries of kernels that are compiled at
// run time, nodes that are put into a graph by hand. CUDA's own functions would look for a real driver.
namespace {

// cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED.
constexpr int NOT_SUPPORTED = 801;

}  // namespace

#define ABSENT(name) \
  int name() { return NOT_SUPPORTED; }

extern "C" {

ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaLibraryLoadData)
ABSENT(cudaLibraryGetKernel)
ABSENT(cudaLibraryUnload)
ABSENT(cudaGraphAddNode)
ABSENT(cudaGraphConditionalHandleCreate)
ABSENT(cuModuleLoad)
ABSENT(cuLinkCreate_v2)
ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete)
ABSENT(cuTensorMapEncodeTiled)
ABSENT(cuTensorMapEncodeIm2col)

}  // extern "C"
