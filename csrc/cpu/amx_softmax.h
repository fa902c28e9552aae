// The softmax of the AMX engine on [32 keys][32 queries] of scores: softcap, mask, exponentials.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "amx_pack.h"
#include "avx512_math.h"
#include "longctx/mask.h"
#include "strip_engine.h"

namespace longctx::cpu {
namespace {

constexpr float kSumLimit = 0x1p60f;
constexpr double kDoubleLog2E = 1.4426950408889634;
constexpr float kLog2E = static_cast<float>(kDoubleLog2E);
constexpr float kInf = std::numeric_limits<float>::infinity();

// The exponentials of one key tile, two keys at a time so that products can run in between.
template <int kNumParts>
struct Exponentials {
  // Probabilities are truncated to bf16, which costs half the instructions of rounding. Scaled up
  // by the mean truncation first, they are as good as rounded ones.
  static constexpr float kRoundUp = kNumParts == 1 ? 1.0028178f : 1.0f;

  Exponentials(float scale_log2, const float* reference, const float* from, char* to)
      : scale(_mm512_set1_ps(scale_log2)), scores(from), probabilities(to) {
    for (int half = 0; half < 2; ++half) {
      const __m512 r = _mm512_load_ps(reference + half * 16);
      offset[half] = r;
      sums[half] = sums[2 + half] = _mm512_setzero_ps();
    }
  }

  LONGCTX_ALWAYS_INLINE void pair(int index) {
    for (int half = 0; half < 2; ++half) {
      const float* s = scores + index * 2 * kStripRows + half * 16;
      const __m512 p0 = power(_mm512_fmsub_ps(_mm512_load_ps(s), scale, offset[half]));
      const __m512 p1 = power(_mm512_fmsub_ps(_mm512_load_ps(s + kStripRows), scale, offset[half]));
      sums[half] = _mm512_add_ps(sums[half], p0);
      sums[2 + half] = _mm512_add_ps(sums[2 + half], p1);
      char* row = probabilities + half * kTileBytes + index * kTileRow;
      __m512 rest0 = p0, rest1 = p1;
#pragma GCC unroll 3
      for (int part = 0; part < kNumParts; ++part, row += 2 * kTileBytes) {
        const __m512i words = truncate_pairs(rest0, rest1);
        _mm512_store_si512(row, words);
        rest0 = _mm512_sub_ps(rest0, even_words(words));
        rest1 = _mm512_sub_ps(rest1, odd_words(words));
      }
    }
  }

  LONGCTX_ALWAYS_INLINE void pairs(int begin, int end) {
#pragma GCC unroll 16
    for (int index = begin; index < end; ++index) pair(index);
  }

  // Adds the tile to the rows' sums, unless one of them outgrew its reference.
  bool commit(float* sum) const {
    const __m512 s0 = _mm512_add_ps(sums[0], sums[2]);
    const __m512 s1 = _mm512_add_ps(sums[1], sums[3]);
    const __m512 limit = _mm512_set1_ps(kSumLimit);
    const __mmask16 high =
        _mm512_cmp_ps_mask(s0, limit, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(s1, limit, _CMP_NLE_UQ);
    if (__builtin_expect(high != 0, 0)) return false;
    add(sum);
    return true;
  }
  void add(float* sum) const {
    for (int half = 0; half < 2; ++half) {
      const __m512 tile = _mm512_add_ps(sums[half], sums[2 + half]);
      _mm512_store_ps(sum + half * 16, _mm512_add_ps(_mm512_load_ps(sum + half * 16), tile));
    }
  }

  static __m512 power(__m512 x) { return exp2_ps<kNumParts == 3 ? 5 : 4>(x, kRoundUp); }

  __m512 scale, offset[2], sums[4];
  const float* scores;
  char* probabilities;
};

// -inf, the reference of a row that saw nothing, cannot be subtracted.
inline __m512 finite(__m512 x) {
  return _mm512_max_ps(x, _mm512_set1_ps(std::numeric_limits<float>::lowest()));
}

inline void cap_scores(const StripShape& shape, float* scores, float cap) {
  const __m512 inner = _mm512_set1_ps(static_cast<float>(shape.softmax_scale / shape.softcap));
  for (int i = 0; i < kKeyTile * kStripRows; i += 16) {
    const __m512 t = tanh_ps(_mm512_mul_ps(_mm512_load_ps(scores + i), inner));
    _mm512_store_ps(scores + i, _mm512_mul_ps(t, _mm512_set1_ps(cap)));
  }
}

// Applies softcap and mask in place; returns the factor that takes the scores to powers of two.
inline float adjust_scores(const StripShape& shape, const ChunkMask& mask, int64_t tile,
                           float* scores) {
  const bool partial = static_cast<Visibility>(mask.tiles[tile]) == Visibility::kPartial;
  const bool capped = shape.softcap > 0;
  if (capped) cap_scores(shape, scores, static_cast<float>(shape.softcap * kLog2E));
  if (!partial) return capped ? 1.0f : shape.scale_log2;
  const __m512 scale = _mm512_set1_ps(capped ? 1.0f : shape.scale_log2);
  const __m512 hidden = _mm512_set1_ps(-kInf);
  for (int key = 0; key < kKeyTile; ++key) {
    const uint32_t visible = mask.visible[tile * kKeyTile + key];
    for (int half = 0; half < 2; ++half) {
      float* s = scores + key * kStripRows + half * 16;
      const auto lanes = static_cast<__mmask16>(visible >> (half * 16));
      _mm512_store_ps(s, _mm512_mask_mul_ps(hidden, lanes, _mm512_load_ps(s), scale));
    }
  }
  return 1.0f;
}

// The slots of a key tile that some row sees.
inline __mmask32 seen_slots(const ChunkMask& mask, int tile) {
  if (static_cast<Visibility>(mask.tiles[tile]) != Visibility::kPartial) return ~__mmask32{0};
  const uint32_t* visible = mask.visible + tile * kKeyTile;
  const __m512i low = _mm512_loadu_si512(visible), high = _mm512_loadu_si512(visible + 16);
  return _mm512_test_epi32_mask(low, low) |
         static_cast<__mmask32>(_mm512_test_epi32_mask(high, high)) << 16;
}

}  // namespace
}  // namespace longctx::cpu
