// The kernels, compiled once per instruction set; LISA_KERNEL_TABLE names the table that this compilation defines.
//
// A block is worked on by a few short loops that the compiler vectorises; what passes between them stays in the first
// cache. Each operation rounds separately and in the order of the reference, so results are equal bit for bit.
#include "kernels.h"

#include "numbers.h"

namespace lisa {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline uint32_t moment_bits_or_half(const uint32_t* words, int i, bool stochastic) {
  return stochastic ? moment_bits(words[i]) : kHalf;
}

inline uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }
inline uint32_t larger_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Bytes and words never meet in one loop: a loop over both would be vectorised by the width of the bytes, and the
// arithmetic on four times as many words would not fit the registers.
inline void widen(const uint8_t* __restrict codes, int count, uint32_t* __restrict wide) {
  for (int i = 0; i < count; ++i) wide[i] = codes[i];
}

inline void narrow(const uint32_t* __restrict wide, int count, uint8_t* __restrict codes) {
  for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
}

template <class Moment>
inline void decode_block(const uint32_t* __restrict wide, float absmax, int count, float* __restrict values) {
  const float scale = decode_scale(absmax);
  for (int i = 0; i < count; ++i) values[i] = decode(Moment{}, wide[i], scale);
}

// As integers, magnitudes order as floats do, and a NaN is the largest: the maximum keeps it, as torch's does.
inline float block_absmax(const float* __restrict values, int count) {
  uint32_t largest = kSmallestAbsmax;
  for (int i = 0; i < count; ++i) largest = larger_bits(magnitude(values[i]), largest);
  return float_of(largest);
}

// The codes replace the words that round them.
template <class Moment, bool stochastic>
inline void encode_block(const float* __restrict values, float absmax, uint32_t* __restrict words, int count) {
  const float scale = encode_scale(absmax);
  for (int i = 0; i < count; ++i) {
    words[i] = encode(Moment{}, values[i], scale, moment_bits_or_half(words, i, stochastic));
  }
}

// Only a bfloat16 weight is ever rounded stochastically.
template <class Weight, bool stochastic>
constexpr bool kStochasticWeight = false;
template <bool stochastic>
constexpr bool kStochasticWeight<BFloat16, stochastic> = stochastic;

template <class Weight, bool stochastic>
inline typename Weight::Storage round_weight(float value, uint32_t first, uint32_t second) {
  if constexpr (kStochasticWeight<Weight, stochastic>) {
    return Weight::store_stochastic(value, weight_bits(first, second));
  } else {
    (void)first, (void)second;
    return Weight::store(value);
  }
}

// The new weight; `m` and `v` become the new moments.
template <class Weight, class Grad>
inline float updated(typename Weight::Storage weight, typename Grad::Storage grad, float& m, float& v,
                     const Scalars& s) {
  const float g = Grad::load(grad) * s.grad_scale;
  m = m * s.beta1 + g * s.one_minus_beta1;
  v = v * s.beta2 + (g * g) * s.one_minus_beta2;
  const float denominator = __builtin_sqrtf(v) / s.root_correction2 + s.eps;
  return Weight::load(weight) * s.decay - (m / denominator) * s.step_size;
}

struct Absmax {
  float m, v;
};

// `first` and `second` hold the codes of m and v and receive the random words.
template <class Weight, class Grad, bool stochastic>
inline Absmax update_block8(typename Weight::Storage* __restrict weight, const typename Grad::Storage* __restrict grad,
                            float* __restrict m, float* __restrict v, uint32_t* __restrict first,
                            uint32_t* __restrict second, int count, const Scalars scalars, const Words words,
                            const Absmax old) {
  const float m_scale = decode_scale(old.m), v_scale = decode_scale(old.v);
  uint32_t largest_m = kSmallestAbsmax, largest_v = kSmallestAbsmax;
  for (int i = 0; i < count; ++i) {
    float new_m = decode(FirstMoment{}, first[i], m_scale), new_v = decode(SecondMoment{}, second[i], v_scale);
    const float value = updated<Weight, Grad>(weight[i], grad[i], new_m, new_v, scalars);
    m[i] = new_m;
    v[i] = new_v;
    largest_m = larger_bits(magnitude(new_m), largest_m);
    largest_v = larger_bits(magnitude(new_v), largest_v);
    if (stochastic) first[i] = words.first(i), second[i] = words.second(first[i]);
    weight[i] = round_weight<Weight, stochastic>(value, first[i], second[i]);
  }
  return {float_of(largest_m), float_of(largest_v)};
}

