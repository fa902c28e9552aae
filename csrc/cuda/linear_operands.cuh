// How linear attention rounds operands to 16 bits, and stores accumulated rows.
#pragma once
#include "cuda/fragments.cuh"
#include "cuda/linear_weights.cuh"

namespace longctx::cuda {

LONGCTX_DEVICE float widen_bits16(__nv_bfloat16, uint16_t bits) {
  __nv_bfloat16_raw raw;
  raw.x = bits;
  return device::widen(__nv_bfloat16(raw));
}
LONGCTX_DEVICE float widen_bits16(__half, uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return device::widen(__half(raw));
}

// {low, high} of `pair` times their weights.
template <class T>
LONGCTX_DEVICE uint32_t weigh_pair(T, uint32_t pair, float low, float high) {
  return device::pack_pair(T(), widen_bits16(T(), static_cast<uint16_t>(pair)) * low,
                           widen_bits16(T(), static_cast<uint16_t>(pair >> 16)) * high);
}

// What numbers up to `largest` are divided by before they are rounded to float16: the largest comes
// to lie in [2^13, 2^14), so that nothing overflows and little is subnormal. At least 2^-30: the
// ratio of two units must not overflow.
LONGCTX_DEVICE float half_unit(float largest) {
  return power_of_two(fmaxf(largest, 0x1p-17f)) * 0x1p-13f;
}

// Exchanges words among the lanes of a quad: lane q gets word q of each, in their order.
LONGCTX_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  const int lane = device::lane_index();
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t given = upper ? words[i] : words[i + bit];
      const uint32_t taken = device::shuffle_xor(given, bit);
      if (upper) {
        words[i] = taken;
      } else {
        words[i + bit] = taken;
      }
    }
  }
}

// Stores a warp's accumulated rows, rounded to T, at `out`; only num_rows rows and num_columns
// columns exist.
template <class T, int kRowTiles, int kTiles>
LONGCTX_DEVICE void store_rounded_rows(T, const float (&acc)[kRowTiles][kTiles][4], uint16_t* out,
                                       int64_t stride, int num_rows, int num_columns,
                                       bool aligned) {
  // Four words a lane: two column tiles of both halves, or four of one.
  constexpr int kHalves = kTiles == 2 ? 2 : 1;
  static_assert(kTiles * kHalves == 4);
  const int lane = device::lane_index() % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; half += kHalves) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i % kTiles, from = 2 * (half + i / kTiles);
        words[i] = device::pack_pair(T(), acc[m][n][from], acc[m][n][from + 1]);
      }
      if (aligned) {
        transpose_quad(words);
        const int row = own_row(m, half + lane / kTiles), column = 8 * (lane % kTiles);
        if (row < num_rows && column < num_columns) {
          // Counted in chunks: of an address in elements the compiler forgets the alignment, and
          // takes four stores.
          reinterpret_cast<uint4*>(out)[row * (stride / kChunk) + lane % kTiles] = {
              words[0], words[1], words[2], words[3]};
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = own_row(m, half + i / 2 / kTiles);
        const int column = own_column(i / 2 % kTiles) + i % 2;
        if (row < num_rows && column < num_columns) {
          out[row * stride + column] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
        }
      }
    }
  }
}

// The same without rounding.
template <int kRowTiles, int kTiles>
LONGCTX_DEVICE void store_wide_rows(const float (&acc)[kRowTiles][kTiles][4], float* out,
                                    int64_t stride, int num_rows, int num_columns, bool aligned) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row(m, half);
      if (row >= num_rows) continue;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float* to = out + row * stride + own_column(n);
        const float first = acc[m][n][2 * half], second = acc[m][n][2 * half + 1];
        const int left = num_columns - own_column(n);
        if (aligned && left > 0) {
          reinterpret_cast<float2*>(out)[row * (stride / 2) + own_column(n) / 2] = {first, second};
          continue;
        }
        if (left > 0) to[0] = first;
        if (left > 1) to[1] = second;
      }
    }
  }
}

}  // namespace longctx::cuda
