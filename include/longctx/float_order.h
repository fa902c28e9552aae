// The order of scores as integers, for every dtype alike: a float is a sign and a magnitude, and
// so its bits can be ranked and compared with a bound without arithmetic on floats.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"

namespace longctx {

struct FloatFormat {
  uint32_t sign = 0;      // the sign bit
  uint32_t infinity = 0;  // the magnitude of infinity; larger ones are NaN
};

LONGCTX_HD inline FloatFormat float_format(DType dtype) {
  if (dtype == DType::kBFloat16) return {0x8000u, 0x7f80u};
  if (dtype == DType::kFloat16) return {0x8000u, 0x7c00u};
  return {0x80000000u, 0x7f800000u};
}

// Larger keys are better scores. NaN is 0, below -inf; both zeros have the key of +0, which is the
// sign bit.
LONGCTX_HD inline uint32_t order_key(uint32_t bits, FloatFormat format) {
  const uint32_t magnitude = bits & (format.sign - 1);
  const uint32_t ordered =
      (bits & format.sign) != 0 ? (format.sign - 1) - magnitude : format.sign + magnitude;
  const uint32_t key = magnitude == 0 ? format.sign : ordered;
  return magnitude > format.infinity ? 0 : key;
}

// The bits of a key that is not 0.
LONGCTX_HD inline uint32_t key_bits(uint32_t key, FloatFormat format) {
  return key >= format.sign ? key - format.sign : format.sign + (format.sign - 1 - key);
}

LONGCTX_HD inline uint32_t infinity_key(FloatFormat format) {
  return format.sign + format.infinity;
}

// The bits that lie in [low, low + range], unsigned in the width of the dtype, and whose magnitude
// is at most `magnitude`. The first condition alone leaves over few scores but NaN.
struct BitRange {
  uint32_t low = 0;
  uint32_t range = 0;
  uint32_t magnitude = 0;
  uint32_t sign = 0;
};

// The scores whose key is at least `bound`. The caller has excluded bounds above infinity, which no
// score reaches.
LONGCTX_HD inline BitRange bits_from_key(uint32_t bound, FloatFormat format) {
  const uint32_t sign = format.sign, infinity = format.infinity;
  if (bound == 0) return {0, sign | (sign - 1), sign - 1, sign};
  const uint32_t lowest = sign - 1 - infinity;  // the key of -inf: none lies between it and 0
  if (bound <= lowest) bound = lowest;
  if (bound > sign) return {bound - sign, infinity_key(format) - bound, infinity, sign};
  // From +0 upwards, then through the negative numbers to the bound; to -0 for a bound of 0.
  return {0, bound == sign ? sign : key_bits(bound, format), infinity, sign};
}

}  // namespace longctx
