// Bits of numbers: 16-bit floats, the 8-bit codec of moments and the counter-based random words, on whole vectors.
//
// Each operation rounds separately and in the order of the reference, so results are equal bit for bit.
#pragma once

#include "simd.h"

namespace {

// Storage types of weights and gradients: how a vector is read as float32, and how two are written.

struct Float32 {
  using Storage = float;
  static Floats load(const float* from) { return ::load<Floats>(from); }
  static void store(float* to, Floats a, Floats b) { ::store(to, a), ::store(to + kLanes, b); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static Floats load(const uint16_t* from) { return float_of(load_upper_halves(from)); }
  static void store(uint16_t* to, Floats a, Floats b) { store_upper_halves(to, nearest_even(a), nearest_even(b)); }
  // Up or down with the odds that make the mean exact; the random numbers are in [0, 2^16).
  static void store(uint16_t* to, Floats a, Floats b, Words random16_a, Words random16_b) {
    store_upper_halves(to, bits_of(a) + random16_a, bits_of(b) + random16_b);
  }

 private:
  static Words nearest_even(Floats values) {
    const Words bits = bits_of(values);
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return values != values ? bits | 0x400000 : rounded;  // rounding could carry a NaN into infinity
  }
};

struct Float16 {
  using Storage = uint16_t;
  static Floats load(const uint16_t* from) { return load_float16(from); }
  static void store(uint16_t* to, Floats a, Floats b) { store_float16(to, a), store_float16(to + kLanes, b); }
};

// The codec: sign + E4M3 for first moments, E5M3 for second moments. A code is a float's upper bits less an offset.

constexpr int kDroppedBits = 20;
constexpr int16_t kOffsetM = 111 << 3, kOffsetV = 95 << 3;
constexpr uint32_t kHalf = 1u << (kDroppedBits - 1);
constexpr uint32_t kSmallestAbsmax = 0x03800000;  // 2^-120: below it a block's scale would overflow
constexpr float kTop = 0.9375f - 4 * 0x1p-24f;    // below 0.9375, so that rounding cannot pass the top code
constexpr float kInverseTop = 1.0f / kTop;
constexpr float kSmallestM = 1.125f * 0x1p-36f;  // what code 1 of a first moment stands for, over 2^20

inline float scalar_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float encode_scale(float absmax) { return (1.0f / absmax) * kTop; }
inline float decode_scale(float absmax, float factor) { return (absmax * kInverseTop) * factor; }

inline Words magnitude(Floats values) { return bits_of(values) & 0x7fffffff; }

// Two vectors of moments.
struct Pair {
  Floats first, second;
};

// Make floats of the upper halves of their bits, times the block's scale.
LISA_INLINE Pair scaled(Shorts upper_halves, Floats scale) {
  return {float_of(first_words(upper_halves)) * scale, float_of(second_words(upper_halves)) * scale};
}

// The codes of two vectors, each code in the upper half of 16 bits; the scale is finite.
LISA_INLINE Pair decode_m(Shorts codes, Floats scale) {
  const Shorts signed_magnitude = (codes >> 4) & static_cast<int16_t>(0x87f0);
  const Shorts is_zero = (signed_magnitude & 0x7f0) == 0;
  return scaled(signed_magnitude + where_not(is_zero, broadcast(static_cast<int16_t>(kOffsetM << 4))), scale);
}

LISA_INLINE Pair decode_v(Shorts codes, Floats scale) {
  const Shorts magnitude = reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(codes) >> 4);
  return scaled(magnitude + where_not(magnitude == 0, broadcast(static_cast<int16_t>(kOffsetV << 4))), scale);
}

LISA_INLINE Ints rounded(Floats scaled, Words random20) {
  return reinterpret_cast<Ints>((bits_of(scaled) + random20) >> kDroppedBits);
}

// Encode a unit. Below code 1 a first moment becomes code 1 or 0 with the odds that keep its mean.
LISA_INLINE Bytes encode_m(const Floats (&values)[kVectors], Floats scale, const Words (&random20)[kVectors]) {
  Shorts codes[2], signs[2];
  for (int j = 0; j < 2; ++j) {
    Ints code[2], keep[2], sign[2];
    for (int i = 0; i < 2; ++i) {
      const Floats value = values[2 * j + i], scaled = float_of(magnitude(value)) * scale;
      const Words random = random20[2 * j + i];
      code[i] = rounded(scaled, random);
      keep[i] = scaled > __builtin_convertvector(reinterpret_cast<Ints>(random), Floats) * kSmallestM;
      sign[i] = reinterpret_cast<Ints>(value);
    }
    const Shorts at_least_1 = maximum(pack(code[0], code[1]), broadcast(static_cast<int16_t>(kOffsetM + 1)));
    codes[j] = (at_least_1 - kOffsetM) & pack(keep[0], keep[1]);
    signs[j] = pack(sign[0], sign[1]);
  }
  return pack_unsigned(codes[0], codes[1]) | (pack(signs[0], signs[1]) & 0x80);
}

// Encode a unit. A positive second moment never becomes code 0: as 0 it would let m / eps through.
LISA_INLINE Bytes encode_v(const Floats (&values)[kVectors], Floats scale, const Words (&random20)[kVectors]) {
  Shorts codes[2];
  for (int j = 0; j < 2; ++j) {
    Ints code[2], bits[2];
    for (int i = 0; i < 2; ++i) {
      code[i] = rounded(values[2 * j + i] * scale, random20[2 * j + i]);
      bits[i] = reinterpret_cast<Ints>(values[2 * j + i]);
    }
    const Shorts one_if_positive = minimum(pack(bits[0], bits[1]), broadcast(int16_t{1}));
    codes[j] = maximum(pack(code[0], code[1]) - kOffsetV, one_if_positive);
  }
  return pack_unsigned(codes[0], codes[1]);
}

// Random words, as lisa_kernels/ops/random_bits.py defines them.

template <class Word>
inline Word mix32(Word value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// The first words of the elements from `start` on, as far as the next multiple of 2^32, a vector at a time.
class RandomWords {
 public:
  LISA_INLINE RandomWords(uint64_t key, int64_t start)
      : elements_(count_from(static_cast<uint32_t>(start))),
        base_(broadcast(mix32(static_cast<uint32_t>(key) + static_cast<uint32_t>(start >> 32) * 0x9e3779b9u) ^
                        static_cast<uint32_t>(key >> 32))) {}
  Words next() {
    const Words first = mix32(elements_ ^ base_);
    elements_ += kLanes;
    return first;
  }

 private:
  Words elements_, base_;
};

inline Words second_word(Words first) { return first * 0x9e3779b1u; }
inline Words moment_bits(Words word) { return word >> 12; }
inline Words weight_bits(Words second) { return second & 0xffff; }

}  // namespace
