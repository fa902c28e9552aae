// What a warp of gather_attention holds and computes on 16 keys and up to 16 query heads in 16
// bits, on tensor cores.
#pragma once
#include "cuda/gather_attention.h"
#include "cuda/online_softmax.cuh"

namespace longctx::cuda {

template <class T, int kHeadDim>
struct TensorGather {
  using Element = uint16_t;
  using Out = T;
  static constexpr int kRows = kTensorGatherRows;
  static constexpr int kKeys = 16;  // of a tile
  static constexpr int kDim = kHeadDim;
  static constexpr int kElements = kChunk;                               // in 16 bytes
  static constexpr int kTileBytes = 16 * TileRows<kHeadDim>::kRowBytes;  // q, K or V
  static constexpr float kUnit = kLn2;                                   // of scores and references
  // Blocks that should share a multiprocessor: what the accumulators leave of the registers.
  static constexpr int kMinBlocks = kHeadDim <= 64 ? 5 : kHeadDim <= 128 ? 4 : 2;

  RowStates<1> states;
  float acc[1][kHeadDim / 8][4];
  float s[1][2][4];
  uint32_t p[1][1][4];

  LONGCTX_DEVICE explicit TensorGather(int) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      states.reference[0][half] = -INFINITY;
      states.sum[0][half] = 0;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[0][n][i] = 0;
    }
  }

  // Lane r brings row r, null for zeros.
  LONGCTX_DEVICE static void copy(char* tile, const Element* own_row, const SourceRows& source) {
    copy_own_rows<kHeadDim, 16>(tile, own_row, source);
  }
  LONGCTX_DEVICE static T& element(char* tile, int row, int column) {
    char* chunk = tile + TileRows<kHeadDim>::offset(row, column / kChunk);
    return reinterpret_cast<T*>(chunk)[column % kChunk];
  }

  // s = q k^T
  LONGCTX_DEVICE void multiply_scores(const char* q, const char* k) {
    const MatrixLane<kHeadDim> q_lane(q, true), k_lane(k, false);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4], b[4];
      device::load_matrices(a, q_lane.at(0, 0, step));
      device::load_matrices(b, k_lane.at(0, 0, step));
      device::multiply_add(T(), s[0][0], a, b[0], b[1]);
      device::multiply_add(T(), s[0][1], a, b[2], b[3]);
    }
  }

  // Scale, bias, mask. Lane i brings the rows that see key i, and its bias.
  LONGCTX_DEVICE void finish_scores(const ScoreScale& scale, uint32_t rows, bool has_bias,
                                    float bias) {
    scale_scores(scale, s);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = own_column(n) + i;
        const float added = has_bias ? device::shuffle(bias, key) * kLog2E : 0.0f;
        const uint32_t seen_by = device::shuffle(rows, key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = s[0][n][2 * half + i];
          score = (seen_by >> own_row(0, half) & 1) != 0 ? score + added : -INFINITY;
        }
      }
    }
  }

  // Calls visit(row, key, score) for all scores, in units of kUnit.
  template <class Visit>
  LONGCTX_DEVICE void for_each_score(const Visit& visit) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(own_row(0, i / 2), own_column(n) + i % 2, s[0][n][i]);
    }
  }

  // softmax update
  LONGCTX_DEVICE void update_weights() { update_softmax<T>(1.0f, s, states, acc, p); }

  // acc += p v
  LONGCTX_DEVICE void add_values(const char* v) {
    const MatrixLane<kHeadDim> v_lane(v, true);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t b[4];
      device::load_matrices_transposed(b, v_lane.at(0, 0, n / 2));
      device::multiply_add(T(), acc[0][n], p[0][0], b[0], b[1]);
      device::multiply_add(T(), acc[0][n + 1], p[0][0], b[2], b[3]);
    }
  }

  // Calls sums(row, reference, sum) once a row and values(row, column, x, y) for pairs of columns.
  template <class Sums, class Values>
  LONGCTX_DEVICE void leave(const Sums& sums, const Values& values) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row(0, half);
      const float sum = quad_sum(states.sum[0][half]);
      if (device::lane_index() % 4 == 0) sums(row, states.reference[0][half], sum);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        values(row, own_column(n), acc[0][n][2 * half], acc[0][n][2 * half + 1]);
      }
    }
  }
};

}  // namespace longctx::cuda
