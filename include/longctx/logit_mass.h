// Softmax weights as integers, so that every device cuts a cumulative sum at the same score: the
// operations are those on integers, and on floats one subtraction and one product.
#pragma once
#include <cstdint>

#include "longctx/config.h"

namespace longctx {

// exp(score - best) * 2^shift, shift <= 40, to a relative 2e-7 and rounded down. `best` is the
// highest score; NaN and -inf weigh nothing, and beside +inf only +inf weighs anything.
LONGCTX_HD inline int64_t logit_mass(float score, float best, int shift) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kBinades = 42.0f;  // beyond, even 2^40 times the weight is below 1
  const float binades = (best - score) * kLog2E;
  // NaN compares false.
  const float near = score == best ? 0.0f : (binades < kBinades ? binades : kBinades);
  const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>(near * 16777216.0f));
  const uint32_t whole = fixed >> 24;
  const uint64_t fraction = fixed & 0xffffffu;
  // 2^-fraction in units of 2^-30: a polynomial that is exact at 0.
  uint64_t p = 1008956;
  p = 9871774 - (p * fraction >> 24);
  p = 59364965 - (p * fraction >> 24);
  p = 257888339 - (p * fraction >> 24);
  p = 744257104 - (p * fraction >> 24);
  p = 1073741824 - (p * fraction >> 24);
  return static_cast<int64_t>((p << 10) >> (40 - shift + whole));
}

// The shift that leaves room for the sum over a row.
LONGCTX_HD inline int logit_mass_shift(int64_t length) {
  int length_bits = 0;
  while (length_bits < 63 && (length >> length_bits) != 0) ++length_bits;
  return length_bits <= 21 ? 40 : 61 - length_bits;
}

}  // namespace longctx
