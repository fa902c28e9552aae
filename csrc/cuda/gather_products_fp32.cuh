// What a warp of gather_attention holds and computes on 8 keys and up to 8 query heads in float32,
// with plain products: tensor cores would round the operands. Four lanes share a key of s, a lane
// has every 32nd group of columns of out.
#pragma once
#include "cuda/columns.cuh"
#include "cuda/gather_attention.h"
#include "cuda/online_softmax.cuh"

namespace longctx::cuda {

template <int kHeadDim>
struct PlainGather {
  using Element = float;
  using Out = float;
  static constexpr int kRows = kPlainGatherRows;
  static constexpr int kKeys = 8;
  static constexpr int kDim = kHeadDim;
  static constexpr int kElements = 4;
  // Rows are 64 bytes apart in the banks, so that the 16 bytes of four lanes of two keys are too.
  static constexpr int kStride = kHeadDim + 16;
  static constexpr int kTileBytes = 8 * kStride * 4;
  static constexpr float kUnit = 1;
  static constexpr int kMinBlocks = kHeadDim <= 128 ? 3 : 2;
  static constexpr int kGroup = kHeadDim / 32 < 4 ? kHeadDim / 32 : 4;  // columns of a load
  static constexpr int kGroups = kHeadDim / 32 / kGroup;                // of a lane
  using Four = Columns<float, 4>;
  using Group = Columns<float, kGroup>;

  int rows;                            // that there are
  float reference[kRows], sum[kRows];  // sum: of the lane's key
  float acc[kRows][kGroups][kGroup];
  float s[kRows];  // of the lane's key, then its weights

  LONGCTX_DEVICE explicit PlainGather(int num_rows) : rows(num_rows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference[r] = -INFINITY;
      sum[r] = 0;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) acc[r][j][e] = 0;
      }
    }
  }

  LONGCTX_DEVICE static void copy(char* tile, const float* own_row, const SourceRows& source) {
    constexpr int kChunks = kHeadDim / 4;
#pragma unroll 1
    for (int i = device::lane_index(); i < 8 * kChunks; i += device::kWarpSize) {
      const int row = i / kChunks, first = i % kChunks * 4;
      const auto address = device::shuffle(reinterpret_cast<int64_t>(own_row), row);
      const auto* from = reinterpret_cast<const float*>(address);
      float* target = &element(tile, row, first);
      if (source.aligned) {
        const bool live = from != nullptr && first < source.dim;
        device::copy_async_16(target, from + first, live ? 16 : 0);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        target[e] = from != nullptr && first + e < source.dim ? from[first + e] : 0.0f;
      }
    }
  }
  LONGCTX_DEVICE static float& element(char* tile, int row, int column) {
    return reinterpret_cast<float*>(tile)[row * kStride + column];
  }
  template <class Values>
  LONGCTX_DEVICE static Values load(const char* tile, int row, int column) {
    return *reinterpret_cast<const Values*>(tile + (row * kStride + column) * 4);
  }

  // s = q k^T
  LONGCTX_DEVICE void multiply_scores(const char* q, const char* k) {
    const int key = device::lane_index() / 4, quarter = device::lane_index() % 4;
    float part[kRows][4] = {};
#pragma unroll 2
    for (int d = 4 * quarter; d < kHeadDim; d += 16) {
      const Four of_k = load<Four>(k, key, d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        const Four of_q = load<Four>(q, r, d);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          part[r][e] = fmaf(of_q.values[e], of_k.values[e], part[r][e]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      s[r] = quad_sum((part[r][0] + part[r][1]) + (part[r][2] + part[r][3]));
    }
  }

  // Scale, bias, mask. Lane i brings the rows that see key i, and its bias.
  LONGCTX_DEVICE void finish_scores(float softmax_scale, float softcap, uint32_t seen_by_rows,
                                    bool has_bias, float bias) {
    const int key = device::lane_index() / 4;
    const float added = has_bias ? device::shuffle(bias, key) : 0.0f;
    const uint32_t seen_by = device::shuffle(seen_by_rows, key);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float score = s[r] * softmax_scale;
      if (softcap > 0) score = softcap * tanhf(score / softcap);
      s[r] = (seen_by >> r & 1) != 0 ? score + added : -INFINITY;
    }
  }

  // Calls visit(row, key, score) for all scores, in units of kUnit.
  template <class Visit>
  LONGCTX_DEVICE void for_each_score(const Visit& visit) const {
    if (device::lane_index() % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) visit(r, device::lane_index() / 4, s[r]);
  }

  // softmax update
  LONGCTX_DEVICE void update_weights() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float top = s[r];
      for (int mask = 4; mask < device::kWarpSize; mask *= 2) {
        top = fmaxf(top, device::shuffle_xor(top, mask));
      }
      const float raised = fmaxf(reference[r], top);
      const float factor = expf(reference[r] - finite(raised));
      reference[r] = raised;
      s[r] = expf(s[r] - finite(raised));
      sum[r] = fmaf(sum[r], factor, s[r]);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) acc[r][j][e] *= factor;
      }
    }
  }

  // acc += p v
  LONGCTX_DEVICE void add_values(const char* v) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      // Summed apart: no chain of additions is long enough to lose a digit.
      float part[kRows][kGroup] = {};
#pragma unroll
      for (int key = 0; key < kKeys; ++key) {
        const int column = (j * device::kWarpSize + device::lane_index()) * kGroup;
        const Group of_v = load<Group>(v, key, column);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) continue;
          const float weight = device::shuffle(s[r], 4 * key);
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            part[r][e] = fmaf(weight, of_v.values[e], part[r][e]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) acc[r][j][e] += part[r][e];
      }
    }
  }

  template <class Sums, class Values>
  LONGCTX_DEVICE void leave(const Sums& sums, const Values& values) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = sum[r];
      for (int mask = 4; mask < device::kWarpSize; mask *= 2) {
        total += device::shuffle_xor(total, mask);
      }
      if (device::lane_index() == 0) sums(r, reference[r], total);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const int column = (j * device::kWarpSize + device::lane_index()) * kGroup;
#pragma unroll
        for (int e = 0; e < kGroup; e += 2) {
          values(r, column + e, acc[r][j][e], acc[r][j][e + 1]);
        }
      }
    }
  }
};

}  // namespace longctx::cuda
