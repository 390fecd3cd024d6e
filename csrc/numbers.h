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
  // As a BFloat16's, by the upper 13 of the random bits.
  static void store(uint16_t* to, Floats a, Floats b, Words random16_a, Words random16_b) {
    store(to, rounded(a, random16_a), rounded(b, random16_b));
  }

 private:
  // Below 2^-14 float16's places are as far apart as those of 13 bits from there on: that much is added meanwhile.
  static Floats rounded(Floats values, Words random16) {
    const Words bits = bits_of(values), sign = bits & 0x80000000;
    const Floats magnitude = float_of(bits & 0x7fffffff);
    const Floats offset = float_of((bits & 0x7fffffff) < (113u << 23) ? bits_of(broadcast(0x1p-14f)) : Words{});
    const Words kept = (bits_of(magnitude + offset) + (random16 >> 3)) & 0xffffe000;
    return float_of(bits_of(float_of(kept) - offset) | sign);
  }
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

// Constants that lie in memory: where registers run short, the compiler would build each of them anew from a scalar,
// for every block or even in every round of a loop.
struct CodecConstants {
  Shorts m_offset = broadcast(int16_t{kOffsetM * 16}), v_offset = broadcast(int16_t{kOffsetV * 16});
  Shorts magnitude = broadcast(int16_t{127 << 4});
  Shorts sign_and_magnitude = broadcast(static_cast<int16_t>(0x87f0));
  Shorts smallest = broadcast(int16_t{1 << 5});
  UnsignedShorts sign_shift = unsigned_of(broadcast(int16_t{(1 << 11) - (1 << 7)}));

  CodecConstants() { asm("" : "+m"(*this)); }
};

inline Shorts codes_of(UnsignedShorts shifted) { return signed_of(shifted >> 4); }

// Two vectors of moments.
struct Pair {
  Floats first, second;
};

LISA_INLINE Pair floats_of(Shorts upper_halves) {
  return {float_of(first_words(upper_halves)), float_of(second_words(upper_halves))};
}

// What the codes of two vectors stand for before their block's scale; each code in the upper half of 16 bits.
LISA_INLINE Pair decode_m(Shorts codes, const CodecConstants& constants) {
  const Shorts shifted = codes >> 4, offset = where_nonzero(shifted & constants.magnitude, constants.m_offset);
  return floats_of((shifted & constants.sign_and_magnitude) + offset);
}

LISA_INLINE Pair decode_v(Shorts codes, const CodecConstants& constants) {
  const Shorts magnitude = codes_of(unsigned_of(codes));
  return floats_of(magnitude + where_nonzero(magnitude, constants.v_offset));
}

// The powers of a factor by which the hash of four elements becomes the word of each of them, and a number for its
// weight. In memory for the same reason.
struct RandomConstants {
  Words word = powers_from(0), weight = powers_from(4);

  RandomConstants() { asm("" : "+m"(*this)); }

 private:
  static constexpr uint32_t kFactor = 0xd9cece9fu;
  static constexpr uint32_t power(int exponent) {
    uint32_t value = 1;
    for (int i = 0; i < exponent; ++i) value *= kFactor;
    return value;
  }
  static Words powers_from(int exponent) {
    Words powers{};
    for (int lane = 0; lane < kLanes; ++lane) powers[lane] = power(exponent + lane % 4);
    return powers;
  }
};

// A unit of moments, their block's scale and the random numbers in [0, 2^20) that round them.
struct Unit {
  Floats values[kVectors];
  Words random20[kVectors];
  Floats scale;
};

// Two vectors of a unit times its scale plus their random numbers: a code plus its offset lies from bit 4 on, and the
// sign of a first moment in bit 15.
LISA_INLINE UnsignedShorts rounded(const Unit& unit, int i) {
  const Words a = bits_of(unit.values[i] * unit.scale) + unit.random20[i];
  const Words b = bits_of(unit.values[i + 1] * unit.scale) + unit.random20[i + 1];
  return unsigned_of(joined(a, b));
}

