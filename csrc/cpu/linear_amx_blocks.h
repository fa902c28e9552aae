// Blocks of 32 x 32 results of linear attention on AMX: their product, and what the vector unit
// makes of them while the tile unit is at the next one. A product calls between() four times a step
// of depth; each of the structs below is a block's work, done a few rows at a time by advance().
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "amx_pack.h"
#include "amx_products.h"
#include "linear_engine.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kSide = 32;  // rows and columns of a block
constexpr int64_t kHalves = kLinearChunk / kSide;

// Parts of the factors of the products of kNumParts parts: neighbours share a factor, which stays
// in its tiles. Products left out are below the rounding of the dtype.
template <int kNumParts>
constexpr int kOrder[6][2] = {{0, 0}};
template <>
constexpr int kOrder<2>[6][2] = {{1, 0}, {0, 0}, {0, 1}};
template <>
constexpr int kOrder<3>[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

// Tiles of one factor of a block; strides in bytes.
struct Tiles {
  const char* data;
  int64_t row;     // from one tile row to the next
  int64_t second;  // to the other 16 rows (A) or columns (B) of the block
  int64_t step;    // to the next 32 of depth
  int64_t part;
};

// block = a b over `steps` of depth, [32][32] float.
template <int kNumParts, class Between>
LONGCTX_ALWAYS_INLINE inline void multiply_block(const Tiles& a, const Tiles& b, int64_t steps,
                                                 float* block, const Between& between) {
  zero_tiles();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 6
    for (int n = 0; n < kNumProducts<kNumParts>; ++n) {
      const char* a0 = a.data + step * a.step + kOrder<kNumParts>[n][0] * a.part;
      const char* b0 = b.data + step * b.step + kOrder<kNumParts>[n][1] * b.part;
      const bool new_a = n == 0 || kOrder<kNumParts>[n][0] != kOrder<kNumParts>[n - 1][0];
      const bool new_b = n == 0 || kOrder<kNumParts>[n][1] != kOrder<kNumParts>[n - 1][1];
      if (new_b) _tile_loadd(6, b0, kTileRow);
      if (new_a) _tile_loadd(4, a0, a.row);
      _tile_dpbf16ps(0, 4, 6);
      if (4 * n % kNumProducts<kNumParts> == 0) between();
      if (new_b) _tile_loadd(7, b0 + b.second, kTileRow);
      _tile_dpbf16ps(1, 4, 7);
      if ((4 * n + 1) % kNumProducts<kNumParts> == 0) between();
      if (new_a) _tile_loadd(5, a0 + a.second, a.row);
      _tile_dpbf16ps(2, 5, 6);
      if ((4 * n + 2) % kNumProducts<kNumParts> == 0) between();
      _tile_dpbf16ps(3, 5, 7);
      if ((4 * n + 3) % kNumProducts<kNumParts> == 0) between();
    }
  }
  store_scores(block);
}

// 32 floats as bf16 parts.
template <int kNumParts, class Store>
LONGCTX_ALWAYS_INLINE inline void split(__m512 x0, __m512 x1, const Store& store) {
#pragma GCC unroll 3
  for (int part = 0; part < kNumParts; ++part) {
    const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    store(part, pair);
    if (part + 1 == kNumParts) break;
    x0 = rest_of(x0, _mm512_castsi512_si256(pair));
    x1 = rest_of(x1, _mm512_extracti64x4_epi64(pair, 1));
  }
}

// 32 columns of a row of out; `stream` goes past the caches where they fill
// cache lines.
template <class In>
LONGCTX_ALWAYS_INLINE inline void store_outputs(__m512 x0, __m512 x1, __mmask32 mask, bool stream,
                                                In* out) {
  stream = stream && mask == ~__mmask32{0} && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if constexpr (kParts<In> == 3) {
    if (stream) {
      _mm512_stream_ps(out, x0);
      _mm512_stream_ps(out + 16, x1);
    } else {
      _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), x0);
      _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(mask >> 16), x1);
    }
  } else if constexpr (kParts<In> == 2) {
    const __m256i low = _mm512_cvtps_ph(x0, _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph(x1, _MM_FROUND_TO_NEAREST_INT);
    _mm512_mask_storeu_epi16(out, mask, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  } else {
    const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), row);
    } else {
      _mm512_mask_storeu_epi16(out, mask, row);
    }
  }
}

// p = pairs * scores, as A operand.
template <int kNumParts>
struct ScoreBlock {
  LONGCTX_ALWAYS_INLINE void advance() {
    if (row >= kSide) return;
    write(row);
    write(row + 1);
    row += 2;
  }
  void finish() {
    while (row < kSide) advance();
  }
  LONGCTX_ALWAYS_INLINE void write(int64_t i) const {
    char* to = p + i / 16 * kNumParts * kHalves * kTileBytes + i % 16 * kTileRow;
    split<kNumParts>(weighted(i, 0), weighted(i, 16), [&](int part, __m512i words) {
      _mm512_store_si512(to + part * kHalves * kTileBytes, words);
    });
  }
  LONGCTX_ALWAYS_INLINE __m512 weighted(int64_t i, int64_t j) const {
    const __m512 weight = _mm512_loadu_ps(pairs + i * kLinearChunk + j);
    // Where the weight is 0 a score may be anything.
    const __mmask16 counts = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return _mm512_maskz_mul_ps(counts, weight, _mm512_load_ps(scores + i * kSide + j));
  }

