// cuBLAS: handles and settings; products are counted and compute nothing. A function whose arguments do not matter is
// declared without them, which the calling convention allows, so its headers stay out.
#include <cstdlib>
#include <cstring>

#include "simulation.h"

namespace {

int math_mode = 0, pointer_mode = 0;

// Larger than any of its descriptors, so that what torch reads of one is zero.
constexpr size_t HANDLE_BYTES = 512;

int make_handle(void** handle) {
  *handle = calloc(1, HANDLE_BYTES);
  return 0;
}

int drop_handle(void* handle) {
  free(handle);
  return 0;
}

int count(const char* name) {
  sim::Lock lock;
  sim::world().launches[name]++;
  return 0;
}

// Its field `state`, which tells success, is zero.
constexpr size_t HEURISTIC_BYTES = 64 + 2 * sizeof(size_t);

}  // namespace

extern "C" {

#define HANDLE(create, destroy)                             \
  int create(void** handle) { return make_handle(handle); } \
  int destroy(void* handle) { return drop_handle(handle); }
#define SETTING(name) \
  int name() { return 0; }
#define PRODUCT(name) \
  int name() { return count(#name); }

HANDLE(cublasCreate_v2, cublasDestroy_v2)
HANDLE(cublasLtMatmulDescCreate, cublasLtMatmulDescDestroy)
HANDLE(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreferenceDestroy)
HANDLE(cublasLtMatrixLayoutCreate, cublasLtMatrixLayoutDestroy)

SETTING(cublasSetStream_v2)
SETTING(cublasSetWorkspace_v2)
SETTING(cublasSetSmCountTarget)
SETTING(cublasLtMatmulDescSetAttribute)
SETTING(cublasLtMatmulPreferenceSetAttribute)
SETTING(cublasLtMatrixLayoutSetAttribute)

int cublasSetMathMode(void*, int mode) {
  math_mode = mode;
  return 0;
}

int cublasGetMathMode(void*, int* mode) {
  *mode = math_mode;
  return 0;
}

int cublasSetPointerMode_v2(void*, int mode) {
  pointer_mode = mode;
  return 0;
}

int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = pointer_mode;
  return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  memset(found, 0, HEURISTIC_BYTES);
  *count = 1;
  return 0;
}

PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasStrsm_v2)
PRODUCT(cublasDtrsm_v2)
PRODUCT(cublasStrsmBatched)
PRODUCT(cublasDtrsmBatched)
PRODUCT(cublasLtMatmul)

}  // extern "C"
