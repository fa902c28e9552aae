// The two tile products of attention. Each keeps 2 x 2 accumulator tiles, 4 loads for 4 products:
// tiles 0..3 accumulate, 4 and 5 hold A, 6 and 7 hold B.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cstdint>

#include "amx_pack.h"
#include "strip_engine.h"

namespace longctx::cpu {
namespace {

constexpr int kScoreRow = kStripRows * sizeof(float);  // bytes

template <int kNumParts>
constexpr int kNumProducts = kNumParts * (kNumParts + 1) / 2;

// Parts of the factors of product n of kNumProducts: i + j < kNumParts, small ones first.
constexpr int kFactors[6][2] = {{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}};
template <int kNumParts>
constexpr int a_part(int n) {
  return kFactors[6 - kNumProducts<kNumParts> + n][0];
}
template <int kNumParts>
constexpr int b_part(int n) {
  return kFactors[6 - kNumProducts<kNumParts> + n][1];
}

// P^T of 32 keys as B operand: [part][half] tiles of 16 pairs of keys x 16 queries.
template <int kNumParts>
constexpr int kProbabilityTile = kNumParts * 2 * kTileBytes;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void begin_thread() {
  static constexpr TileConfig config;  // static: the compiler sees only 8 bytes of it being read
  _tile_loadconfig(&config);
}
inline void end_thread() { _tile_release(); }

// Tile loads do not tell the compiler that they read memory: vector stores before this are done.
inline void finish_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// 16 rows of an A operand.
struct Rows {
  const char* data;
  int64_t stride;       // bytes
  int64_t step_stride;  // bytes from one depth step to the next
  int64_t part_stride;
};

// v^T of some key tiles: [value tile][part], column_bytes apart, then [key tile].
template <int kNumParts>
struct Values {
  const char* at(int64_t column_tile, int part, int key_tile) const {
    return data + (column_tile * kNumParts + part) * column_bytes + key_tile * kTileBytes;
  }
  const char* data;
  int64_t column_bytes;
};

// One depth step of 32 keys x 32 queries in tiles 0..3. Calls between(n) after tile product n.
template <int kNumParts, class Between>
LONGCTX_ALWAYS_INLINE inline void multiply_step(const Rows& k0, const Rows& k1, const char* queries,
                                                int64_t steps, int step, const Between& between) {
#pragma GCC unroll 6
  for (int product = 0; product < kNumProducts<kNumParts>; ++product) {
    const int k_part = a_part<kNumParts>(product);
    const int q_part = b_part<kNumParts>(product);
    const int n = (step * kNumProducts<kNumParts> + product) * 4;
    const char* q = queries + (q_part * steps + step) * 2 * kTileBytes;
    _tile_loadd(6, q, kTileRow);
    _tile_loadd(4, k0.data + k_part * k0.part_stride + step * k0.step_stride, k0.stride);
    _tile_dpbf16ps(0, 4, 6);
    between(n);
    _tile_loadd(7, q + kTileBytes, kTileRow);
    _tile_dpbf16ps(1, 4, 7);
    between(n + 1);
    _tile_loadd(5, k1.data + k_part * k1.part_stride + step * k1.step_stride, k1.stride);
    _tile_dpbf16ps(2, 5, 6);
    between(n + 2);
    _tile_dpbf16ps(3, 5, 7);
    between(n + 3);
  }
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_scores(void* scores) {
  char* s = static_cast<char*>(scores);
  _tile_stored(0, s, kScoreRow);
  _tile_stored(1, s + 64, kScoreRow);
  _tile_stored(2, s + 16 * kScoreRow, kScoreRow);
  _tile_stored(3, s + 16 * kScoreRow + 64, kScoreRow);
}

// s = q k^T of the 32 keys k0, k1: [32 keys][32 queries]. kSteps: depth steps if known, else 0.
template <int kNumParts, int kSteps, class Between>
LONGCTX_ALWAYS_INLINE inline void multiply_scores(const Rows& k0, const Rows& k1,
                                                  const char* queries, int steps, float* scores,
                                                  const Between& between) {
  zero_tiles();
  if constexpr (kSteps > 0) {
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      multiply_step<kNumParts>(k0, k1, queries, kSteps, step, between);
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      multiply_step<kNumParts>(k0, k1, queries, steps, step, between);
    }
  }
  store_scores(scores);
}

// O^T += V^T P^T over some key tiles. out_t: [num_columns][half] tiles of 16 columns x 16 queries.
template <int kNumParts>
inline void multiply_values(const Values<kNumParts>& values, int64_t num_columns, const int* tiles,
                            int count, const char* probabilities, char* out_t) {
  if (count == 0) return;
  finish_stores();
  for (int64_t column = 0; column < num_columns; column += 2) {
    char* out = out_t + column * 2 * kTileBytes;
    const bool two = column + 1 < num_columns;
    // Six products a key would round a long sum six times: a group of float is summed apart.
    constexpr bool kApart = kNumParts == 3;
    alignas(64) char group[kApart ? 4 * kTileBytes : 64];
    if (kApart) {
      zero_tiles();
    } else {
      _tile_loadd(0, out, kTileRow);
      _tile_loadd(1, out + kTileBytes, kTileRow);
      if (two) {
        _tile_loadd(2, out + 2 * kTileBytes, kTileRow);
        _tile_loadd(3, out + 3 * kTileBytes, kTileRow);
      }
    }
    for (int i = 0; i < count; ++i) {
      for (int product = 0; product < kNumProducts<kNumParts>; ++product) {
        const int v_part = a_part<kNumParts>(product);
        const int p_part = b_part<kNumParts>(product);
        const char* p = probabilities + i * kProbabilityTile<kNumParts> + p_part * 2 * kTileBytes;
        _tile_loadd(6, p, kTileRow);
        _tile_loadd(4, values.at(column, v_part, tiles[i]), kTileRow);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, p + kTileBytes, kTileRow);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
          _tile_loadd(5, values.at(column + 1, v_part, tiles[i]), kTileRow);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    char* to = kApart ? group : out;
    _tile_stored(0, to, kTileRow);
    _tile_stored(1, to + kTileBytes, kTileRow);
    if (two) {
      _tile_stored(2, to + 2 * kTileBytes, kTileRow);
      _tile_stored(3, to + 3 * kTileBytes, kTileRow);
    }
    for (int i = 0; kApart && i < (two ? 4 : 2) * kTileBytes; i += kTileRow) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(out + i), _mm512_load_ps(group + i));
      _mm512_store_ps(out + i, sum);
    }
  }
}

}  // namespace
}  // namespace longctx::cpu
