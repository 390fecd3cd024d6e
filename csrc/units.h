// What all kernels share: work in units of whole vectors.
//
// A last unit that is not full goes through a zero-padded copy and the same code, so that no element is computed in
// another way than its neighbours. In an unnamed namespace, as all that is compiled for several instruction sets.
#pragma once

#include "kernels.h"
#include "numbers.h"

namespace lisa {
namespace {

static_assert(kUnit <= kScratchRounding, "scratch must hold whole units");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A copy of up to a unit of values, with zeros behind them.
template <class Value>
struct Padded {
  alignas(64) Value values[kUnit] = {};

  Padded(const Value* from, int count) { std::memcpy(values, from, sizeof(Value) * count); }
};

// Call `body` with the first `count / kUnit` units, then with what is left: body(begin, count of a last unit, or 0).
template <class Body>
LISA_INLINE void for_units(int count, const Body& body) {
  int unit = 0;
  for (; unit + kUnit <= count; unit += kUnit) body(unit, 0);
  if (unit < count) body(unit, count - unit);
}

// As integers, magnitudes order as floats do, and a NaN is the largest: the maximum keeps it, as torch's does.
inline float absmax_of(Words largest) { return scalar_of(largest_of(largest)); }

// Weights of 16 bits are rounded stochastically.
template <class Weight, bool stochastic>
constexpr bool kStochasticWeight = false;
template <bool stochastic>
constexpr bool kStochasticWeight<BFloat16, stochastic> = stochastic;
template <bool stochastic>
constexpr bool kStochasticWeight<Float16, stochastic> = stochastic;

// Store a unit of weights, made vector by vector by value(first element of it); `all_hashes` round them.
template <class Weight, bool stochastic, class Value>
LISA_INLINE void store_weights(typename Weight::Storage* to, Words all_hashes, const RandomConstants& constants,
                               const Value& value) {
  UnitWords hashes{};
  if constexpr (kStochasticWeight<Weight, stochastic>) hashes = spread(all_hashes);
  for (int j = 0; j < kVectors; j += 2) {
    const int i = j * kLanes;
    const Floats first = value(i), second = value(i + kLanes);
    if constexpr (kStochasticWeight<Weight, stochastic>) {
      Weight::store(to + i, first, second, weight_bits(hashes.at[j], constants),
                    weight_bits(hashes.at[j + 1], constants));
    } else {
      (void)constants;
      Weight::store(to + i, first, second);
    }
  }
}

}  // namespace
}  // namespace lisa
