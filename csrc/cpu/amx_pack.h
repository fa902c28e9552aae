// Layouts of the AMX engine. Everything is a sequence of tiles of 16 rows x 64 bytes.
// A bf16 element is itself; an fp16 element is the exact sum of two bf16 parts, a float of three. A
// product of two such elements takes three or six tile products, small ones first; those left out
// are below the rounding of the dtype. An infinite float becomes NaN in a product with a low part.
//   q:  [part][depth step][half] tile of 16 pairs of depth x 16 queries       (B operand)
//   k:  [16 slots][part][depth step] tile of 16 slots x 32 of depth           (A operand)
//   v^T: [16 columns][part][32 slots] tile of 16 value columns x 32 slots     (A operand)
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "avx512_math.h"
#include "reduced_float.h"
#include "strip_engine.h"

// Products and exponentials interleave only if everything between two tile products is inlined;
// left to itself, GCC calls the exponentials with their sums and constants in memory.
#define LONGCTX_ALWAYS_INLINE __attribute__((always_inline))

namespace longctx::cpu {
namespace {

constexpr int kTileBytes = 1024;
constexpr int kTileRow = 64;  // bytes
constexpr int kDepth = 32;    // bf16 elements of a tile row

template <class In>
constexpr int kParts = 1;
template <>
constexpr int kParts<Float16> = 2;
template <>
constexpr int kParts<float> = 3;

inline int64_t depth_steps(const StripShape& shape) { return (shape.head_dim + 31) / 32; }
inline int64_t value_tiles(const StripShape& shape) { return (shape.head_dim_v + 15) / 16; }

// The two halves of 32 bf16 in the order of a B operand: words 2 * i and 2 * i + 1.
inline __m512 even_words(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline __m512 odd_words(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32(~0xffff)));
}
// The inverse, cutting off the lower half of each float.
inline __m512i truncate_pairs(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                 _mm512_castps_si512(odd));
}

// x less its bf16 part; nothing is left of what is not finite.
inline __m512 rest_of(__m512 x, __m256i part) {
  constexpr int kNotFinite = 0x99;
  const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(x, kNotFinite));
  return _mm512_maskz_sub_ps(finite, x, even_words(_mm512_cvtepu16_epi32(part)));
}

// 32 elements, of which `mask` exist, as bf16 parts.
template <class In>
inline void load_parts(const void* from, __mmask32 mask, __m512i* parts) {
  if constexpr (kParts<In> == 1) {
    parts[0] = _mm512_maskz_loadu_epi16(mask, from);
  } else {
    __m512 x0, x1;
    if constexpr (kParts<In> == 2) {
      const __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
      x0 = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
      x1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    } else {
      const float* row = static_cast<const float*>(from);
      x0 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row);
      x1 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + 16);
    }
    for (int part = 0; part < kParts<In>; ++part) {
      parts[part] = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
      x0 = rest_of(x0, _mm512_castsi512_si256(parts[part]));
      x1 = rest_of(x1, _mm512_extracti64x4_epi64(parts[part], 1));
    }
  }
}

inline __mmask32 depth_mask(int64_t size, int64_t begin) {
  const int64_t left = size - begin;
  return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

template <class In>
void pack_query_tiles(const StripShape& shape, const void* const* rows, int num_rows, char* to) {
  const int64_t steps = depth_steps(shape);
  for (int half = 0; half < 2; ++half) {
    for (int64_t step = 0; step < steps; ++step) {
      const __mmask32 mask = depth_mask(shape.head_dim, step * kDepth);
      __m512i tiles[kParts<In>][16];
      for (int r = 0; r < 16; ++r) {
        const int row = half * 16 + r;
        __m512i parts[kParts<In>] = {};
        if (row < num_rows) {
          load_parts<In>(static_cast<const In*>(rows[row]) + step * kDepth, mask, parts);
        }
        for (int part = 0; part < kParts<In>; ++part) tiles[part][r] = parts[part];
      }
      for (int part = 0; part < kParts<In>; ++part) {
        transpose16(tiles[part]);
        char* tile = to + ((part * steps + step) * 2 + half) * kTileBytes;
        for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + r * kTileRow, tiles[part][r]);
      }
    }
  }
}

template <class In>
void pack_key_tiles(const StripShape& shape, const void* const* rows, char* to) {
  const int64_t steps = depth_steps(shape);
  for (int r = 0; r < 16; ++r) {
    for (int64_t step = 0; step < steps; ++step) {
      __m512i parts[kParts<In>];
      load_parts<In>(static_cast<const In*>(rows[r]) + step * kDepth,
                     depth_mask(shape.head_dim, step * kDepth), parts);
      for (int part = 0; part < kParts<In>; ++part) {
        _mm512_store_si512(to + (part * steps + step) * kTileBytes + r * kTileRow, parts[part]);
      }
    }
  }
}

// 32 slots x 32 value columns: interleaving two slots makes dwords, which are then transposed.
// Columns beyond head_dim_v become zero rows; a tile wholly beyond it is not written.
template <class In>
void pack_value_tiles(const StripShape& shape, const void* const* rows, int64_t column, char* to,
                      int64_t tile_stride, int64_t part_stride) {
  const __mmask32 mask = depth_mask(shape.head_dim_v, column);
  __m512i low[kParts<In>][16], high[kParts<In>][16];
  for (int pair = 0; pair < 16; ++pair) {
    __m512i even[kParts<In>], odd[kParts<In>];
    load_parts<In>(static_cast<const In*>(rows[2 * pair]) + column, mask, even);
    load_parts<In>(static_cast<const In*>(rows[2 * pair + 1]) + column, mask, odd);
    for (int part = 0; part < kParts<In>; ++part) {
      low[part][pair] = _mm512_unpacklo_epi16(even[part], odd[part]);
      high[part][pair] = _mm512_unpackhi_epi16(even[part], odd[part]);
    }
  }
  const bool two_tiles = shape.head_dim_v - column > 16;
  for (int part = 0; part < kParts<In>; ++part) {
    transpose16(low[part]);
    transpose16(high[part]);
    // unpack works within 128 bits: low holds columns 8 * i + 0..3, high 8 * i + 4..7.
    for (int i = 0; i < (two_tiles ? 4 : 2); ++i) {
      char* tile = to + part * part_stride + (i / 2) * tile_stride + (i % 2) * 8 * kTileRow;
      for (int c = 0; c < 4; ++c) {
        _mm512_store_si512(tile + c * kTileRow, low[part][4 * i + c]);
        _mm512_store_si512(tile + (4 + c) * kTileRow, high[part][4 * i + c]);
      }
    }
  }
}

}  // namespace
}  // namespace longctx::cpu
