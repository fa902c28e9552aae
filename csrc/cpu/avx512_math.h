// Exponentials and a transpose on 512-bit registers. Internal linkage, as in every file that is
// compiled for one instruction set.
#pragma once
#include <immintrin.h>

namespace longctx::cpu {
namespace {

// 2^x to the relative error of the polynomial, minimax on [0, 1): 3e-6 for degree 4, 8e-8 for 5.
// vreduceps leaves x - floor(x); vscalefps multiplies by 2^floor(x) and underflows to 0 by itself.
// `factor` multiplies the result: a constant, so that it costs nothing.
template <int kDegree>
inline __m512 exp2_ps(__m512 x, float factor = 1.0f) {
  constexpr int kTowardsMinusInfinity = 1;
  const __m512 r = _mm512_reduce_ps(x, kTowardsMinusInfinity);
  const auto set = [factor](float c) { return _mm512_set1_ps(c * factor); };
  const auto step = [&](__m512 p, float c) { return _mm512_fmadd_ps(p, r, set(c)); };
  __m512 p;
  if constexpr (kDegree == 4) {
    p = step(set(0.0135341678f), 0.0520114601f);
    p = step(step(step(p, 0.241442755f), 0.693003833f), 1.00000262f);
  } else {
    static_assert(kDegree == 5);
    p = step(set(0.00187757669f), 0.00898933969f);
    p = step(step(step(step(p, 0.0558263175f), 0.240153611f), 0.693153083f), 0.99999994f);
  }
  return _mm512_scalef_ps(p, x);
}

// An odd polynomial where 1 - 2 / (e^2x + 1) would cancel: a large softcap magnifies what is lost.
inline __m512 tanh_ps(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 z = _mm512_mul_ps(x, x);
  const auto step = [&](__m512 p, float c) { return _mm512_fmadd_ps(p, z, _mm512_set1_ps(c)); };
  __m512 p = step(_mm512_set1_ps(-0.005704934f), 0.020639041f);
  p = step(step(step(p, -0.0537397f), 0.13331442f), -0.3333328f);
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
  // An infinite e gives 1.
  const __m512 e = exp2_ps<5>(_mm512_mul_ps(x, _mm512_set1_ps(2.88539008f)));  // exp(2x)
  const __m512 large =
      _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), _mm512_div_ps(one, _mm512_add_ps(e, one)), one);
  const __mmask16 is_small = _mm512_cmp_ps_mask(z, _mm512_set1_ps(0.390625f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(large, is_small, small);  // 0.390625 = 0.625^2
}

// 16 x 16 dwords, in place.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4 * g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 * g .. 4 * g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace longctx::cpu
