// Vectors of the instruction set that this file is compiled for: 16 words with AVX-512, 8 with AVX2, else 4.
//
// Arithmetic, shifts and comparisons (each lane all ones or zero) are the compiler's own operators on vector types.
// Here is what it has no operator for: by intrinsics for AVX2 and AVX-512, and in plain loops, the twin that runs
// everywhere. In an unnamed namespace because each file that includes this is compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what must not become a call, which would pass its vectors through memory.
#define LISA_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// What kernels work on at a time: as many elements as four vectors of words hold, and as many bytes as one vector.
constexpr int kVectors = 4;
constexpr int kUnit = kVectors * kLanes;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));  // half as many

// 16-bit integers for the lanes of two vectors, which alternate: seen as words, the first vector's are the lower halves
// and the second's the upper ones. And bytes for the lanes of four vectors, in the order that suits the instruction
// set: `pack_unsigned` makes it, `store_bytes` brings it into memory.
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));

template <class Vector, class Value>
inline Vector load(const Value* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Value, class Vector>
inline void store(Value* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats broadcast(float value) { return value - Floats{}; }
inline Words broadcast(uint32_t value) { return value - Words{}; }
inline Shorts broadcast(int16_t value) { return value - Shorts{}; }

inline Words bits_of(Floats values) { return reinterpret_cast<Words>(values); }
inline Floats float_of(Words bits) { return reinterpret_cast<Floats>(bits); }
inline UnsignedShorts unsigned_of(Shorts shorts) { return reinterpret_cast<UnsignedShorts>(shorts); }
inline Shorts signed_of(UnsignedShorts shorts) { return reinterpret_cast<Shorts>(shorts); }

// 16-bit integers as the upper halves of words: those of the first vector of two, and of the second.
inline Words first_words(Shorts halves) { return reinterpret_cast<Words>(halves) << 16; }
inline Words second_words(Shorts halves) { return reinterpret_cast<Words>(halves) & 0xffff0000; }

// The first half of one vector and the second of another.
LISA_INLINE Words first_half(Words a, Words b) {
  Words second{};
  for (int lane = kLanes / 2; lane < kLanes; ++lane) second[lane] = 0xffffffff;
  return (a & ~second) | (b & second);
}

// Vectors for a unit of elements.
struct UnitWords {
  Words at[kVectors];
};

#if defined(__AVX512BW__)

inline __m512i raw(Words words) { return reinterpret_cast<__m512i>(words); }
inline __m512i raw(Shorts shorts) { return reinterpret_cast<__m512i>(shorts); }
inline __m512i raw(UnsignedShorts shorts) { return reinterpret_cast<__m512i>(shorts); }

inline Floats square_root(Floats values) { return _mm512_sqrt_ps(values); }
// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline bool any_negative(Shorts shorts) { return _mm512_movepi16_mask(raw(shorts)) != 0; }
// The values at whose place a magnitude is not 0, and 0 at the others.
inline Shorts where_nonzero(Shorts magnitudes, Shorts values) { return (magnitudes != 0) & values; }
inline Words maximum(Words a, Words b) { return reinterpret_cast<Words>(_mm512_max_epu32(raw(a), raw(b))); }
inline Shorts maximum(Shorts a, Shorts b) { return reinterpret_cast<Shorts>(_mm512_max_epi16(raw(a), raw(b))); }
inline Shorts minimum(Shorts a, Shorts b) { return reinterpret_cast<Shorts>(_mm512_min_epi16(raw(a), raw(b))); }
inline UnsignedShorts minimum(UnsignedShorts a, UnsignedShorts b) {
  return reinterpret_cast<UnsignedShorts>(_mm512_min_epu16(raw(a), raw(b)));
}

// The upper halves of two vectors of words.
inline Shorts joined(Words a, Words b) {
  return reinterpret_cast<Shorts>(_mm512_mask_blend_epi16(0xaaaaaaaa, raw(a >> 16), raw(b)));
}
// Narrow 16-bit integers below 256.
inline Bytes pack_unsigned(Shorts a, Shorts b) { return reinterpret_cast<Bytes>(_mm512_packus_epi16(raw(a), raw(b))); }

// Bytes for two vectors as the upper halves of 16-bit integers.
// A word for every four elements of a unit, four times each; `four_apart` has the order.
LISA_INLINE UnitWords spread(Words words) {
  const __m512i all = raw(words);
  return {{reinterpret_cast<Words>(_mm512_shuffle_epi32(all, _MM_PERM_AAAA)),
           reinterpret_cast<Words>(_mm512_shuffle_epi32(all, _MM_PERM_BBBB)),
           reinterpret_cast<Words>(_mm512_shuffle_epi32(all, _MM_PERM_CCCC)),
           reinterpret_cast<Words>(_mm512_shuffle_epi32(all, _MM_PERM_DDDD))}};
}

inline Shorts load_bytes(const uint8_t* from) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128(halves));
  const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128(halves + 1));
  return reinterpret_cast<Shorts>(_mm512_or_si512(_mm512_slli_epi32(first, 8), _mm512_slli_epi32(second, 24)));
}
inline void store_bytes(uint8_t* to, Bytes bytes) {
  const __m512i apart = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i in_fours = _mm512_shuffle_epi8(reinterpret_cast<__m512i>(bytes), apart);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, in_fours));
}

