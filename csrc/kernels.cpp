// The kernels, compiled once per instruction set; LISA_KERNEL_TABLE names the table that this compilation defines.
#include "kernels.h"

#include "adamw.h"
#include "resting.h"
#include "units.h"

namespace lisa {
namespace {

template <class Grad, bool squares>
void grad_norm(const NormTask& task, const Scratch&, int64_t begin, int64_t end) {
  const auto* grads = static_cast<const typename Grad::Storage*>(task.row.grad);
  for (int64_t span = begin; span < end; ++span) {
    const auto* grad = grads + span * kNormSpan;
    Words largest{};
    Doubles sums[2] = {};
    const auto add = [&](const typename Grad::Storage* unit) {
      for (int i = 0; i < kUnit; i += kLanes) {
        const Floats g = Grad::load(unit + i);
        largest = maximum(largest, magnitude(g));
        if (squares) {
          const Doubles first = first_doubles(g), second = second_doubles(g);
          sums[0] += first * first;
          sums[1] += second * second;
        }
      }
    };
    const int count = static_cast<int>(smaller(kNormSpan, task.row.count - span * kNormSpan));
    // A core reads faster from a few places at once than from one.
    constexpr int kStreams = 4;
    const int stream = count / (kStreams * kUnit) * kUnit;
    for (int unit = 0; unit < stream; unit += kUnit) {
      for (int place = 0; place < kStreams; ++place) add(grad + place * stream + unit);
    }
    grad += kStreams * stream;
    for_units(count - kStreams * stream, [&](int unit, int rest) {
      rest == 0 ? add(grad + unit) : add(Padded<typename Grad::Storage>(grad + unit, rest).values);
    });
    task.largest[span] = scalar_of(largest_of(largest));
    task.squares[span] = sum_of(sums[0] + sums[1]);
  }
}

template <bool is_signed, bool stochastic>
LISA_INLINE Bytes encode_unit(const float* from, Floats scale, RandomHashes& random, const RandomConstants& constants) {
  Unit unit{{}, {}, scale};
  const UnitWords hashes = stochastic ? spread(random.next()) : UnitWords{};
  for (int j = 0; j < kVectors; ++j) {
    unit.values[j] = load<Floats>(from + j * kLanes);
    unit.random20[j] = broadcast(kHalf);
    if (stochastic) {
      unit.random20[j] = is_signed ? m_bits(hashes.at[j], constants) : v_bits(hashes.at[j], constants);
    }
    if (!is_signed) unit.values[j] = float_of(magnitude(unit.values[j]));  // a −0 is no negative number
  }
  return is_signed ? encode_m(unit) : encode_v(unit);
}

template <bool is_signed, bool stochastic>
void quantize(const QuantizeTask& task, const Scratch&, int64_t begin, int64_t end) {
  const RandomConstants constants;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * task.block_size;
    const int count = static_cast<int>(smaller(task.block_size, task.count - start));
    const float* values = task.values + start;
    Words largest = broadcast(kSmallestAbsmax);
    const auto add = [&](const float* unit) {
      for (int i = 0; i < kUnit; i += kLanes) largest = maximum(largest, magnitude(load<Floats>(unit + i)));
    };
    for_units(count, [&](int unit, int rest) {
      rest == 0 ? add(values + unit) : add(Padded<float>(values + unit, rest).values);
    });
    task.absmax[block] = absmax_of(largest);
    const Floats scale = broadcast(encode_scale(task.absmax[block]));
    RandomHashes random(task.key, start);
    for_units(count, [&](int unit, int rest) {
      if (rest == 0) {
        store_bytes(task.codes + start + unit,
                    encode_unit<is_signed, stochastic>(values + unit, scale, random, constants));
        return;
      }
      uint8_t codes[kUnit];
      const Padded<float> last(values + unit, rest);
      store_bytes(codes, encode_unit<is_signed, stochastic>(last.values, scale, random, constants));
      std::memcpy(task.codes + start + unit, codes, rest);
    });
  }
}

template <bool is_signed>
LISA_INLINE void decode_unit(const uint8_t* codes, Floats scale, float* values, const CodecConstants& constants) {
  for (int i = 0; i < kUnit; i += 2 * kLanes) {
    const Shorts wide = load_bytes(codes + i);
    const Pair pair = is_signed ? decode_m(wide, constants) : decode_v(wide, constants);
    store(values + i, pair.first * scale);
    store(values + i + kLanes, pair.second * scale);
  }
}

template <bool is_signed>
void dequantize(const DequantizeTask& task, const Scratch&, int64_t begin, int64_t end) {
  const CodecConstants constants;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * task.block_size;
    const int count = static_cast<int>(smaller(task.block_size, task.count - start));
    const Floats scale = broadcast(decode_scale(task.absmax[block], 1.0f));
    const uint8_t* codes = task.codes + start;
    float* values = task.values + start;
    for_units(count, [&](int unit, int rest) {
      if (rest == 0) return decode_unit<is_signed>(codes + unit, scale, values + unit, constants);
      float last[kUnit];
      decode_unit<is_signed>(Padded<uint8_t>(codes + unit, rest).values, scale, last, constants);
      std::memcpy(values + unit, last, sizeof(float) * rest);
    });
  }
}

