// Operands of linear attention on AMX made from rows of k and v. What the tile products do not wait
// for is a struct that works a little at a time, between them.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "amx_pack.h"
#include "linear_amx_blocks.h"
#include "linear_engine.h"

namespace longctx::cpu {
namespace {

// k^T of 32 whole rows, as B operand: [part][depth step][16 keys] tiles of 16 pairs of depth.
template <class In>
void transpose_keys(const In* k, int64_t stride, int64_t head_dim, char* to) {
  constexpr int kNumParts = kParts<In>;
  const int64_t steps = (head_dim + kDepth - 1) / kDepth;
  const int64_t part_stride = steps * 2 * kTileBytes;
  for (int64_t step = 0; step < steps; ++step) {
    const __mmask32 mask = depth_mask(head_dim, step * kDepth);
    for (int64_t half = 0; half < 2; ++half, to += kTileBytes) {
      const In* from = k + half * 16 * stride + step * kDepth;
      __m512i x[kNumParts][16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        __m512i parts[kNumParts];
        load_parts<In>(from + i * stride, mask, parts);
        for (int part = 0; part < kNumParts; ++part) x[part][i] = parts[part];
      }
#pragma GCC unroll 3
      for (int part = 0; part < kNumParts; ++part) {
        transpose16(x[part]);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(to + part * part_stride + i * kTileRow, x[part][i]);
        }
      }
    }
  }
}

// v as B operand: [32 keys][part][16 columns] tiles of 16 pairs of keys. A step is one pair of keys
// in 32 columns; keys beyond the last one are zero.
template <class In>
struct ValuePacking {
  static constexpr int kNumParts = kParts<In>;

  LONGCTX_ALWAYS_INLINE void advance() {
    if (key >= end) return;
    write();
    if (++block < blocks) return;
    block = 0;
    key += 2;
  }
  void finish() {
    while (key < end) advance();
  }
  LONGCTX_ALWAYS_INLINE void write() const {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i even[kNumParts], odd[kNumParts];
    load(key, even);
    load(key + 1, odd);
    const int64_t part_stride = 2 * blocks * kTileBytes;
    char* tile = tiles + key / kSide * kNumParts * part_stride + block * 2 * kTileBytes +
                 key % kSide / 2 * kTileRow;
#pragma GCC unroll 3
    for (int part = 0; part < kNumParts; ++part, tile += part_stride) {
      const __m512i low = _mm512_unpacklo_epi16(even[part], odd[part]);
      const __m512i high = _mm512_unpackhi_epi16(even[part], odd[part]);
      _mm512_store_si512(tile, _mm512_permutex2var_epi64(low, first, high));
      _mm512_store_si512(tile + kTileBytes, _mm512_permutex2var_epi64(low, second, high));
    }
  }
  LONGCTX_ALWAYS_INLINE void load(int64_t row, __m512i (&parts)[kNumParts]) const {
    for (__m512i& part : parts) part = _mm512_setzero_si512();
    if (row >= num_keys) return;
    const int64_t left = head_dim_v - block * kSide;
    if (left > 0) load_parts<In>(v + row * stride + block * kSide, depth_mask(left, 0), parts);
    if (ones && left >= 0 && left < kSide) {
      constexpr short kOne = 0x3f80;
      parts[0] = _mm512_mask_mov_epi16(parts[0], __mmask32{1} << left, _mm512_set1_epi16(kOne));
    }
  }

  const In* v = nullptr;
  int64_t stride = 0;  // elements
  int64_t head_dim_v = 0;
  bool ones = false;  // a last column of ones
  int64_t num_keys = 0;
  int64_t blocks = 0;  // of 32 columns
  char* tiles = nullptr;
  int64_t end = 0;  // num_keys in whole blocks
  int64_t key = 0;  // next
  int64_t block = 0;
};

// (keys K)^T as A operand: [16 of depth][part][32 keys] tiles of 16 of depth x 32 keys, from the
// even and odd words of k^T's dwords. A step is a pair of depth of 32 keys.
template <int kNumParts>
struct KeyWeighing {
  static constexpr int64_t kPairs = kDepth / 2;

  LONGCTX_ALWAYS_INLINE void advance() {
    if (next < end) write(next++);
  }
  // The first depth steps are done.
  void finish(int64_t depth_steps) {
    const int64_t last = depth_steps * halves * kPairs;
    while (next < last && next < end) write(next++);
  }
  LONGCTX_ALWAYS_INLINE void write(int64_t index) const {
    const int64_t pair = index % kPairs;
    const int64_t half = halves == 2 ? index / kPairs % 2 : 0;
    const int64_t step = halves == 2 ? index / kPairs / 2 : index / kPairs;
    const int64_t part_stride = steps * 2 * kTileBytes;
    const char* from =
        k_t + half * kNumParts * part_stride + step * 2 * kTileBytes + pair * kTileRow;
    const __m512 weight0 = _mm512_loadu_ps(weights + half * kSide);
    const __m512 weight1 = _mm512_loadu_ps(weights + half * kSide + 16);
    __m512 even0 = _mm512_setzero_ps(), even1 = even0, odd0 = even0, odd1 = even0;
#pragma GCC unroll 3
    for (int part = kNumParts - 1; part >= 0; --part) {
      const __m512i words0 = _mm512_load_si512(from + part * part_stride);
      const __m512i words1 = _mm512_load_si512(from + part * part_stride + kTileBytes);
      const bool sum = part + 1 < kNumParts;  // adding to zero would cost an instruction
      const auto add = [sum](__m512 x, __m512 y) { return sum ? _mm512_add_ps(x, y) : y; };
      even0 = add(even0, even_words(words0));
      even1 = add(even1, even_words(words1));
      odd0 = add(odd0, odd_words(words0));
      odd1 = add(odd1, odd_words(words1));
    }
    char* to = weighted + (step * 2 + pair / 8) * kNumParts * kHalves * kTileBytes +
               half * kTileBytes + pair % 8 * 2 * kTileRow;
    const auto store = [&](char* row, __m512 x0, __m512 x1) LONGCTX_ALWAYS_INLINE {
      split<kNumParts>(_mm512_mul_ps(x0, weight0), _mm512_mul_ps(x1, weight1),
                       [&](int part, __m512i words) LONGCTX_ALWAYS_INLINE {
                         _mm512_store_si512(row + part * kHalves * kTileBytes, words);
                       });
    };
    store(to, even0, even1);
    store(to + kTileRow, odd0, odd1);
  }

  const char* k_t = nullptr;       // [32 keys][part][depth step][16 keys] tiles
  const float* weights = nullptr;  // [kLinearChunk]
  char* weighted = nullptr;
  int64_t steps = 0;   // of depth
  int64_t halves = 0;  // of 32 keys
  int64_t end = 0;     // steps * halves * kPairs
  int64_t next = 0;
};

}  // namespace
}  // namespace longctx::cpu