// 16-bit integers in memory as the upper halves of words, and the upper halves of two vectors of words to memory.
inline Words load_upper_halves(const uint16_t* from) {
  return reinterpret_cast<Words>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}
inline void store_upper_halves(uint16_t* to, Words a, Words b) {
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kLanes),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(raw(i == 0 ? a : b), 16)));
  }
}

inline Floats load_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store_float16(uint16_t* to, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// The numbers at some places, below 16, of a table.
inline Floats looked_up(const float* table, Words places) {
  return _mm512_permutexvar_ps(raw(places), load<Floats>(table));
}

inline Doubles first_doubles(Floats values) { return _mm512_cvtps_pd(_mm512_castps512_ps256(values)); }
inline Doubles second_doubles(Floats values) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)); }

#elif defined(__AVX2__)

inline __m256i raw(Words words) { return reinterpret_cast<__m256i>(words); }
inline __m256i raw(Shorts shorts) { return reinterpret_cast<__m256i>(shorts); }
inline __m256i raw(UnsignedShorts shorts) { return reinterpret_cast<__m256i>(shorts); }

inline Floats square_root(Floats values) { return _mm256_sqrt_ps(values); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline bool any_negative(Shorts shorts) { return (_mm256_movemask_epi8(raw(shorts)) & 0xaaaaaaaa) != 0; }
inline Shorts where_nonzero(Shorts magnitudes, Shorts values) {
  return reinterpret_cast<Shorts>(_mm256_sign_epi16(raw(values), raw(magnitudes)));
}
inline Words maximum(Words a, Words b) { return reinterpret_cast<Words>(_mm256_max_epu32(raw(a), raw(b))); }
inline Shorts maximum(Shorts a, Shorts b) { return reinterpret_cast<Shorts>(_mm256_max_epi16(raw(a), raw(b))); }
inline Shorts minimum(Shorts a, Shorts b) { return reinterpret_cast<Shorts>(_mm256_min_epi16(raw(a), raw(b))); }

inline UnsignedShorts minimum(UnsignedShorts a, UnsignedShorts b) {
  return reinterpret_cast<UnsignedShorts>(_mm256_min_epu16(raw(a), raw(b)));
}

inline Shorts joined(Words a, Words b) {
  return reinterpret_cast<Shorts>(_mm256_blend_epi16(raw(a >> 16), raw(b), 0xaa));
}
inline Bytes pack_unsigned(Shorts a, Shorts b) { return reinterpret_cast<Bytes>(_mm256_packus_epi16(raw(a), raw(b))); }

LISA_INLINE UnitWords spread(Words words) {
  const __m256i all = raw(words);
  return {{reinterpret_cast<Words>(_mm256_shuffle_epi32(all, 0x00)),
           reinterpret_cast<Words>(_mm256_shuffle_epi32(all, 0x55)),
           reinterpret_cast<Words>(_mm256_shuffle_epi32(all, 0xaa)),
           reinterpret_cast<Words>(_mm256_shuffle_epi32(all, 0xff))}};
}

// Sixteen bytes, in both halves of a register.
inline __m256i load_twice(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline Shorts load_bytes(const uint8_t* from) {
  const __m256i order = _mm256_setr_epi8(-1, 0, -1, 8, -1, 1, -1, 9, -1, 2, -1, 10, -1, 3, -1, 11,  //
                                         -1, 4, -1, 12, -1, 5, -1, 13, -1, 6, -1, 14, -1, 7, -1, 15);
  return reinterpret_cast<Shorts>(_mm256_shuffle_epi8(load_twice(from), order));
}
inline void store_bytes(uint8_t* to, Bytes bytes) {
  const __m256i apart =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i in_fours = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(bytes), apart);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(in_fours, order));
}

