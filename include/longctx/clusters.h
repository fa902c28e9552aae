// What k-means does on every device alike, to the bit: masses by which seeds are drawn are summed
// as integers, whose order does not matter, and rows of a cluster in one order.
#pragma once
#include <cmath>
#include <cstdint>

#include "longctx/config.h"

namespace longctx {

// In [0, 1), from `seed` and the number of the round: SplitMix64.
LONGCTX_HD inline double seed_uniform(uint64_t seed, uint64_t round) {
  uint64_t z = seed + (round + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

// |x - c|^2 given |x|^2 and the score x . c - |c|^2 / 2. What rounding leaves of equal points is 0.
template <class T>
LONGCTX_HD inline T seed_square_distance(T square, T score) {
  const T nothing = sizeof(T) == 8 ? T(0x1p-46) : T(0x1p-18);
  const T distance = square - 2 * score;
  return distance > nothing * square ? distance : T(0);
}

// What masses are multiplied by before they are rounded down to integers, the largest of `count`
// given: their sum fits 62 bits. 0 where there is nothing to draw from.
LONGCTX_HD inline double seed_mass_factor(double largest, int64_t count) {
  if (!(largest > 0.0 && largest < static_cast<double>(INFINITY))) return 0.0;
  int exponent = 0, count_bits = 0;
  frexp(largest, &exponent);
  while ((count >> count_bits) != 0) ++count_bits;
  const int shift = 62 - exponent - count_bits;
  return ldexp(1.0, shift < 1000 ? shift : 1000);
}

// Marks spaced evenly over the sum of all masses, from a random offset on.
struct SeedMarks {
  int64_t count = 0;
  double offset = 0.0;
  double step = 0.0;

  LONGCTX_HD SeedMarks(int64_t num_marks, int64_t total, double random)
      : count(num_marks),
        offset(random),
        step(static_cast<double>(total) / static_cast<double>(num_marks)) {}

  // Whether the running sum passes mark number `mark`.
  LONGCTX_HD bool passes(int64_t sum, int64_t mark) const {
    return mark < count && (static_cast<double>(mark) + offset) * step < static_cast<double>(sum);
  }
  // How many marks the running sum passes; `inverse_step` is about 1 / step.
  LONGCTX_HD int64_t num_passed(int64_t sum, double inverse_step) const {
    auto mark = static_cast<int64_t>(static_cast<double>(sum) * inverse_step - offset);
    mark = mark < 0 ? 0 : mark > count ? count : mark;
    while (passes(sum, mark)) ++mark;
    while (mark > 0 && !passes(sum, mark - 1)) --mark;
    return mark;
  }
};

// Rows of a cluster are summed in runs of this many, of at most kMemberRuns, and then the runs.
constexpr int kMemberRuns = 4;
LONGCTX_HD inline int64_t member_run(int64_t num_members) {
  const int64_t even = (num_members + kMemberRuns - 1) / kMemberRuns;
  return even < 32 ? 32 : even;
}

}  // namespace longctx
