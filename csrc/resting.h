// Weights at rest: blocks of 64 in 8 bits, or in NF4's four, two to a byte. The formulas are those of
// lisa_kernels/ops/resting/reference.py.
#pragma once

#include "units.h"

namespace lisa {
namespace {

static_assert(kRestBlock % kUnit == 0, "blocks must be whole units");

constexpr float kInverse127 = 0.007874015718698502f;
// Added to a small number it leaves the nearest integer, ties to even, in the sum's lower bits.
constexpr float kRounding = 0x1.8p23f;
constexpr float kLevels[16] = {-1.0f,
                               -0.6961928009986877f,
                               -0.5250730514526367f,
                               -0.39491748809814453f,
                               -0.28444138169288635f,
                               -0.18477343022823334f,
                               -0.09105003625154495f,
                               0.0f,
                               0.07958029955625534f,
                               0.16093020141124725f,
                               0.24611230194568634f,
                               0.33791524171829224f,
                               0.44070982933044434f,
                               0.5626170039176941f,
                               0.7229568362236023f,
                               1.0f};

// Where the code of each element of a vector lies in eight codes' word: of each byte the upper half comes first.
LISA_INLINE Words places_in_word() {
  Words places{};
  for (uint32_t lane = 0; lane < kLanes; ++lane) places[lane] = lane % 8 / 2 * 8 + (lane % 2 == 0 ? 4 : 0);
  return places;
}

// The codes of a vector of elements.
LISA_INLINE Words halves_of(const uint8_t* codes, Words places) {
  uint32_t words[2] = {};
  std::memcpy(words, codes, kLanes / 2);
  Words all = broadcast(words[0]);
  if constexpr (kLanes == 16) all = first_half(all, broadcast(words[1]));
  return (all >> places) & 15;
}

// The codes of four vectors, in the low bytes of words.
LISA_INLINE Bytes bytes_of(const Words* codes) {
  return pack_unsigned(joined(codes[0] << 16, codes[1] << 16), joined(codes[2] << 16, codes[3] << 16));
}

template <bool four_bits>
LISA_INLINE Words code_of(Floats scaled) {
  if constexpr (!four_bits) return bits_of(scaled + kRounding) & 0xff;
  Ints below{};
  for (int level = 0; level < 15; ++level) below += scaled > (kLevels[level] + kLevels[level + 1]) / 2;
  return reinterpret_cast<Words>(-below);
}

constexpr int kVectorsOfBlock = static_cast<int>(kRestBlock) / kLanes;

template <class Weight>
LISA_INLINE float absmax_of_block(const typename Weight::Storage* from) {
  Words largest = broadcast(kSmallestAbsmax);
  for (int i = 0; i < kVectorsOfBlock; ++i) largest = maximum(largest, magnitude(Weight::load(from + i * kLanes)));
  return absmax_of(largest);
}

template <class Weight, bool four_bits>
LISA_INLINE void rest_block(const typename Weight::Storage* from, float absmax, uint8_t* codes) {
  const Floats scale = broadcast(four_bits ? 1.0f / absmax : 1.0f / absmax * 127.0f);
  const Floats top = broadcast(127.0f);
  alignas(64) uint8_t bytes[kRestBlock];
  for (int i = 0; i < kVectorsOfBlock; i += kVectors) {
    Words unit[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      Floats scaled = Weight::load(from + (i + j) * kLanes) * scale;
      if constexpr (!four_bits) {
        scaled = scaled > top ? top : scaled;
        scaled = scaled < -top ? -top : scaled;
      }
      unit[j] = code_of<four_bits>(scaled);
    }
    store_bytes(bytes + i * kLanes, bytes_of(unit));
  }
  if constexpr (four_bits) {
    for (int i = 0; i < kRestBlock / 2; ++i) codes[i] = static_cast<uint8_t>(bytes[2 * i] << 4 | bytes[2 * i + 1]);
  } else {
    std::memcpy(codes, bytes, kRestBlock);
  }
}

// The record of a group's scales: the lowest one's upper bits with the step below them, and each block's place.
struct Record {
  uint32_t word;
  uint8_t places[kBlocksOfGroup];

  // Of the absmax of so many blocks.
  Record(const float* absmax, int count) : word(kNan), places{} {
    uint32_t bits[kBlocksOfGroup], low = ~0u, high = 0;
    std::memcpy(bits, absmax, sizeof(float) * count);
    for (int i = 0; i < count; ++i) {
      low = bits[i] < low ? bits[i] : low;
      high = bits[i] > high ? bits[i] : high;
    }
    if (high >= kInfinity) return;
    low &= kLow;
    const uint32_t step = (high - low + kSteps * kStepUnit - 1) / (kSteps * kStepUnit);
    word = low | step;
    if (step == 0) return;
    for (int i = 0; i < count; ++i) places[i] = (bits[i] - low + step * (kStepUnit / 2)) / (step * kStepUnit);
  }

