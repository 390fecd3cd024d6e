// The C interface of the CPU kernels, called through ctypes by lisa_kernels/native.py.
//
// Every tensor is dense, and its pointer valid for the counts given; the caller checks. A change of any signature or
// meaning here raises kAbiVersion. `threads` is an upper limit; the results are the same for every value of it.
// `instruction_set` is one of lisa::InstructionSet; one that this machine lacks means the best that it has.
#pragma once

#include <cstdint>

#define LISA_EXPORT __attribute__((visibility("default")))

namespace lisa {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Rows of the tables: one per tensor, every field 64 bits wide, so that a table is an int64 [k, fields] array.
// first_element: the index of weight[0] in the whole tensor that this one is a part of, for the random numbers; a multiple
// of the block size, or of 4 with float32 moments, of which none is beyond the next multiple of 2^32.
struct AdamW8Row {
  void* weight;
  const void* grad;
  uint8_t* m_codes;
  float* m_absmax;
  uint8_t* v_codes;
  float* v_absmax;
  int64_t count, weight_dtype, grad_dtype, first_element;
};

struct AdamW32Row {
  void* weight;
  const void* grad;
  float *m, *v;
  int64_t count, weight_dtype, grad_dtype, first_element;
};

struct GradRow {
  const void* grad;
  int64_t count, dtype;
};

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay;
};

// Scalars of one AdamW step, already rounded to float32 as the definition rounds them: float [k, 8].
struct Scalars {
  float carry1, one_minus_beta1;  // carry: beta / (1 - beta)
  float carry2, one_minus_beta2;
  float eps;        // times root = sqrt((1 - beta2^t) / (1 - beta2))
  float decay;      // 1 - lr * weight_decay
  float step_size;  // lr * root * (1 - beta1) / (1 - beta1^t)
  float grad_scale;
};

}  // namespace lisa

extern "C" {

LISA_EXPORT int32_t lisa_kernels_abi_version();

LISA_EXPORT int32_t lisa_kernels_best_instruction_set();

// The scalars and random keys of one AdamW step of k tensors, as the reference's step_inputs defines them. steps: where
// each tensor's count of updates is, this one included; ends: where the tensors of each of the groups end.
LISA_EXPORT void lisa_kernels_step_inputs(const int64_t* const* steps, const uint64_t* bases, int64_t clock,
                                          float grad_scale, const lisa::Hyper* hyper, const int64_t* ends,
                                          int64_t groups, lisa::Scalars* scalars, uint64_t* keys);

// One AdamW step on k tensors whose moments are 8-bit codes with one absmax per `block_size` elements.
LISA_EXPORT void lisa_kernels_adamw8(const lisa::AdamW8Row* table, int64_t k, const lisa::Scalars* scalars,
                                     const uint64_t* keys, int64_t block_size, int32_t stochastic, int32_t threads,
                                     int32_t instruction_set);

// One AdamW step on k tensors with float32 moments.
LISA_EXPORT void lisa_kernels_adamw32(const lisa::AdamW32Row* table, int64_t k, const lisa::Scalars* scalars,
                                      const uint64_t* keys, int32_t stochastic, int32_t threads,
                                      int32_t instruction_set);

// out[0] <- the largest magnitude in k tensors, a NaN if there is one; out[1] <- the sum of squares, or 0.
LISA_EXPORT void lisa_kernels_grad_norm(const lisa::GradRow* table, int64_t k, int32_t squares, double* out,
                                        int32_t threads, int32_t instruction_set);

// Encode `count` float32 values; `key` keys the random numbers of `stochastic` rounding.
LISA_EXPORT void lisa_kernels_quantize_blockwise(const float* values, uint8_t* codes, float* absmax, int64_t count,
                                                 int64_t block_size, int32_t is_signed, int32_t stochastic,
                                                 uint64_t key, int32_t threads, int32_t instruction_set);

LISA_EXPORT void lisa_kernels_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* values,
                                                   int64_t count, int64_t block_size, int32_t is_signed,
                                                   int32_t threads, int32_t instruction_set);

// Encode `count` weights of a dtype in 8 bits, or with `four_bits` two to a byte, with a record of scales, 36
// bytes, for each 2048.
LISA_EXPORT void lisa_kernels_quantize_resting(const void* values, uint8_t* codes, uint8_t* scales, int64_t count,
                                               int32_t dtype, int32_t four_bits, int32_t threads,
                                               int32_t instruction_set);

LISA_EXPORT void lisa_kernels_dequantize_resting(const uint8_t* codes, const uint8_t* scales, void* values,
                                                 int64_t count, int32_t dtype, int32_t four_bits, int32_t threads,
                                                 int32_t instruction_set);

// weight <- decay * weight + update, rounded once. `first_element`: the index of weight[0] in the whole tensor, a
// multiple of 4. `remainder`: null, or the lower halves of the float32 masters of which a bfloat16 weight holds the
// upper ones; these are then what is updated, and nothing is rounded at random.
LISA_EXPORT void lisa_kernels_fold(void* weight, uint16_t* remainder, const float* update, int64_t count,
                                   int64_t first_element, float decay, uint64_t key, int32_t weight_dtype,
                                   int32_t stochastic, int32_t threads, int32_t instruction_set);
}
