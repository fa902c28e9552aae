// How blocks are ranked and weighed, in integers, so that every device cuts at the same block.
// Order: score descending, then index ascending. -0 equals +0; NaN counts as -inf, and -inf is
// never chosen.
#pragma once
#include <cstdint>
#include <cstring>

#include "longctx/config.h"

namespace longctx {

LONGCTX_HD inline uint32_t score_bits(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  return bits;
}

// Larger keys are better scores; 0 is "never chosen".
LONGCTX_HD inline uint32_t score_key(float score) {
  const uint32_t bits = score_bits(score + 0.0f);  // -0 + 0 is +0
  const uint32_t key = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return score > -__builtin_huge_valf() ? key : 0;
}

// The score whose key this is: +0 for both zeros, -inf for whatever is never chosen.
LONGCTX_HD inline float key_score(uint32_t key) {
  if (key == 0) return -__builtin_huge_valf();
  const uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}

// Where the list of chosen entries ends: entries better than `key`, and those at `key` up to index
// `last_index`.
struct ScoreCut {
  uint32_t key = 0xffffffffu;
  int64_t last_index = -1;  // the default chooses nothing
  LONGCTX_HD bool chooses(uint32_t entry_key, int64_t index) const {
    return (entry_key > key) | ((entry_key == key) & (index <= last_index));
  }
};

// Everything at or above `limit`; nothing if it is NaN.
LONGCTX_HD inline ScoreCut cut_at(float limit) {
  if (limit != limit) return {};
  const uint32_t key = score_key(limit);
  return {key == 0 ? 1 : key, INT64_MAX};
}

// The mass of a score is floor(ldexp(score, shift)). The shift puts the best of `num_entries`
// scores at 2^40, or lower where 2^21 entries and more could overflow the sum.
LONGCTX_HD inline int mass_shift(float best, int64_t num_entries) {
  int entry_bits = 0;
  while (entry_bits < 63 && (num_entries >> entry_bits) != 0) ++entry_bits;
  uint32_t bits = score_bits(best);
  if (bits >= 0x7f800000u) bits = 0x7f7fffffu;
  int exponent = static_cast<int>(bits >> 23) - 127;
  if (bits < 0x00800000u) {
    exponent = -150;
    while ((bits >>= 1) != 0) ++exponent;
    ++exponent;
  }
  return (entry_bits <= 21 ? 40 : 61 - entry_bits) - exponent;
}

// Negative scores and NaN have no mass; +inf has that of the largest finite number.
LONGCTX_HD inline int64_t score_mass(float score, int shift) {
  if (!(score > 0.0f)) return 0;
  uint32_t bits = score_bits(score);
  if (bits >= 0x7f800000u) bits = 0x7f7fffffu;
  const uint32_t field = bits >> 23;
  const int64_t mantissa = field == 0 ? bits : (bits & 0x007fffffu) | 0x00800000u;
  const int left = static_cast<int>(field == 0 ? 1 : field) - 150 + shift;
  if (left >= 0) return mantissa << left;
  return left > -32 ? mantissa >> -left : 0;
}

// The mass that a cumulative cut must reach: ceil(value * total), value clamped to [0, 1].
LONGCTX_HD inline int64_t mass_target(float value, int64_t total) {
  if (!(value > 0.0f)) return 0;
  if (value >= 1.0f) return total;
  const double exact = static_cast<double>(value) * static_cast<double>(total);
  int64_t target = static_cast<int64_t>(exact);
  if (static_cast<double>(target) < exact) ++target;
  return target < total ? target : total;
}

}  // namespace longctx
