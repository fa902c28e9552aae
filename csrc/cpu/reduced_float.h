// The 16-bit floating point types and their conversions, without branches so that loops over them
// vectorise. Internal linkage: files with different instruction sets must not share this code.
#pragma once
#include <cstdint>

#include "longctx/params.h"

namespace longctx::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // Subnormal: put the mantissa below 2^-14 and subtract 2^-14 again.
  const uint32_t subnormal = float_bits(bits_float(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t rebias = exponent == 0x0f800000u ? 224u << 23 : 112u << 23;  // inf, nan: to 255
  return bits_float(sign | (exponent == 0 ? subnormal : magnitude + rebias));
}

// Round to nearest even.
inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }

inline void narrow(float x, BFloat16& y) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

inline void narrow(float x, Float16& y) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal result: adding 0.5 aligns the mantissa so that the addition itself rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  y.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace
}  // namespace longctx::cpu
