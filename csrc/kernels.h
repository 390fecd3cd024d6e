// The tasks that api.cpp hands to a kernel, and the table of kernels that each instruction set provides.
//
// Only plain data lives here: a function shared between files compiled for different instruction sets could be linked
// in its AVX-512 form and called on a machine without AVX-512.
#pragma once

#include "api.h"

namespace lisa {

// Elements of a span: what the kernels without blocks work on at a time, aligned in the whole tensor.
constexpr int64_t kSpan = 1024;

// Room for one block (or span) of float32 moments and random words; each array is as long as the block.
struct Scratch {
  float *m, *v;
  uint32_t *first, *second;
};

struct AdamW8Task {
  void* weight;
  const void* grad;
  uint8_t* m_codes;
  float* m_absmax;
  uint8_t* v_codes;
  float* v_absmax;
  int64_t count, block_size;
  uint64_t key;
  Scalars scalars;
};

struct AdamW32Task {
  void* weight;
  const void* grad;
  float *m, *v;
  int64_t count;
  uint64_t key;
  Scalars scalars;
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

struct FoldTask {
  void* weight;
  const float* update;
  int64_t count, first_element;
  uint64_t key;
  float decay;
};

// Each kernel does the blocks [begin, end) of its task; for AdamW32Task and FoldTask a block is a span of the tensor.
template <class Task>
using Kernel = void (*)(const Task&, const Scratch&, int64_t begin, int64_t end);

struct KernelTable {
  Kernel<AdamW8Task> adamw8[3][3][2];    // [weight dtype][gradient dtype][stochastic]
  Kernel<AdamW32Task> adamw32[3][3][2];  // likewise
  Kernel<QuantizeTask> quantize[2][2];   // [signed][stochastic]
  Kernel<DequantizeTask> dequantize[2];  // [signed]
  Kernel<FoldTask> fold[3][2];           // [weight dtype][stochastic]
};

extern const KernelTable kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace lisa