// Below code 1 a first moment becomes code 1 or 0 with the odds that keep its mean.
LISA_INLINE Bytes encode_m(const Unit& unit) {
  Shorts codes[2];
  for (int pair = 0; pair < 2; ++pair) {
    Unit positive{{}, {}, unit.scale};
    Words keep[2];
    for (int j = 0; j < 2; ++j) {
      const int i = 2 * pair + j;
      const Floats random = __builtin_convertvector(reinterpret_cast<Ints>(unit.random20[i]), Floats);
      positive.values[j] = float_of(magnitude(unit.values[i])), positive.random20[j] = unit.random20[i];
      keep[j] = reinterpret_cast<Words>(positive.values[j] * unit.scale > random * kSmallestM);
    }
    const Shorts code = maximum(codes_of(rounded(positive, 0)) - kOffsetM, broadcast(int16_t{1}));
    const Shorts signs = joined(bits_of(unit.values[2 * pair]), bits_of(unit.values[2 * pair + 1]));
    codes[pair] = (code & joined(keep[0], keep[1])) | ((signs >> 8) & 0x80);
  }
  return pack_unsigned(codes[0], codes[1]);
}

// A positive second moment never becomes code 0: as 0 it would let m / eps through.
LISA_INLINE Bytes encode_v(const Unit& unit) {
  Shorts codes[2];
  for (int pair = 0; pair < 2; ++pair) {
    const auto is_positive = [&](int i) { return reinterpret_cast<Words>(unit.values[i] > 0); };
    const Shorts one_if_positive = joined(is_positive(2 * pair), is_positive(2 * pair + 1)) & 1;
    codes[pair] = maximum(codes_of(rounded(unit, 2 * pair)) - kOffsetV, one_if_positive);
  }
  return pack_unsigned(codes[0], codes[1]);
}

struct Codes {
  Bytes m, v;
};

// What encode_m and encode_v return, where nothing is special: no first moment below code 2, no second below 1. False
// where there is one, which is rare: zeros, and moments some tens of thousands of times smaller than their block's
// largest.
LISA_INLINE bool encode_large(const Unit& m, const Unit& v, const CodecConstants& constants, Codes& codes) {
  const UnsignedShorts m_offset = unsigned_of(constants.m_offset), v_offset = unsigned_of(constants.v_offset);
  const UnsignedShorts m_rounded[2] = {rounded(m, 0) - m_offset, rounded(m, 2) - m_offset};
  const UnsignedShorts v_rounded[2] = {rounded(v, 0) - v_offset, rounded(v, 2) - v_offset};
  // Doubled, first moments lose their sign, and what was below code 0 is negative.
  const auto doubled = [](UnsignedShorts shorts) { return signed_of(shorts + shorts); };
  const Shorts smallest_m = minimum(doubled(m_rounded[0]), doubled(m_rounded[1])) - constants.smallest;
  const Shorts smallest_v = minimum(doubled(v_rounded[0]), doubled(v_rounded[1]));
  if (any_negative(minimum(smallest_m, smallest_v) - constants.smallest)) return false;
  Shorts m_codes[2];
  for (int pair = 0; pair < 2; ++pair) {
    // The sign comes down from bit 11 to bit 7: without one, the difference is a large number.
    const UnsignedShorts code = m_rounded[pair] >> 4;
    m_codes[pair] = signed_of(minimum(code, code - constants.sign_shift));
  }
  codes = {pack_unsigned(m_codes[0], m_codes[1]), pack_unsigned(codes_of(v_rounded[0]), codes_of(v_rounded[1]))};
  return true;
}

// Random words, as lisa_kernels/ops/random_bits.py defines them.

template <class Word>
inline Word mix32(Word value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// The hashes of the elements from `start` on, a multiple of 4, as far as the next multiple of 2^32: those of a unit at a
// time, one for every four elements, to be spread.
class RandomHashes {
 public:
  LISA_INLINE RandomHashes(uint64_t key, int64_t start)
      : fours_(four_apart(static_cast<uint32_t>(start) >> 2)),
        base_(broadcast(mix32(static_cast<uint32_t>(key) + static_cast<uint32_t>(start >> 32) * 0x9e3779b9u) ^
                        static_cast<uint32_t>(key >> 32))) {}
  Words next() {
    const Words hashes = mix32(fours_ ^ base_);
    fours_ += kLanes;
    return hashes;
  }

 private:
  Words fours_, base_;
};

inline Words m_bits(Words hashes, const RandomConstants& constants) { return (hashes * constants.word) >> 12; }
inline Words v_bits(Words hashes, const RandomConstants& constants) { return (hashes * constants.word) & 0xfffff; }
inline Words weight_bits(Words hashes, const RandomConstants& constants) { return (hashes * constants.weight) >> 16; }

}  // namespace