  explicit Record(const uint8_t* from) { std::memcpy(this, from, sizeof(Record)); }

  float scale(int block) const { return scalar_of((word & kLow) + places[block] * ((word & ~kLow) * kStepUnit)); }

  static constexpr uint32_t kLow = 0xffff0000, kStepUnit = 256, kSteps = 255;
  static constexpr uint32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;
};

static_assert(sizeof(Record) == 4 + kBlocksOfGroup, "a record has no gaps");

// Where a block of a group begins, and how many elements of it there are, of so many from the group's start on.
struct BlockOfGroup {
  int64_t start;
  int count;

  BlockOfGroup(int block, int64_t left)
      : start(block * kRestBlock), count(static_cast<int>(smaller(kRestBlock, left - start))) {}
  bool whole() const { return count == kRestBlock; }
};

template <class Weight, bool four_bits>
void rest(const RestTask& task, const Scratch&, int64_t begin, int64_t end) {
  using Storage = typename Weight::Storage;
  constexpr int kPerByte = four_bits ? 2 : 1;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kRestGroup, left = smaller(kRestGroup, task.count - first);
    const Storage* from = static_cast<const Storage*>(task.values) + first;
    const int blocks = static_cast<int>((left + kRestBlock - 1) / kRestBlock);
    // The last block of all, with zeros behind it where it ends early.
    Storage last[kRestBlock] = {};
    const BlockOfGroup end_of_all(blocks - 1, left);
    std::memcpy(last, from + end_of_all.start, sizeof(Storage) * end_of_all.count);
    const auto values_of = [&](const BlockOfGroup& block) { return block.whole() ? from + block.start : last; };
    float absmax[kBlocksOfGroup];
    for (int i = 0; i < blocks; ++i) absmax[i] = absmax_of_block<Weight>(values_of({i, left}));
    const Record record(absmax, blocks);
    std::memcpy(task.scales + group * sizeof(Record), &record, sizeof(Record));
    for (int i = 0; i < blocks; ++i) {
      const BlockOfGroup block(i, left);
      uint8_t bytes[kRestBlock];
      rest_block<Weight, four_bits>(values_of(block), record.scale(i), bytes);
      std::memcpy(task.codes + (first + block.start) / kPerByte, bytes, (block.count + kPerByte - 1) / kPerByte);
    }
  }
}

template <class Weight, bool four_bits>
LISA_INLINE void wake_block(const uint8_t* codes, float absmax, typename Weight::Storage* to) {
  constexpr int kCount = static_cast<int>(kRestBlock);
  const Floats scale = broadcast(four_bits ? absmax : absmax * kInverse127);
  if constexpr (four_bits) {
    const Words places = places_in_word();
    const auto value = [&](int i) { return looked_up(kLevels, halves_of(codes + i / 2, places)) * scale; };
    for (int i = 0; i < kCount; i += 2 * kLanes) Weight::store(to + i, value(i), value(i + kLanes));
  } else {
    const auto value = [&](Words upper_byte) {
      return __builtin_convertvector(reinterpret_cast<Ints>(upper_byte) >> 24, Floats) * scale;
    };
    for (int i = 0; i < kCount; i += 2 * kLanes) {
      const Shorts wide = load_bytes(codes + i);
      Weight::store(to + i, value(first_words(wide)), value(second_words(wide)));
    }
  }
}

template <class Weight, bool four_bits>
void wake(const WakeTask& task, const Scratch&, int64_t begin, int64_t end) {
  using Storage = typename Weight::Storage;
  constexpr int kPerByte = four_bits ? 2 : 1;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kRestGroup, left = smaller(kRestGroup, task.count - first);
    const uint8_t* codes = task.codes + first / kPerByte;
    Storage* to = static_cast<Storage*>(task.values) + first;
    const Record record(task.scales + group * sizeof(Record));
    for (int i = 0; i * kRestBlock < left; ++i) {
      const BlockOfGroup block(i, left);
      if (block.whole()) {
        wake_block<Weight, four_bits>(codes + block.start / kPerByte, record.scale(i), to + block.start);
        continue;
      }
      Storage last[kRestBlock];
      uint8_t bytes[kRestBlock] = {};
      std::memcpy(bytes, codes + block.start / kPerByte, (block.count + kPerByte - 1) / kPerByte);
      wake_block<Weight, four_bits>(bytes, record.scale(i), last);
      std::memcpy(to + block.start, last, sizeof(Storage) * block.count);
    }
  }
}

}  // namespace
}  // namespace lisa
