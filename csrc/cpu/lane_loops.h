// The loops of lane_kernels.h over Vec<float>. Include after one vec_<isa>.h; everything here has
// internal linkage, so that code of one instruction set is never linked into another.
#pragma once
#include <cstdint>

#include "lane_kernels.h"
#include "reduced_float.h"

namespace longctx::cpu {
namespace {

using V = Vec<float>;
constexpr float kLowest = -3.402823466e38f;  // finite: -inf minus it is -inf, not NaN

void add_lanes(const float* tile, int64_t num_slots, float* sums) {
  for (int64_t slot = 0; slot < num_slots; ++slot, tile += kStripRows, sums += kTracks) {
    for (int i = 0; i < kTracks; i += V::kLanes) {
      (V::load(sums + i) + (V::load(tile + i) + V::load(tile + kTracks + i))).store(sums + i);
    }
  }
}

void max_lanes(const float* tile, int64_t num_slots, float* maxima) {
  for (int64_t slot = 0; slot < num_slots; ++slot, tile += kStripRows) {
    V top = V::load(tile);
    for (int i = V::kLanes; i < kStripRows; i += V::kLanes) top = max(V::load(tile + i), top);
    alignas(64) float lanes[V::kLanes];
    top.store(lanes);
    for (int i = 0; i < V::kLanes; ++i)
      maxima[slot] = lanes[i] > maxima[slot] ? lanes[i] : maxima[slot];
  }
}

void add_tracks(const float* tile, int64_t num_slots, float* tracks, int64_t track_size) {
  for (int64_t slot = 0; slot < num_slots; ++slot, tile += kStripRows) {
    float* track = tracks + slot % kTracks * track_size + slot / kTracks * kTracks;
    for (int i = 0; i < kStripRows; i += V::kLanes) {
      (V::load(track + i) + V::load(tile + i)).store(track + i);
    }
  }
}

void sum_tracks(const float* tracks, int64_t track_size, int64_t num_elements, float* diagonals) {
  for (int t = 0; t < kTracks; ++t, tracks += track_size) {
    for (int64_t i = 0; i < num_elements; i += V::kLanes) {
      (V::load(diagonals + t + i) + V::load(tracks + i)).store(diagonals + t + i);
    }
  }
}

template <class In, class Acc>
void mean_of(const void* data, int64_t row_stride, int64_t count, int64_t dim, void* result) {
  const In* rows = static_cast<const In*>(data);
  Acc* mean = static_cast<Acc*>(result);
  for (int64_t d = 0; d < dim; ++d) mean[d] = Acc(0);
  // Four streams at a time: one alone does not draw the memory's full bandwidth.
  const int64_t quarter = count / 4;
  const int64_t jump = quarter * row_stride;
  for (int64_t row = 0; row < quarter; ++row, rows += row_stride) {
    for (int64_t d = 0; d < dim; ++d) {
      mean[d] += (widen(rows[d]) + widen(rows[d + jump])) +
                 (widen(rows[d + 2 * jump]) + widen(rows[d + 3 * jump]));
    }
  }
  rows += 3 * jump;
  for (int64_t row = 4 * quarter; row < count; ++row, rows += row_stride) {
    for (int64_t d = 0; d < dim; ++d) mean[d] += widen(rows[d]);
  }
  for (int64_t d = 0; d < dim; ++d) mean[d] /= static_cast<Acc>(count);
}

void mean_rows(DType dtype, const void* rows, int64_t row_stride, int64_t count, int64_t dim,
               void* mean) {
  switch (dtype) {
    case DType::kFloat32:
      return mean_of<float, float>(rows, row_stride, count, dim, mean);
    case DType::kFloat64:
      return mean_of<double, double>(rows, row_stride, count, dim, mean);
    case DType::kBFloat16:
      return mean_of<BFloat16, float>(rows, row_stride, count, dim, mean);
    case DType::kFloat16:
      return mean_of<Float16, float>(rows, row_stride, count, dim, mean);
  }
}

void softmax_groups(const float* tile, int64_t num_groups, int64_t group_slots, float* maxima,
                    float* sums) {
  for (int64_t g = 0; g < num_groups; ++g, maxima += kStripRows, sums += kStripRows) {
    for (int lane = 0; lane < kStripRows; lane += V::kLanes) {
      const float* s = tile + lane;
      V top = V::broadcast(kLowest);
      for (int64_t i = 0; i < group_slots; ++i) top = max(V::load(s + i * kStripRows), top);
      V sum = V::broadcast(0.0f);
      for (int64_t i = 0; i < group_slots; ++i) sum = sum + exp(V::load(s + i * kStripRows) - top);
      top.store(maxima + lane);
      sum.store(sums + lane);
    }
    tile += group_slots * kStripRows;
  }
}

void normalize_groups(const float* maxima, int64_t num_groups, float* sums) {
  for (int lane = 0; lane < kStripRows; lane += V::kLanes) {
    V top = V::broadcast(kLowest);
    for (int64_t g = 0; g < num_groups; ++g)
      top = max(V::load(maxima + g * kStripRows + lane), top);
    V total = V::broadcast(0.0f);
    for (int64_t g = 0; g < num_groups; ++g) {
      float* sum = sums + g * kStripRows + lane;
      const V mass = V::load(sum) * exp(V::load(maxima + g * kStripRows + lane) - top);
      mass.store(sum);
      total = total + mass;
    }
    alignas(64) float factors[V::kLanes];
    total.store(factors);
    for (float& factor : factors) factor = factor > 0.0f ? 1.0f / factor : 0.0f;
    for (int64_t g = 0; g < num_groups; ++g) {
      float* sum = sums + g * kStripRows + lane;
      (V::load(sum) * V::load(factors)).store(sum);
    }
  }
}

constexpr LaneKernels kLaneKernels = {add_lanes, max_lanes,      add_tracks,      sum_tracks,
                                      mean_rows, softmax_groups, normalize_groups};

}  // namespace
}  // namespace longctx::cpu