template <class Weight, class Grad, bool stochastic>
void adamw8(const AdamW8Task& task, const Scratch& scratch, int64_t begin, int64_t end) {
  auto* weight = static_cast<typename Weight::Storage*>(task.weight);
  const auto* grad = static_cast<const typename Grad::Storage*>(task.grad);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * task.block_size;
    const int count = static_cast<int>(smaller(task.block_size, task.count - start));
    widen(task.m_codes + start, count, scratch.first);
    widen(task.v_codes + start, count, scratch.second);
    const Absmax absmax = update_block8<Weight, Grad, stochastic>(
        weight + start, grad + start, scratch.m, scratch.v, scratch.first, scratch.second, count, task.scalars,
        Words(task.key, start), {task.m_absmax[block], task.v_absmax[block]});
    encode_block<FirstMoment, stochastic>(scratch.m, absmax.m, scratch.first, count);
    encode_block<SecondMoment, stochastic>(scratch.v, absmax.v, scratch.second, count);
    narrow(scratch.first, count, task.m_codes + start);
    narrow(scratch.second, count, task.v_codes + start);
    task.m_absmax[block] = absmax.m;
    task.v_absmax[block] = absmax.v;
  }
}

template <class Weight, class Grad, bool stochastic>
inline void update_span32(typename Weight::Storage* __restrict weight, const typename Grad::Storage* __restrict grad,
                          float* __restrict m, float* __restrict v, int count, const Scalars scalars,
                          const Words words) {
  for (int i = 0; i < count; ++i) {
    const float value = updated<Weight, Grad>(weight[i], grad[i], m[i], v[i], scalars);
    const uint32_t first = words.first(i);
    weight[i] = round_weight<Weight, stochastic>(value, first, words.second(first));
  }
}

template <class Weight, class Grad, bool stochastic>
void adamw32(const AdamW32Task& task, const Scratch&, int64_t begin, int64_t end) {
  auto* weight = static_cast<typename Weight::Storage*>(task.weight);
  const auto* grad = static_cast<const typename Grad::Storage*>(task.grad);
  for (int64_t start = begin * kSpan; start < smaller(end * kSpan, task.count); start += kSpan) {
    const int count = static_cast<int>(smaller(kSpan, task.count - start));
    update_span32<Weight, Grad, stochastic>(weight + start, grad + start, task.m + start, task.v + start, count,
                                            task.scalars, Words(task.key, start));
  }
}

template <class Moment, bool stochastic>
void quantize(const QuantizeTask& task, const Scratch& scratch, int64_t begin, int64_t end) {
  uint32_t* words = Moment::kOffset == FirstMoment::kOffset ? scratch.first : scratch.second;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * task.block_size;
    const int count = static_cast<int>(smaller(task.block_size, task.count - start));
    if (stochastic) fill_words(Words(task.key, start), count, scratch.first, scratch.second);
    task.absmax[block] = block_absmax(task.values + start, count);
    encode_block<Moment, stochastic>(task.values + start, task.absmax[block], words, count);
    narrow(words, count, task.codes + start);
  }
}

template <class Moment>
void dequantize(const DequantizeTask& task, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * task.block_size;
    const int count = static_cast<int>(smaller(task.block_size, task.count - start));
    widen(task.codes + start, count, scratch.first);
    decode_block<Moment>(scratch.first, task.absmax[block], count, task.values + start);
  }
}

template <class Weight, bool stochastic>
inline void fold_span(typename Weight::Storage* __restrict weight, const float* __restrict update, int count,
                      float decay, const Words words) {
  for (int i = 0; i < count; ++i) {
    const float value = Weight::load(weight[i]) * decay + update[i];
    const uint32_t first = words.first(i);
    weight[i] = round_weight<Weight, stochastic>(value, first, words.second(first));
  }
}

// Spans are aligned in the whole tensor, not in this band of it, so that none crosses a multiple of 2^32.
template <class Weight, bool stochastic>
void fold(const FoldTask& task, const Scratch&, int64_t begin, int64_t end) {
  auto* weight = static_cast<typename Weight::Storage*>(task.weight);
  const int64_t offset = task.first_element % kSpan;
  for (int64_t span = begin; span < end; ++span) {
    const int64_t start = larger(0, span * kSpan - offset);
    const int count = static_cast<int>(smaller((span + 1) * kSpan - offset, task.count) - start);
    fold_span<Weight, stochastic>(weight + start, task.update + start, count, task.decay,
                                  Words(task.key, task.first_element + start));
  }
}

#define LISA_BOTH(kernel, ...) {kernel<__VA_ARGS__, false>, kernel<__VA_ARGS__, true>}
#define LISA_GRADIENTS(kernel, weight) \
  {LISA_BOTH(kernel, weight, Float32), LISA_BOTH(kernel, weight, BFloat16), LISA_BOTH(kernel, weight, Float16)}
#define LISA_WEIGHTS(kernel) \
  {LISA_GRADIENTS(kernel, Float32), LISA_GRADIENTS(kernel, BFloat16), LISA_GRADIENTS(kernel, Float16)}

}  // namespace

extern const KernelTable LISA_KERNEL_TABLE = {
    LISA_WEIGHTS(adamw8),
    LISA_WEIGHTS(adamw32),
    {LISA_BOTH(quantize, SecondMoment), LISA_BOTH(quantize, FirstMoment)},
    {dequantize<SecondMoment>, dequantize<FirstMoment>},
    {LISA_BOTH(fold, Float32), LISA_BOTH(fold, BFloat16), LISA_BOTH(fold, Float16)},
};

}  // namespace lisa
