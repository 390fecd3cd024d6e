// One AdamW step on blocks of a tensor, with 8-bit moments and with float32 ones.
#pragma once

#include "units.h"

namespace lisa {
namespace {

// The scalars of a step, one copy in each lane.
struct Rates {
  Floats carry1, one_minus_beta1, carry2, one_minus_beta2, eps, decay, minus_step_size, grad_scale;

  explicit Rates(const Scalars& s)
      : carry1(broadcast(s.carry1)),
        one_minus_beta1(broadcast(s.one_minus_beta1)),
        carry2(broadcast(s.carry2)),
        one_minus_beta2(broadcast(s.one_minus_beta2)),
        eps(broadcast(s.eps)),
        decay(broadcast(s.decay)),
        minus_step_size(broadcast(-s.step_size)),
        grad_scale(broadcast(s.grad_scale)) {}
};

// The largest magnitudes so far, in each lane.
struct Largest {
  Words m = broadcast(kSmallestAbsmax), v = m;
};

// A block of a tensor with 8-bit moments, or a copy of one with zeros behind it, whose `count` is one of whole units.
template <class Weight, class Grad>
struct Block8 {
  typename Weight::Storage* weight;
  const typename Grad::Storage* grad;
  uint8_t *m_codes, *v_codes;
  int count;
};

// The step on a block of 8-bit moments is three short loops over scratch in the first cache, each of little latency:
// in one loop, the root and the quotient would hold up all that follows them. They take the scratch by value: a
// pointer in memory might be what a code is written over, and would be read again after every store.

// 1: fresh moments divided by 1 - beta, their roots and their largest magnitudes. The scales include the carries.
template <class Grad, bool scaled, class Block>
LISA_INLINE Largest update_moments(const Block& block, const Scratch scratch, const Rates& rates, Floats m_scale,
                                   Floats v_scale, const CodecConstants& constants) {
  Largest largest;
  for (int pair = 0; pair < block.count; pair += 2 * kLanes) {
    const Pair old_m = decode_m(load_bytes(block.m_codes + pair), constants);
    const Pair old_v = decode_v(load_bytes(block.v_codes + pair), constants);
    for (int j = 0; j < 2; ++j) {
      const int i = pair + j * kLanes;
      const Floats loaded = Grad::load(block.grad + i), g = scaled ? loaded * rates.grad_scale : loaded;
      const Floats m = multiply_add(j == 0 ? old_m.first : old_m.second, m_scale, g);
      const Floats v = multiply_add(g, g, (j == 0 ? old_v.first : old_v.second) * v_scale);
      store(scratch.m + i, m);
      store(scratch.v + i, v);
      store(scratch.roots + i, square_root(v));
      largest.m = maximum(largest.m, magnitude(m));
      largest.v = maximum(largest.v, bits_of(v));
    }
  }
  return largest;
}

LISA_INLINE Floats updated(Floats weight, Floats m, Floats root, const Rates& rates) {
  return multiply_add(m / (root + rates.eps), rates.minus_step_size, weight * rates.decay);
}

// 2: new weights, and the hashes of the random numbers that they and the codes are rounded by, one vector a unit.
template <class Weight, bool stochastic>
LISA_INLINE void update_weights(typename Weight::Storage* __restrict weight, const Scratch scratch, int count,
                                const Rates& rates, RandomHashes random, const RandomConstants& random_constants) {
  for (int unit = 0; unit < count; unit += kUnit) {
    const Words hashes = stochastic ? random.next() : Words{};
    if (stochastic) store(scratch.hashes + unit, hashes);
    store_weights<Weight, stochastic>(weight + unit, hashes, random_constants, [&](int place) {
      const int i = unit + place;
      return updated(Weight::load(weight + i), load<Floats>(scratch.m + i), load<Floats>(scratch.roots + i), rates);
    });
  }
}

template <bool stochastic>
LISA_INLINE void load_moments(const Scratch scratch, int unit, Words hashes, const RandomConstants& constants, Unit& m,
                              Unit& v) {
  const UnitWords each = stochastic ? spread(hashes) : UnitWords{};
  for (int j = 0; j < kVectors; ++j) {
    const int i = unit + j * kLanes;
    m.values[j] = load<Floats>(scratch.m + i), v.values[j] = load<Floats>(scratch.v + i);
    m.random20[j] = stochastic ? m_bits(each.at[j], constants) : broadcast(kHalf);
    v.random20[j] = stochastic ? v_bits(each.at[j], constants) : broadcast(kHalf);
  }
}

// Out of line: rare, and its registers would cost the usual case its own.
template <bool stochastic>
__attribute__((noinline)) void encode_small(const Scratch scratch, int unit, Words hashes,
                                            const RandomConstants& constants, float m_scale, float v_scale,
                                            uint8_t* m_codes, uint8_t* v_codes) {
  Unit m{{}, {}, broadcast(m_scale)}, v{{}, {}, broadcast(v_scale)};
  load_moments<stochastic>(scratch, unit, hashes, constants, m, v);
  store_bytes(m_codes + unit, encode_m(m));
  store_bytes(v_codes + unit, encode_v(v));
}

// 3: codes.
template <bool stochastic>
LISA_INLINE void encode_moments(uint8_t* __restrict m_codes, uint8_t* __restrict v_codes, const Scratch scratch,
                                int count, float m_scale, float v_scale, const CodecConstants& constants,
                                const RandomConstants& random_constants) {
  Unit m{{}, {}, broadcast(m_scale)}, v{{}, {}, broadcast(v_scale)};
  for (int unit = 0; unit < count; unit += kUnit) {
    const Words hashes = stochastic ? load<Words>(scratch.hashes + unit) : Words{};
    load_moments<stochastic>(scratch, unit, hashes, random_constants, m, v);
    Codes codes;
    if (!encode_large(m, v, constants, codes)) {
      encode_small<stochastic>(scratch, unit, hashes, random_constants, m_scale, v_scale, m_codes, v_codes);
      continue;
    }
    store_bytes(m_codes + unit, codes.m);
    store_bytes(v_codes + unit, codes.v);
  }
}

template <class Value>
inline Value* padded_copy(const Value* from, int count, int padded_count, void* to) {
  std::memcpy(to, from, sizeof(Value) * count);
  std::memset(static_cast<char*>(to) + sizeof(Value) * count, 0, sizeof(Value) * (padded_count - count));
  return static_cast<Value*>(to);
}

template <class Weight, class Grad, bool stochastic>
LISA_INLINE void update_block8(const Block8<Weight, Grad>& block, float& m_absmax, float& v_absmax,
                               const Scratch scratch, const AdamW8Task& task, const Rates& rates,
                               const CodecConstants& constants, const RandomConstants& random_constants,
                               const RandomHashes random) {
  const Floats m_scale = broadcast(decode_scale(m_absmax, task.scalars.carry1));
  const Floats v_scale = broadcast(decode_scale(v_absmax, task.scalars.carry2));
  // Without clipping or loss scaling the gradient is taken as it is: a product with 1 changes nothing.
  const Largest largest = task.scalars.grad_scale == 1.0f
                              ? update_moments<Grad, false>(block, scratch, rates, m_scale, v_scale, constants)
                              : update_moments<Grad, true>(block, scratch, rates, m_scale, v_scale, constants);
  const float new_m_absmax = absmax_of(largest.m), new_v_absmax = absmax_of(largest.v);
  const float m_encode_scale = encode_scale(new_m_absmax), v_encode_scale = encode_scale(new_v_absmax);
  m_absmax = new_m_absmax * task.scalars.one_minus_beta1, v_absmax = new_v_absmax * task.scalars.one_minus_beta2;
  update_weights<Weight, stochastic>(block.weight, scratch, block.count, rates, random, random_constants);
  encode_moments<stochastic>(block.m_codes, block.v_codes, scratch, block.count, m_encode_scale, v_encode_scale,
                             constants, random_constants);
}

template <class Weight, class Grad>
Block8<Weight, Grad> padded_copy(const Block8<Weight, Grad>& block, const Scratch& to) {
  const int count = (block.count / kUnit + 1) * kUnit;
  return {padded_copy(block.weight, block.count, count, to.weight),
          padded_copy(block.grad, block.count, count, to.grad),
          padded_copy(block.m_codes, block.count, count, to.m_codes),
          padded_copy(block.v_codes, block.count, count, to.v_codes), count};
}

template <class Weight, class Grad>
void copy_results(const Block8<Weight, Grad>& from, const Block8<Weight, Grad>& to) {
  std::memcpy(to.weight, from.weight, sizeof(*to.weight) * to.count);
  std::memcpy(to.m_codes, from.m_codes, to.count);
  std::memcpy(to.v_codes, from.v_codes, to.count);
}

// Has the memory's lines on their way while the roots and quotients of the block before are waited for.
template <class Value>
inline void prefetch(const Value* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Value);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

template <class Weight, class Grad, bool stochastic>
void adamw8(const AdamW8Task& task, const Scratch& scratch, int64_t begin, int64_t end) {
  const AdamW8Row& row = task.row;
  const Rates rates(task.scalars);
  const CodecConstants constants;
  const RandomConstants random_constants;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * task.block_size;
    const Block8<Weight, Grad> block{static_cast<typename Weight::Storage*>(row.weight) + start,
                                     static_cast<const typename Grad::Storage*>(row.grad) + start, row.m_codes + start,
                                     row.v_codes + start,
                                     static_cast<int>(smaller(task.block_size, row.count - start))};
    if (const int64_t next = start + task.block_size; next < row.count) {
      const int64_t count = smaller(task.block_size, row.count - next);
      prefetch(block.grad + task.block_size, count);
      prefetch(block.m_codes + task.block_size, count);
      prefetch(block.v_codes + task.block_size, count);
      prefetch(block.weight + task.block_size, count);
    }
    const bool is_whole = block.count % kUnit == 0;
    const Block8<Weight, Grad> padded = is_whole ? block : padded_copy(block, scratch);
    update_block8<Weight, Grad, stochastic>(padded, row.m_absmax[index], row.v_absmax[index], scratch, task, rates,
                                            constants, random_constants, RandomHashes(task.key, row.first_element + start));
    if (!is_whole) copy_results(padded, block);
  }
}

template <class Weight, class Grad, bool stochastic>
LISA_INLINE void update_unit32(typename Weight::Storage* weight, const typename Grad::Storage* grad, float* m, float* v,
                               const Rates& rates, RandomHashes& random, const RandomConstants& constants) {
  const Words hashes = kStochasticWeight<Weight, stochastic> ? random.next() : Words{};
  store_weights<Weight, stochastic>(weight, hashes, constants, [&](int i) {
    const Floats g = Grad::load(grad + i) * rates.grad_scale;
    const Floats new_m = multiply_add(load<Floats>(m + i), rates.carry1, g);
    const Floats new_v = multiply_add(g, g, load<Floats>(v + i) * rates.carry2);
    store(m + i, new_m * rates.one_minus_beta1);
    store(v + i, new_v * rates.one_minus_beta2);
    return updated(Weight::load(weight + i), new_m, square_root(new_v), rates);
  });
}

template <class Weight, class Grad, bool stochastic>
void adamw32(const AdamW32Task& task, const Scratch&, int64_t begin, int64_t end) {
  const AdamW32Row& row = task.row;
  const Rates rates(task.scalars);
  const RandomConstants constants;
  auto* weights = static_cast<typename Weight::Storage*>(row.weight);
  const auto* grads = static_cast<const typename Grad::Storage*>(row.grad);
  for (int64_t start = begin * kSpan; start < smaller(end * kSpan, row.count); start += kSpan) {
    const int count = static_cast<int>(smaller(kSpan, row.count - start));
    RandomHashes random(task.key, row.first_element + start);
    auto* weight = weights + start;
    const auto* grad = grads + start;
    float *m = row.m + start, *v = row.v + start;
    for_units(count, [&](int unit, int rest) {
      if (rest == 0) {
        update_unit32<Weight, Grad, stochastic>(weight + unit, grad + unit, m + unit, v + unit, rates, random,
                                                constants);
        return;
      }
      Padded<typename Weight::Storage> last_weight(weight + unit, rest);
      const Padded<typename Grad::Storage> last_grad(grad + unit, rest);
      Padded<float> last_m(m + unit, rest), last_v(v + unit, rest);
      update_unit32<Weight, Grad, stochastic>(last_weight.values, last_grad.values, last_m.values, last_v.values, rates,
                                              random, constants);
      std::memcpy(weight + unit, last_weight.values, sizeof(*weight) * rest);
      std::memcpy(m + unit, last_m.values, sizeof(float) * rest);
      std::memcpy(v + unit, last_v.values, sizeof(float) * rest);
    });
  }
}

}  // namespace
}  // namespace lisa