  const float* pairs = nullptr;   // [32] rows of [kLinearChunk]
  const float* scores = nullptr;  // [32][32]
  char* p = nullptr;              // [16 rows][part][32 keys] tiles
  int64_t row = kSide;            // next
};

// weights[row] inter + intra, to out or else to acc.
template <class In>
struct OutputBlock {
  LONGCTX_ALWAYS_INLINE void advance() {
    if (row >= num_rows) return;
    write(row);
    if (row + 1 < num_rows) write(row + 1);
    row += 2;
  }
  void finish() {
    while (row < num_rows) advance();
  }
  LONGCTX_ALWAYS_INLINE void write(int64_t i) const {
    const __m512 x0 = joined(i, 0), x1 = joined(i, 16);
    if (out != nullptr) {
      const __m512 factor = _mm512_set1_ps(scale);
      store_outputs<In>(_mm512_mul_ps(x0, factor), _mm512_mul_ps(x1, factor), mask, stream,
                        out + i * stride);
    } else {
      _mm512_store_ps(acc + i * stride, x0);
      _mm512_store_ps(acc + i * stride + 16, x1);
    }
  }
  LONGCTX_ALWAYS_INLINE __m512 joined(int64_t i, int64_t c) const {
    const int64_t at = i * kSide + c;
    const __m512 x = intra != nullptr ? _mm512_load_ps(intra + at) : _mm512_setzero_ps();
    if (weights == nullptr) return x;
    return _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), _mm512_load_ps(inter + at), x);
  }

  const float* weights = nullptr;  // [32]; null: without inter
  const float* inter = nullptr;    // [32][32]
  const float* intra = nullptr;    // [32][32]; null: zero
  In* out = nullptr;               // [num_rows] rows of up to 32 columns
  float* acc = nullptr;            // [32] rows of 32 columns
  int64_t stride = 0;              // of out or acc
  int64_t num_rows = 0;
  int64_t row = 0;  // next
  float scale = 1.0f;
  __mmask32 mask = 0;
  bool stream = false;
};

// s = carry s + added, and its tiles as B operand.
template <int kNumParts>
struct StateBlock {
  static constexpr int64_t kPairs = kSide / 2;
  LONGCTX_ALWAYS_INLINE void advance() {
    if (pair >= kPairs) return;
    add(pair);
    add(pair + 1);
    pair += 2;
  }
  void finish() {
    while (pair < kPairs) advance();
  }
  LONGCTX_ALWAYS_INLINE void add(int64_t index) const {
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 factor = _mm512_set1_ps(carry);
    // A carry of 0 forgets: what was there is not read.
    const __mmask16 kept = carry == 0.0f ? 0 : 0xffff;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* even_row = s + 2 * index * kSide + half * 16;
      const float* from = added + 2 * index * kSide + half * 16;
      const __m512 even =
          _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kept, even_row), factor, _mm512_load_ps(from));
      const __m512 odd = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kept, even_row + kSide), factor,
                                         _mm512_load_ps(from + kSide));
      _mm512_store_ps(even_row, even);
      _mm512_store_ps(even_row + kSide, odd);
      char* row = tiles + half * kTileBytes + index * kTileRow;
      split<kNumParts>(even, odd, [&](int part, __m512i words) {
        _mm512_store_si512(row + part * part_stride, _mm512_permutexvar_epi16(interleave, words));
      });
    }
  }

  float* s = nullptr;            // [32][32]
  char* tiles = nullptr;         // [part] of [16 columns] tiles of 16 pairs of depth x 16 columns
  int64_t part_stride = 0;       // bytes
  const float* added = nullptr;  // [32][32]
  float carry = 0.0f;
  int64_t pair = kPairs;  // of rows, next
};

// Brings rows into the L2 cache, a line at a time: a burst would take the line fill buffers from
// the tile loads. Inlined, or GCC takes a function that only prefetches for one without effect.
struct RowPrefetch {
  LONGCTX_ALWAYS_INLINE void advance() {
    if (rows == 0) return;
    _mm_prefetch(row + at, _MM_HINT_T1);
    at += 64;
    if (at < bytes) return;
    at = 0;
    row += stride;
    --rows;
  }

  const char* row = nullptr;  // next
  int64_t stride = 0;         // bytes
  int64_t bytes = 0;          // of a row
  int64_t rows = 0;           // left
  int64_t at = 0;             // of the row, next
};

}  // namespace
}  // namespace longctx::cpu
