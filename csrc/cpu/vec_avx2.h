// Vec<float> in 256-bit registers, with fused multiply-add and F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "reduced_float.h"
#include "vec_math.h"

namespace longctx::cpu {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  static constexpr int kBlockRows = 6;  // register block of the products: rows x vectors
  static constexpr int kBlockVecs = 2;

  __m256 v;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  // Elements of even and of odd index: one instruction each, where widening in order takes two.
  static void load_pair(const BFloat16* p, Vec& even, Vec& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))};
  }
  static Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where a is NaN
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where a is NaN
  friend bool any_greater(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  // Lane i of a where bit i of `bits` is set, else of b.
  friend Vec select(uint32_t bits, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(chosen))};
  }
  friend Vec select_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
  }
  // The first and the second half of a0 b0 a1 b1 ...
  friend Vec zip_low(Vec a, Vec b) { return zip_halves<0x20>(a, b); }
  friend Vec zip_high(Vec a, Vec b) { return zip_halves<0x31>(a, b); }
  // Adds floor(t) to the exponent of 2^fraction. Results below 2^-126 are 0, above 2^127 they stay
  // there; the operand order of min and max lets a NaN through.
  friend Vec exp(Vec x) {
    const __m256 lowest = _mm256_set1_ps(-126.0f);
    const __m256 t = _mm256_mul_ps(x.v, _mm256_set1_ps(kLog2E));
    const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(lowest, t));
    const __m256 whole = _mm256_floor_ps(clamped);
    const Vec p = exp2_fraction(Vec{_mm256_sub_ps(clamped, whole)});
    const __m256i shift = _mm256_slli_epi32(_mm256_cvttps_epi32(whole), 23);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shift));
    return {_mm256_andnot_ps(_mm256_cmp_ps(t, lowest, _CMP_LT_OQ), scaled)};
  }
  friend Vec tanh(Vec x) { return tanh_from_exp(x); }

 private:
  template <int kHalves>
  static Vec zip_halves(Vec a, Vec b) {
    const __m256 even = _mm256_unpacklo_ps(a.v, b.v);
    const __m256 odd = _mm256_unpackhi_ps(a.v, b.v);
    return {_mm256_permute2f128_ps(even, odd, kHalves)};
  }
};

inline void widen_row(const Float16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

}  // namespace
}  // namespace longctx::cpu
