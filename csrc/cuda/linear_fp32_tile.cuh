// The products of linear attention in float32: 64 rows and 32 or 64 columns of accumulators, dealt
// out to the block. Sixteen threads share eight rows; each has every sixteenth key of a score, or
// neighbouring columns. Operands lie in shared memory.
#pragma once
#include "cuda/columns.cuh"
#include "cuda/fp32_rows.cuh"
#include "longctx/decay.h"

namespace longctx::cuda::fp32 {

constexpr int kLinearSlice = 64;       // columns of head_dim
constexpr int kLinearRowThreads = 16;  // of a row
constexpr int kLinearOwnRows = kLinearChunk * kLinearRowThreads / kThreads;
constexpr int kLinearOwnKeys = kLinearChunk / kLinearRowThreads;
constexpr int kLinearWarpRows = kLinearChunk * device::kWarpSize / kThreads;
constexpr int kLinearStride = kLinearSlice + kPad;  // of rows of q, k and p

template <int kColumns>
struct LinearTile {
  static constexpr int kOwnColumns = kColumns / kLinearRowThreads;
  static constexpr int kValueStride = kColumns + kPad;  // of rows of v
  using Own = Columns<float, kOwnColumns>;
  using Scores = float[kLinearOwnRows][kLinearOwnKeys];
  using Rows = float[kLinearOwnRows][kOwnColumns];

  int lane = device::thread_index() % kLinearRowThreads;
  int first_row = device::thread_index() / kLinearRowThreads * kLinearOwnRows;

  LONGCTX_DEVICE int key(int j) const { return lane + j * kLinearRowThreads; }
  LONGCTX_DEVICE Own& own(float* row) const {
    return *reinterpret_cast<Own*>(row + lane * kOwnColumns);
  }

  // p += q [64, depth] k [64, depth]^T of groups of 16 keys that begin in [begin, end). Here and
  // below, what lies behind the depth up to a multiple of 4 is zero in one of the operands.
  LONGCTX_DEVICE void add_scores(const float* q, const float* k, int depth, int begin, int end,
                                 Scores& p) const {
    q += first_row * kLinearStride;
#pragma unroll 2
    for (int d = 0; d < depth; d += kChunk) {
      Four keys[kLinearOwnKeys];
#pragma unroll
      for (int j = 0; j < kLinearOwnKeys; ++j) keys[j] = load_four(k + key(j) * kLinearStride + d);
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) {
        const Four row = load_four(q + r * kLinearStride + d);
#pragma unroll
        for (int j = 0; j < kLinearOwnKeys; ++j) {
          if (j * kLinearRowThreads < begin || j * kLinearRowThreads >= end) continue;
#pragma unroll
          for (int e = 0; e < kChunk; ++e) p[r][j] += row.x[e] * keys[j].x[e];
        }
      }
    }
  }

  // acc += a [64, columns begin to end] b [rows begin to end, kColumns].
  LONGCTX_DEVICE void add_product(const float* a, int begin, int end, const float* b, int b_stride,
                                  Rows& acc) const {
    a += first_row * kLinearStride;
    b += lane * kOwnColumns;
#pragma unroll 2
    for (int d = begin; d < end; d += kChunk) {
      Own columns[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        columns[e] = *reinterpret_cast<const Own*>(b + (d + e) * b_stride);
      }
#pragma unroll
      for (int r = 0; r < kLinearOwnRows; ++r) {
        const Four row = load_four(a + r * kLinearStride + d);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
#pragma unroll
          for (int c = 0; c < kOwnColumns; ++c) acc[r][c] += row.x[e] * columns[e].values[c];
        }
      }
    }
  }

  // sums += (weights * k [num_keys, 64])^T v [num_keys, kColumns].
  LONGCTX_DEVICE void add_keys(const float* k, const float* weights, int num_keys, float* v,
                               Rows& sums) const {
    k += first_row;
#pragma unroll 2
    for (int key = 0; key < num_keys; ++key) {
      Own values = own(v + key * kValueStride);
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) values.values[c] *= weights[key];
#pragma unroll
      for (int first = 0; first < kLinearOwnRows; first += kChunk) {
        const Four row = load_four(k + key * kLinearStride + first);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
#pragma unroll
          for (int c = 0; c < kOwnColumns; ++c) sums[first + e][c] += row.x[e] * values.values[c];
        }
      }
    }
  }
};

// Copies the `rows` rows of a chunk, of which `data` is the first of the sequence from column
// `first` on; zeros behind them.
template <int kWidth>
LONGCTX_DEVICE void copy_chunk(float* tile, const float* data, int64_t chunk, int rows,
                               const SourceRows& source, int first) {
  SourceRows part = source;
  part.dim -= first;
  const float* begin = data + chunk * kLinearChunk * source.row_stride;
  copy_rows<kWidth>(tile, kLinearChunk, part, [&](int row) -> const float* {
    return row < rows ? begin + row * source.row_stride : nullptr;
  });
}

// A weight of 0 forgets, whatever was there.
LONGCTX_DEVICE float weighed(float x, float weight) { return weight == 0 ? 0.0f : x * weight; }

}  // namespace longctx::cuda::fp32
