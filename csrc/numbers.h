// Bits of numbers: 16-bit floats, the 8-bit codec of moments and the counter-based random words.
//
// Scalar and free of branches, so that the compiler turns loops over them into vector code. In an unnamed namespace
// because each file that includes this is compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Storage types of weights and gradients: how one is read as float32 and written, rounded to nearest even.

struct Float32 {
  using Storage = float;
  static float load(float stored) { return stored; }
  static float store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t stored) { return float_of(static_cast<uint32_t>(stored) << 16); }
  static uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
  }
  // Up or down with the odds that make the mean exact; `random16` is in [0, 2^16).
  static uint16_t store_stochastic(float value, uint32_t random16) {
    return static_cast<uint16_t>((bits_of(value) + random16) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t stored) {
    const uint32_t magnitude = stored & 0x7fffu, sign = (stored & 0x8000u) << 16;
    // The exponent's bias grows by 112 through a product, which also makes subnormals normal.
    const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
    const uint32_t special = (magnitude << 13) | 0x7f800000;
    return float_of((magnitude < 0x7c00 ? finite : special) | sign);
  }
  static uint16_t store(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // 0.5 has a last place of 2^-24, the step of float16's subnormals: the sum rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return static_cast<uint16_t>(half | sign);
  }
};

// The codec: sign + E4M3 for first moments, E5M3 for second moments.

struct FirstMoment {
  static constexpr uint32_t kOffset = 111u << 23;
};
struct SecondMoment {
  static constexpr uint32_t kOffset = 95u << 23;
};

constexpr float kTop = 0.9375f;
constexpr uint32_t kSmallestAbsmax = 7u << 23;  // the bits of 2^-120
constexpr int kDroppedBits = 20;
constexpr uint32_t kHalf = 1u << (kDroppedBits - 1);

inline float encode_scale(float absmax) { return (1.0f / absmax) * kTop; }
inline float decode_scale(float absmax) { return absmax / kTop; }

// The value of a first moment's code 1, and the factor that makes it 2^20: smaller magnitudes round to it or to 0.
constexpr float kSmallestM = 1.125f / 65536.0f;
constexpr float kBelowM = static_cast<float>(1048576.0 / (1.125 / 65536.0));

// The code before clamping; `random20` is in [0, 2^20), or kHalf for rounding to nearest.
template <class Moment>
inline int32_t raw_code(float value, float scale, uint32_t random20) {
  const uint32_t scaled = bits_of(float_of(bits_of(value) & 0x7fffffff) * scale);
  return static_cast<int32_t>(scaled + random20 - Moment::kOffset) >> kDroppedBits;
}

inline int32_t clamp(int32_t value, int32_t low, int32_t high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

inline uint32_t encode(FirstMoment, float value, float scale, uint32_t random20) {
  const int32_t sign = value < 0.0f ? 128 : 0;
  const float scaled = float_of(bits_of(value) & 0x7fffffff) * scale;
  const float small = scaled < kSmallestM ? scaled : kSmallestM;
  const int32_t below = (static_cast<int32_t>(small * kBelowM) + static_cast<int32_t>(random20)) >> kDroppedBits;
  const int32_t code = clamp(raw_code<FirstMoment>(value, scale, random20), 0, 127);
  return static_cast<uint32_t>((scaled < kSmallestM ? below : code) | sign);
}

inline uint32_t encode(SecondMoment, float value, float scale, uint32_t random20) {
  const int32_t code = clamp(raw_code<SecondMoment>(value, scale, random20), 1, 255);
  return static_cast<uint32_t>(value > 0.0f ? code : 0);
}

template <class Moment>
inline uint32_t magnitude_bits(uint32_t magnitude, float scale) {
  const uint32_t bits = bits_of(float_of((magnitude << kDroppedBits) + Moment::kOffset) * scale);
  return magnitude == 0 ? 0 : bits;
}

inline float decode(FirstMoment, uint32_t code, float scale) {
  return float_of(magnitude_bits<FirstMoment>(code & 127, scale) ^ ((code & 128) << 24));
}

inline float decode(SecondMoment, uint32_t code, float scale) {
  return float_of(magnitude_bits<SecondMoment>(code, scale));
}

// Random words, as lisa_kernels/ops/random_bits.py defines them.

inline uint32_t mix32(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// The two words of the elements from `start` on, as far as the next multiple of 2^32.
class Words {
 public:
  Words(uint64_t key, int64_t start)
      : base_(static_cast<uint32_t>(start)),
        low_(mix32(static_cast<uint32_t>(key) + static_cast<uint32_t>(start >> 32) * 0x9e3779b9u)),
        high_(static_cast<uint32_t>(key >> 32)) {}
  uint32_t first(int i) const { return mix32((base_ + static_cast<uint32_t>(i)) ^ low_); }
  uint32_t second(uint32_t first_word) const { return mix32(first_word ^ high_); }

 private:
  uint32_t base_, low_, high_;
};

inline void fill_words(const Words words, int count, uint32_t* __restrict first, uint32_t* __restrict second) {
  for (int i = 0; i < count; ++i) {
    first[i] = words.first(i);
    second[i] = words.second(first[i]);
  }
}

inline uint32_t moment_bits(uint32_t word) { return word >> 12; }
inline uint32_t weight_bits(uint32_t first, uint32_t second) { return ((first & 0xfff) << 4) | (second & 0xf); }

}  // namespace
