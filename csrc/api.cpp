// The C interface: picks a kernel by dtype and instruction set, and splits its blocks over threads.
#include "api.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace lisa {
namespace {

constexpr int32_t kAbiVersion = 1;

int32_t best_instruction_set() {
#ifdef LISA_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kBaseline;
}

const KernelTable& kernels_for(int32_t instruction_set) {
#ifdef LISA_X86_64
  const int32_t best = best_instruction_set();
  const int32_t chosen = instruction_set < 0 ? best : std::min(instruction_set, best);
  if (chosen == kAvx512) return kernels_avx512;
  if (chosen == kAvx2) return kernels_avx2;
#endif
  (void)instruction_set;
  return kernels_baseline;
}

uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// The key of one parameter at one step, as lisa_kernels/ops/random_bits.py defines it.
uint64_t random_key(const Stream& stream) {
  const uint64_t seed = static_cast<uint64_t>(stream.seed), parameter = static_cast<uint64_t>(stream.parameter);
  const uint64_t base = mix64(mix64(seed) + parameter * 0x9e3779b97f4a7c15u);
  return mix64(static_cast<uint64_t>(stream.clock) * 0xd1b54a32d192ed03u + base);
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

constexpr size_t kCacheLine = 64;

// Two arrays of `length` values, each starting on a cache line: vectors that straddle two cost a quarter of the speed.
template <class T>
class ArrayPair {
 public:
  explicit ArrayPair(int64_t length)
      : stride_(static_cast<size_t>(divide_up(length * sizeof(T), kCacheLine)) * kCacheLine / sizeof(T)),
        values_(static_cast<T*>(::operator new(2 * stride_ * sizeof(T), std::align_val_t{kCacheLine}))) {}
  T* first() const { return values_.get(); }
  T* second() const { return values_.get() + stride_; }

 private:
  struct Delete {
    void operator()(T* values) const { ::operator delete(values, std::align_val_t{kCacheLine}); }
  };
  size_t stride_;
  std::unique_ptr<T, Delete> values_;
};

// Run the kernel on this thread's blocks, with scratch of its own for one block.
template <class Task>
void run_blocks(Kernel<Task> kernel, const Task& task, int64_t scratch_elements, int64_t begin, int64_t end) {
  const ArrayPair<float> moments(scratch_elements);
  const ArrayPair<uint32_t> words(scratch_elements);
  kernel(task, {moments.first(), moments.second(), words.first(), words.second()}, begin, end);
}

template <class Task>
void run(Kernel<Task> kernel, const Task& task, int64_t blocks, int64_t scratch_elements, int32_t threads) {
  if (blocks <= 0) return;
  scratch_elements = std::min(scratch_elements, task.count);
#ifdef _OPENMP
  // Below this many elements a thread's start costs more than its work.
  constexpr int64_t kElementsPerThread = 1 << 14;
  const int wanted = static_cast<int>(std::min({int64_t{threads}, blocks, task.count / kElementsPerThread}));
  if (wanted > 1) {
#pragma omp parallel num_threads(wanted)
    {
      // The runtime may give fewer threads than were asked for.
      const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
      run_blocks(kernel, task, scratch_elements, blocks * member / team, blocks * (member + 1) / team);
    }
    return;
  }
#endif
  (void)threads;
  run_blocks(kernel, task, scratch_elements, 0, blocks);
}

}  // namespace
}  // namespace lisa

using namespace lisa;

extern "C" {

int32_t lisa_kernels_abi_version() { return kAbiVersion; }

int32_t lisa_kernels_best_instruction_set() { return best_instruction_set(); }

void lisa_kernels_adamw8(void* weight, const void* grad, uint8_t* m_codes, float* m_absmax, uint8_t* v_codes,
                         float* v_absmax, int64_t count, int64_t block_size, const Scalars* scalars,
                         const Stream* stream, int32_t weight_dtype, int32_t grad_dtype, int32_t stochastic,
                         int32_t threads, int32_t instruction_set) {
  const AdamW8Task task{weight,  grad, m_codes, m_absmax, v_codes, v_absmax, count, block_size, random_key(*stream),
                        *scalars};
  const auto kernel = kernels_for(instruction_set).adamw8[weight_dtype][grad_dtype][stochastic != 0];
  run(kernel, task, divide_up(count, block_size), block_size, threads);
}

void lisa_kernels_adamw32(void* weight, const void* grad, float* m, float* v, int64_t count, const Scalars* scalars,
                          const Stream* stream, int32_t weight_dtype, int32_t grad_dtype, int32_t stochastic,
                          int32_t threads, int32_t instruction_set) {
  const AdamW32Task task{weight, grad, m, v, count, random_key(*stream), *scalars};
  const auto kernel = kernels_for(instruction_set).adamw32[weight_dtype][grad_dtype][stochastic != 0];
  run(kernel, task, divide_up(count, kSpan), 0, threads);
}

void lisa_kernels_quantize_blockwise(const float* values, uint8_t* codes, float* absmax, int64_t count,
                                     int64_t block_size, int32_t is_signed, int32_t stochastic, uint64_t key,
                                     int32_t threads, int32_t instruction_set) {
  const QuantizeTask task{values, codes, absmax, count, block_size, key};
  const auto kernel = kernels_for(instruction_set).quantize[is_signed != 0][stochastic != 0];
  run(kernel, task, divide_up(count, block_size), block_size, threads);
}

void lisa_kernels_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* values, int64_t count,
                                       int64_t block_size, int32_t is_signed, int32_t threads,
                                       int32_t instruction_set) {
  const DequantizeTask task{codes, absmax, values, count, block_size};
  const auto kernel = kernels_for(instruction_set).dequantize[is_signed != 0];
  run(kernel, task, divide_up(count, block_size), block_size, threads);
}

void lisa_kernels_fold(void* weight, const float* update, int64_t count, int64_t first_element, float decay,
                       const Stream* stream, int32_t weight_dtype, int32_t stochastic, int32_t threads,
                       int32_t instruction_set) {
  const FoldTask task{weight, update, count, first_element, random_key(*stream), decay};
  const auto kernel = kernels_for(instruction_set).fold[weight_dtype][stochastic != 0];
  const int64_t spans = count > 0 ? divide_up(first_element % kSpan + count, kSpan) : 0;
  run(kernel, task, spans, 0, threads);
}
}
