// The tasks that api.cpp hands to a kernel, and the table of kernels that each instruction set provides.
//
// Only plain data lives here: a function shared between files compiled for different instruction sets could be linked
// in its AVX-512 form and called on a machine without AVX-512.
#pragma once

#include "api.h"

namespace lisa {

// Elements of a span: what the kernels without blocks work on at a time. It divides 2^32, so that no span crosses a
// multiple of that when spans are aligned in the whole tensor.
constexpr int64_t kSpan = 1024;
constexpr int64_t kNormSpan = 1 << 16;

// Room for one block, each array rounded up to kScratchRounding elements: fresh moments, roots, hashes of random
// numbers, and a copy of a block that ends within a vector.
struct Scratch {
  float *m, *v, *roots;
  uint32_t* hashes;
  void *weight, *grad;
  uint8_t *m_codes, *v_codes;
};
constexpr int64_t kScratchRounding = 64;

struct AdamW8Task {
  AdamW8Row row;
  Scalars scalars;
  uint64_t key;
  int64_t block_size;
};

struct AdamW32Task {
  AdamW32Row row;
  Scalars scalars;
  uint64_t key;
};

struct NormTask {
  GradRow row;
  // One per span of the tensor.
  float* largest;
  double* squares;
};

struct QuantizeTask {
  const float* values;
  uint8_t* codes;
  float* absmax;
  int64_t count, block_size;
  uint64_t key;
};

struct DequantizeTask {
  const uint8_t* codes;
  const float* absmax;
  float* values;
  int64_t count, block_size;
};

// Of a weight at rest: elements that share a scale, and those whose scales share a record.
constexpr int64_t kRestBlock = 64;
constexpr int64_t kBlocksOfGroup = 32;
constexpr int64_t kRestGroup = kRestBlock * kBlocksOfGroup;

struct RestTask {
  const void* values;
  uint8_t* codes;
  uint8_t* scales;
  int64_t count;
};

struct WakeTask {
  const uint8_t* codes;
  const uint8_t* scales;
  void* values;
  int64_t count;
};

struct FoldTask {
  void* weight;
  uint16_t* remainder;  // null if the weight is all there is
  const float* update;
  int64_t count, first_element;
  uint64_t key;
  float decay;
};

// Each kernel does the blocks [begin, end) of its task; where a task has no block size, a block is a span.
template <class Task>
using Kernel = void (*)(const Task&, const Scratch&, int64_t begin, int64_t end);

struct KernelTable {
  Kernel<AdamW8Task> adamw8[3][3][2];    // [weight dtype][gradient dtype][stochastic]
  Kernel<AdamW32Task> adamw32[3][3][2];  // likewise
  Kernel<NormTask> grad_norm[3][2];      // [dtype][squares]
  Kernel<QuantizeTask> quantize[2][2];   // [signed][stochastic]
  Kernel<DequantizeTask> dequantize[2];  // [signed]
  Kernel<RestTask> rest[3][2];           // [dtype][four bits]
  Kernel<WakeTask> wake[3][2];           // likewise
  Kernel<FoldTask> fold[3][2];           // [weight dtype][stochastic]
  Kernel<FoldTask> fold_master;          // of a bfloat16 weight with a remainder
};

extern const KernelTable kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace lisa
