// The C interface: picks kernels by dtype and instruction set, and splits their blocks over threads.
#include "api.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef LISA_X86_64
#include <cpuid.h>
#endif

#include "kernels.h"
#include "parallel.h"

namespace lisa {
namespace {

constexpr int32_t kAbiVersion = 9;

#ifdef LISA_X86_64
// Not every compiler's __builtin_cpu_supports knows this one.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int32_t detect_instruction_set() {
#ifdef LISA_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return kAvx2;
#endif
  return kBaseline;
}

// Asked once: each question to the processor takes some microseconds on a virtual machine.
int32_t best_instruction_set() {
  static const int32_t best = detect_instruction_set();
  return best;
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

// What a thread takes at a time: long enough for the prefetchers, short enough for threads to end together.
constexpr int64_t kElementsPerPart = 1 << 18;

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// One thread's scratch. Each array starts on a cache line: vectors that straddle two cost a quarter of the speed.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t block_size)
      : length_(static_cast<size_t>(divide_up(block_size, kScratchRounding) * kScratchRounding)),
        bytes_(static_cast<char*>(::operator new(length_* kBytesPerElement, kCacheLine))) {}
  ~ScratchMemory() { ::operator delete(bytes_, kCacheLine); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  Scratch arrays() const {
    const auto floats = [this](size_t index) { return reinterpret_cast<float*>(bytes_ + 4 * length_ * index); };
    auto* codes = reinterpret_cast<uint8_t*>(bytes_ + 6 * 4 * length_);
    return {floats(0), floats(1), floats(2), reinterpret_cast<uint32_t*>(floats(3)),
            floats(4), floats(5), codes,     codes + length_};
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  static constexpr size_t kBytesPerElement = 6 * 4 + 2;
  size_t length_;
  char* bytes_;
};

// Where the parts of a piece of work begin.
enum class From { kFirst, kLast };

// Call run(index, begin, end, scratch) for the blocks of k tensors, in parts of equally many elements, which threads
// take as they become free: a core that others use too would else hold up the rest. A block belongs to the part in
// which it starts; no block is split, and no result depends on the parts, nor on which of them are first.
template <class Row, class Run>
void run_tensors(const Row* table, int64_t k, int64_t block_size, int64_t scratch_elements, int64_t threads,
                 const Run& run, From from = From::kFirst) {
  int64_t total = 0;
  for (int64_t index = 0; index < k; ++index) total += table[index].count;
  std::atomic<int64_t> next{0};
  run_parallel(total, threads, [&](int64_t team) {
    const ScratchMemory scratch(scratch_elements);
    const int64_t parts = team * std::max(int64_t{1}, total / (kElementsPerPart * team));
    const auto start_of = [&](int64_t part) { return total / parts * part + total % parts * part / parts; };
    int64_t index = 0, first = 0;  // a tensor, and its first element among those of all
    for (int64_t taken; (taken = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      const int64_t part = from == From::kLast ? parts - 1 - taken : taken;
      const int64_t part_begin = start_of(part), part_end = start_of(part + 1);
      while (index < k && first + table[index].count <= part_begin) first += table[index++].count;
      while (first > part_begin) first -= table[--index].count;
      int64_t own = first;
      for (int64_t i = index; i < k && own < part_end; own += table[i++].count) {
        const auto block_at = [&](int64_t element) {
          return divide_up(std::clamp(element - own, int64_t{0}, table[i].count), block_size);
        };
        const int64_t begin = block_at(part_begin), end = block_at(part_end);
        if (begin < end) run(i, begin, end, scratch.arrays());
      }
    }
  });
}

struct Count {
  int64_t count;
};

// In float64, rounded once, in the order of the reference.
Scalars scalars_of(const Hyper& hyper, int64_t step, float grad_scale) {
  // The root of the smallest normal float32, as in the reference.
  constexpr double kSmallestEps = 0x1p-63;
  const double t = static_cast<double>(step), rest1 = 1.0 - hyper.beta1, rest2 = 1.0 - hyper.beta2;
  const double root = std::sqrt((1.0 - std::pow(hyper.beta2, t)) / rest2);
  const double step_size = root * (hyper.lr * rest1) / (1.0 - std::pow(hyper.beta1, t));
  const auto rounded = [](double value) { return static_cast<float>(value); };
  return {rounded(hyper.beta1 / rest1),
          rounded(rest1),
          rounded(hyper.beta2 / rest2),
          rounded(rest2),
          rounded(std::max(root * hyper.eps, kSmallestEps)),
          rounded(1.0 - hyper.lr * hyper.weight_decay),
          rounded(step_size),
          grad_scale};
}

uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// The same for one tensor.
template <class Task>
void run_tensor(Kernel<Task> kernel, const Task& task, int64_t count, int64_t block_size, int64_t threads) {
  const Count row{count};
  run_tensors(&row, 1, block_size, 0, threads,
              [&](int64_t, int64_t begin, int64_t end, const Scratch& scratch) { kernel(task, scratch, begin, end); });
}

}  // namespace
}  // namespace lisa

using namespace lisa;

extern "C" {

int32_t lisa_kernels_abi_version() { return kAbiVersion; }

int32_t lisa_kernels_best_instruction_set() { return best_instruction_set(); }

void lisa_kernels_step_inputs(const int64_t* const* steps, const uint64_t* bases, int64_t clock, float grad_scale,
                              const Hyper* hyper, const int64_t* ends, int64_t groups, Scalars* scalars,
                              uint64_t* keys) {
  const uint64_t moved = static_cast<uint64_t>(clock) * 0xd1b54a32d192ed03u;
  for (int64_t group = 0, index = 0; group < groups; ++group) {
    for (const int64_t first = index; index < ends[group]; ++index) {
      // Nearly always all tensors of a group have taken equally many steps.
      const bool is_new = index == first || *steps[index] != *steps[index - 1];
      scalars[index] = is_new ? scalars_of(hyper[group], *steps[index], grad_scale) : scalars[index - 1];
      keys[index] = mix64(moved + bases[index]);
    }
  }
}

// Steps begin with the last gradients: those are what the caches still hold of the pass that measures all of them.
void lisa_kernels_adamw8(const AdamW8Row* table, int64_t k, const Scalars* scalars, const uint64_t* keys,
                         int64_t block_size, int32_t stochastic, int32_t threads, int32_t instruction_set) {
  const KernelTable& kernels = kernels_for(instruction_set);
  run_tensors(table, k, block_size, block_size, threads,
              [&](int64_t index, int64_t begin, int64_t end, const Scratch& scratch) {
                const AdamW8Row& row = table[index];
                const AdamW8Task task{row, scalars[index], keys[index], block_size};
                kernels.adamw8[row.weight_dtype][row.grad_dtype][stochastic != 0](task, scratch, begin, end);
              },
              From::kLast);
}

void lisa_kernels_adamw32(const AdamW32Row* table, int64_t k, const Scalars* scalars, const uint64_t* keys,
                          int32_t stochastic, int32_t threads, int32_t instruction_set) {
  const KernelTable& kernels = kernels_for(instruction_set);
  run_tensors(table, k, kSpan, 0, threads,
              [&](int64_t index, int64_t begin, int64_t end, const Scratch& scratch) {
                const AdamW32Row& row = table[index];
                const AdamW32Task task{row, scalars[index], keys[index]};
                kernels.adamw32[row.weight_dtype][row.grad_dtype][stochastic != 0](task, scratch, begin, end);
              },
              From::kLast);
}

void lisa_kernels_grad_norm(const GradRow* table, int64_t k, int32_t squares, double* out, int32_t threads,
                            int32_t instruction_set) {
  const KernelTable& kernels = kernels_for(instruction_set);
  std::vector<int64_t> first_span(static_cast<size_t>(k) + 1, 0);
  for (int64_t index = 0; index < k; ++index) {
    first_span[index + 1] = first_span[index] + divide_up(table[index].count, kNormSpan);
  }
  // One result per span, joined in their order: threads change nothing.
  std::vector<float> largest(static_cast<size_t>(first_span[k]));
  std::vector<double> sums(largest.size());
  run_tensors(table, k, kNormSpan, 0, threads, [&](int64_t index, int64_t begin, int64_t end, const Scratch& scratch) {
    const GradRow& row = table[index];
    const NormTask task{row, largest.data() + first_span[index], sums.data() + first_span[index]};
    kernels.grad_norm[row.dtype][squares != 0](task, scratch, begin, end);
  });
  out[0] = out[1] = 0;
  for (const float value : largest) {
    if (value > out[0] || value != value) out[0] = value;  // a NaN stays: nothing is greater
  }
  for (const double sum : sums) out[1] += sum;
}

void lisa_kernels_quantize_blockwise(const float* values, uint8_t* codes, float* absmax, int64_t count,
                                     int64_t block_size, int32_t is_signed, int32_t stochastic, uint64_t key,
                                     int32_t threads, int32_t instruction_set) {
  const QuantizeTask task{values, codes, absmax, count, block_size, key};
  const auto kernel = kernels_for(instruction_set).quantize[is_signed != 0][stochastic != 0];
  run_tensor(kernel, task, count, block_size, threads);
}

void lisa_kernels_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* values, int64_t count,
                                       int64_t block_size, int32_t is_signed, int32_t threads,
                                       int32_t instruction_set) {
  const DequantizeTask task{codes, absmax, values, count, block_size};
  run_tensor(kernels_for(instruction_set).dequantize[is_signed != 0], task, count, block_size, threads);
}

void lisa_kernels_quantize_resting(const void* values, uint8_t* codes, uint8_t* scales, int64_t count, int32_t dtype,
                                   int32_t four_bits, int32_t threads, int32_t instruction_set) {
  const RestTask task{values, codes, scales, count};
  run_tensor(kernels_for(instruction_set).rest[dtype][four_bits != 0], task, count, kRestGroup, threads);
}

void lisa_kernels_dequantize_resting(const uint8_t* codes, const uint8_t* scales, void* values, int64_t count,
                                     int32_t dtype, int32_t four_bits, int32_t threads, int32_t instruction_set) {
  const WakeTask task{codes, scales, values, count};
  run_tensor(kernels_for(instruction_set).wake[dtype][four_bits != 0], task, count, kRestGroup, threads);
}

void lisa_kernels_fold(void* weight, uint16_t* remainder, const float* update, int64_t count, int64_t first_element,
                       float decay, uint64_t key, int32_t weight_dtype, int32_t stochastic, int32_t threads,
                       int32_t instruction_set) {
  const FoldTask task{weight, remainder, update, count, first_element, key, decay};
  const KernelTable& kernels = kernels_for(instruction_set);
  const auto kernel = remainder == nullptr ? kernels.fold[weight_dtype][stochastic != 0] : kernels.fold_master;
  // Counted from the start of the span in which the band starts.
  run_tensor(kernel, task, count > 0 ? first_element % kSpan + count : 0, kSpan, threads);
}
}
