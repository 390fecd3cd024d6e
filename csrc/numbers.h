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

// A float32 master in two halves: its bits are those of a bfloat16 weight, read as float32, plus a signed remainder. So
// the remainder is the master's lower half, and the weight its nearest bfloat16, ties away from zero.
struct Master {
  static Floats load(const uint16_t* weight, const uint16_t* remainder) {
    const Ints difference = reinterpret_cast<Ints>(load_upper_halves(remainder)) >> 16;
    return float_of(load_upper_halves(weight) + reinterpret_cast<Words>(difference));
  }
  static void store(uint16_t* weight, uint16_t* remainder, Floats a, Floats b) {
    store_upper_halves(weight, bits_of(a) + 0x8000, bits_of(b) + 0x8000);
    store_upper_halves(remainder, bits_of(a) << 16, bits_of(b) << 16);
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
  return scaled(signed_magnitude + where_nonzero(signed_magnitude & 0x7f0, broadcast(int16_t{kOffsetM << 4})), scale);
}

LISA_INLINE Pair decode_v(Shorts codes, Floats scale) {
  const Shorts magnitude = reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(codes) >> 4);
  return scaled(magnitude + where_nonzero(magnitude, broadcast(int16_t{kOffsetV << 4})), scale);
}

// A unit of moments, their block's scale and the random numbers in [0, 2^20) that round them.
struct Unit {
  Floats values[kVectors];
  Words random20[kVectors];
  Floats scale;
};

inline Floats scaled_m(const Unit& unit, int i) { return float_of(magnitude(unit.values[i])) * unit.scale; }
inline Floats scaled_v(const Unit& unit, int i) { return unit.values[i] * unit.scale; }

// The rounded codes of two vectors, without regard for what is special below code 1.
LISA_INLINE Shorts rounded(Floats a, Floats b, const Words* random20, int16_t offset) {
  const Words code_a = (bits_of(a) + random20[0]) >> kDroppedBits, code_b = (bits_of(b) + random20[1]) >> kDroppedBits;
  return pack(reinterpret_cast<Ints>(code_a), reinterpret_cast<Ints>(code_b)) - offset;
}
LISA_INLINE Shorts rounded_m(const Unit& unit, int i) {
  return rounded(scaled_m(unit, i), scaled_m(unit, i + 1), unit.random20 + i, kOffsetM);
}
LISA_INLINE Shorts rounded_v(const Unit& unit, int i) {
  return rounded(scaled_v(unit, i), scaled_v(unit, i + 1), unit.random20 + i, kOffsetV);
}

// Bit 7 of the codes of first moments.
LISA_INLINE Bytes sign_bits(const Unit& unit) {
  const auto bits = [&](int i) { return reinterpret_cast<Ints>(unit.values[i]); };
  return pack(pack(bits(0), bits(1)), pack(bits(2), bits(3))) & 0x80;
}

// Below code 1 a first moment becomes code 1 or 0 with the odds that keep its mean.
LISA_INLINE Bytes encode_m(const Unit& unit) {
  Shorts codes[2];
  for (int pair = 0; pair < 2; ++pair) {
    const auto keep = [&](int i) -> Ints {
      const Floats random = __builtin_convertvector(reinterpret_cast<Ints>(unit.random20[i]), Floats);
      return scaled_m(unit, i) > random * kSmallestM;
    };
    codes[pair] = maximum(rounded_m(unit, 2 * pair), broadcast(int16_t{1})) & pack(keep(2 * pair), keep(2 * pair + 1));
  }
  return pack_unsigned(codes[0], codes[1]) | sign_bits(unit);
}

// A positive second moment never becomes code 0: as 0 it would let m / eps through.
LISA_INLINE Bytes encode_v(const Unit& unit) {
  Shorts codes[2];
  for (int pair = 0; pair < 2; ++pair) {
    const auto bits = [&](int i) { return reinterpret_cast<Ints>(unit.values[i]); };
    const Shorts one_if_positive = minimum(pack(bits(2 * pair), bits(2 * pair + 1)), broadcast(int16_t{1}));
    codes[pair] = maximum(rounded_v(unit, 2 * pair), one_if_positive);
  }
  return pack_unsigned(codes[0], codes[1]);
}

struct Codes {
  Bytes m, v;
};

// What encode_m and encode_v return, where nothing is special: no first moment below code 2, no second below 1. False
// where there is one, which is rare: zeros, and moments some tens of thousands of times smaller than their block's
// largest.
LISA_INLINE bool encode_large(const Unit& m, const Unit& v, Codes& codes) {
  const Shorts m_codes[2] = {rounded_m(m, 0), rounded_m(m, 2)};
  const Shorts v_codes[2] = {rounded_v(v, 0), rounded_v(v, 2)};
  if (any(minimum(minimum(m_codes[0], m_codes[1]) - 1, minimum(v_codes[0], v_codes[1])) < 1)) return false;
  codes = {pack_unsigned(m_codes[0], m_codes[1]) | sign_bits(m), pack_unsigned(v_codes[0], v_codes[1])};
  return true;
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