template <class Weight, bool stochastic>
LISA_INLINE void fold_unit(typename Weight::Storage* weight, const float* update, Floats decay, RandomHashes& random,
                           const RandomConstants& constants) {
  const Words hashes = kStochasticWeight<Weight, stochastic> ? random.next() : Words{};
  store_weights<Weight, stochastic>(weight, hashes, constants, [&](int i) {
    return Weight::load(weight + i) * decay + load<Floats>(update + i);
  });
}

// Call body(first element, count) for spans of a band. They are aligned in the whole tensor, not in this band of it, so
// that none crosses a multiple of 2^32.
template <class Body>
LISA_INLINE void for_spans(const FoldTask& task, int64_t begin, int64_t end, const Body& body) {
  const int64_t offset = task.first_element % kSpan;
  for (int64_t span = begin; span < end; ++span) {
    const int64_t start = larger(0, span * kSpan - offset);
    body(start, static_cast<int>(smaller((span + 1) * kSpan - offset, task.count) - start));
  }
}

template <class Weight, bool stochastic>
void fold(const FoldTask& task, const Scratch&, int64_t begin, int64_t end) {
  const Floats decay = broadcast(task.decay);
  const RandomConstants constants;
  for_spans(task, begin, end, [&](int64_t start, int count) {
    RandomHashes random(task.key, task.first_element + start);
    auto* weight = static_cast<typename Weight::Storage*>(task.weight) + start;
    const float* update = task.update + start;
    for_units(count, [&](int unit, int rest) {
      if (rest == 0) return fold_unit<Weight, stochastic>(weight + unit, update + unit, decay, random, constants);
      Padded<typename Weight::Storage> last(weight + unit, rest);
      fold_unit<Weight, stochastic>(last.values, Padded<float>(update + unit, rest).values, decay, random, constants);
      std::memcpy(weight + unit, last.values, sizeof(*weight) * rest);
    });
  });
}

LISA_INLINE void fold_master_unit(uint16_t* weight, uint16_t* remainder, const float* update, Floats decay) {
  for (int pair = 0; pair < kUnit; pair += 2 * kLanes) {
    const auto value = [&](int i) {
      return Master::load(weight + i, remainder + i) * decay + load<Floats>(update + i);
    };
    Master::store(weight + pair, remainder + pair, value(pair), value(pair + kLanes));
  }
}

void fold_master(const FoldTask& task, const Scratch&, int64_t begin, int64_t end) {
  const Floats decay = broadcast(task.decay);
  for_spans(task, begin, end, [&](int64_t start, int count) {
    uint16_t *weight = static_cast<uint16_t*>(task.weight) + start, *remainder = task.remainder + start;
    const float* update = task.update + start;
    for_units(count, [&](int unit, int rest) {
      if (rest == 0) return fold_master_unit(weight + unit, remainder + unit, update + unit, decay);
      Padded<uint16_t> last(weight + unit, rest), lower(remainder + unit, rest);
      fold_master_unit(last.values, lower.values, Padded<float>(update + unit, rest).values, decay);
      std::memcpy(weight + unit, last.values, sizeof(*weight) * rest);
      std::memcpy(remainder + unit, lower.values, sizeof(*remainder) * rest);
    });
  });
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
    {LISA_BOTH(grad_norm, Float32), LISA_BOTH(grad_norm, BFloat16), LISA_BOTH(grad_norm, Float16)},
    {LISA_BOTH(quantize, false), LISA_BOTH(quantize, true)},
    {dequantize<false>, dequantize<true>},
    {LISA_BOTH(rest, Float32), LISA_BOTH(rest, BFloat16), LISA_BOTH(rest, Float16)},
    {LISA_BOTH(wake, Float32), LISA_BOTH(wake, BFloat16), LISA_BOTH(wake, Float16)},
    {LISA_BOTH(fold, Float32), LISA_BOTH(fold, BFloat16), LISA_BOTH(fold, Float16)},
    fold_master,
};

}  // namespace lisa
