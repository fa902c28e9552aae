// Vec<float> in 512-bit registers.
#pragma once
#include <cstdint>

// GCC 12 takes the undefined pass-through operand in its own header for a bug.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "reduced_float.h"
#include "vec_math.h"

namespace longctx::cpu {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  static constexpr int kBlockRows = 12;  // register block of the products: rows x vectors
  static constexpr int kBlockVecs = 2;

  __m512 v;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // Elements of even and of odd index: one instruction each, where widening in order takes two.
  static void load_pair(const BFloat16* p, Vec& even, Vec& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)))};
  }
  static Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where a is NaN
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where a is NaN
  friend bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  // Lane i of a where bit i of `bits` is set, else of b.
  friend Vec select(uint32_t bits, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
  }
  friend Vec select_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), a.v)};
  }
  // The first and the second half of a0 b0 a1 b1 ...
  friend Vec zip_low(Vec a, Vec b) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
  }
  friend Vec zip_high(Vec a, Vec b) {
    const __m512i order =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {_mm512_permutex2var_ps(a.v, order, b.v)};
  }
  // scalef multiplies by 2^floor(t) and handles underflow, overflow and -inf itself.
  friend Vec exp(Vec x) {
    constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;  // t - floor(t)
    const __m512 t = _mm512_mul_ps(x.v, _mm512_set1_ps(kLog2E));
    const Vec p = exp2_fraction(Vec{_mm512_reduce_ps(t, kFraction)});
    return {_mm512_scalef_ps(p.v, t)};
  }
  friend Vec tanh(Vec x) { return tanh_from_exp(x); }
};

inline void widen_row(const Float16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

}  // namespace
}  // namespace longctx::cpu