inline Words load_upper_halves(const uint16_t* from) {
  const __m256i order = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return reinterpret_cast<Words>(_mm256_shuffle_epi8(load_twice(from), order));
}
inline void store_upper_halves(uint16_t* to, Words a, Words b) {
  const __m256i packed = _mm256_packus_epi32(raw(a >> 16), raw(b >> 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline Floats load_float16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store_float16(uint16_t* to, Floats values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats looked_up(const float* table, Words places) {
  const __m256 lower = _mm256_permutevar8x32_ps(load<Floats>(table), raw(places));
  const __m256 upper = _mm256_permutevar8x32_ps(load<Floats>(table + 8), raw(places));
  return _mm256_blendv_ps(lower, upper, float_of(places << 28));
}

inline Doubles first_doubles(Floats values) { return _mm256_cvtps_pd(_mm256_castps256_ps128(values)); }
inline Doubles second_doubles(Floats values) { return _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)); }

#else

inline Floats square_root(Floats values) {
  Floats roots{};
  for (int lane = 0; lane < kLanes; ++lane) roots[lane] = __builtin_sqrtf(values[lane]);
  return roots;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  Floats sums{};
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return sums;
}
inline bool any_negative(Shorts shorts) {
  int16_t all = 0;
  for (int lane = 0; lane < 2 * kLanes; ++lane) all |= shorts[lane];
  return all < 0;
}
inline Shorts where_nonzero(Shorts magnitudes, Shorts values) { return (magnitudes != 0) & values; }
inline Words maximum(Words a, Words b) { return a > b ? a : b; }
inline Shorts maximum(Shorts a, Shorts b) { return a > b ? a : b; }
inline Shorts minimum(Shorts a, Shorts b) { return a < b ? a : b; }

inline UnsignedShorts minimum(UnsignedShorts a, UnsignedShorts b) { return a < b ? a : b; }

inline Shorts joined(Words a, Words b) { return reinterpret_cast<Shorts>((a >> 16) | (b & 0xffff0000)); }
inline Bytes pack_unsigned(Shorts a, Shorts b) {
  Bytes packed{};
  for (int lane = 0; lane < 2 * kLanes; ++lane) {
    packed[lane] = static_cast<uint8_t>(a[lane]);
    packed[2 * kLanes + lane] = static_cast<uint8_t>(b[lane]);
  }
  return packed;
}

inline UnitWords spread(Words words) {
  UnitWords all{};
  for (int j = 0; j < kVectors; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) all.at[j][lane] = words[lane / 4 * 4 + j];
  }
  return all;
}

inline Shorts load_bytes(const uint8_t* from) {
  UnsignedShorts shorts{};
  for (int lane = 0; lane < kLanes; ++lane) shorts[2 * lane] = from[lane], shorts[2 * lane + 1] = from[kLanes + lane];
  return signed_of(shorts << 8);
}
inline void store_bytes(uint8_t* to, Bytes bytes) {
  for (int half = 0; half < kUnit; half += 2 * kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[half + lane] = bytes[half + 2 * lane];
      to[half + kLanes + lane] = bytes[half + 2 * lane + 1];
    }
  }
}

inline Words load_upper_halves(const uint16_t* from) {
  Words words{};
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = static_cast<uint32_t>(from[lane]) << 16;
  return words;
}
inline void store_upper_halves(uint16_t* to, Words a, Words b) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint16_t>(a[lane] >> 16);
  for (int lane = 0; lane < kLanes; ++lane) to[kLanes + lane] = static_cast<uint16_t>(b[lane] >> 16);
}

inline Floats load_float16(const uint16_t* from) {
  const Words stored = load_upper_halves(from), magnitude = (stored & 0x7fff0000) >> 3, sign = stored & 0x80000000;
  // The exponent's bias grows by 112 through a product, which also makes subnormals normal.
  const Words finite = bits_of(float_of(magnitude) * 0x1p112f), special = magnitude | 0x7f800000;
  return float_of((magnitude < (0x7c00 << 13) ? finite : special) | sign);
}
inline void store_float16(uint16_t* to, Floats values) {
  const Words bits = bits_of(values), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // 0.5 has a last place of 2^-24, the step of float16's subnormals: the sum rounds to it.
  const Words subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(broadcast(0.5f));
  Words half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? broadcast(0x7c00u) : half;
  half = (magnitude > 0x7f800000 ? broadcast(0x7e00u) : half) | sign;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint16_t>(half[lane]);
}

inline Floats looked_up(const float* table, Words places) {
  Floats found{};
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = table[places[lane]];
  return found;
}

inline Doubles first_doubles(Floats values) { return Doubles{values[0], values[1]}; }
inline Doubles second_doubles(Floats values) { return Doubles{values[2], values[3]}; }

#endif

// The numbers start, start + 1 …, one for every four elements of a unit, in the order in which `spread` brings each to
// its elements. The compiler must not know that they grow evenly: it would make each later vector of them anew from a
// scalar, which costs more than the addition.
LISA_INLINE Words four_apart(uint32_t start) {
  Words numbers{};
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = static_cast<uint32_t>(lane % 4 * (kLanes / 4) + lane / 4);
  numbers += start;
#if defined(__SSE2__)
  asm("" : "+x"(numbers));
#endif
  return numbers;
}

inline uint32_t largest_of(Words words) {
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = words[lane] > largest ? words[lane] : largest;
  return largest;
}

inline double sum_of(Doubles values) {
  double sum = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) sum += values[lane];
  return sum;
}

}  // namespace
