// Loops over what the strip engines produce: tiles of [slots][kStripRows] floats, where a slot is
// a key and a lane a query row. One implementation, compiled for each instruction set.
#pragma once
#include <cstdint>

#include "longctx/params.h"
#include "strip_engine.h"

namespace longctx::cpu {

constexpr int kTracks = 16;

struct LaneKernels {
  // sums[slot][kTracks] += the two halves of the lanes. Whoever needs a key's total adds the
  // kTracks partial sums at the end, once for many strips.
  void (*add_lanes)(const float* tile, int64_t num_slots, float* sums);

  // maxima[slot] = max(maxima[slot], all lanes).
  void (*max_lanes)(const float* tile, int64_t num_slots, float* maxima);

  // Diagonals: entry (slot, lane) belongs to diagonal slot + lane. Track t takes the slots t, t +
  // kTracks, ..., so that all its reads and writes are aligned vectors; track t's element i is
  // diagonal i + t. tracks is [kTracks][track_size], offset to the tile's first diagonal.
  void (*add_tracks)(const float* tile, int64_t num_slots, float* tracks, int64_t track_size);
  // diagonals[i + t] += tracks[t][i] for i < num_elements.
  void (*sum_tracks)(const float* tracks, int64_t track_size, int64_t num_elements,
                     float* diagonals);

  // The mean of `count` rows of `dim` elements in `dtype`; float [dim], double for float64.
  void (*mean_rows)(DType dtype, const void* rows, int64_t row_stride, int64_t count, int64_t dim,
                    void* mean);

  // For each group of `group_slots` slots and each lane: maximum and sum of exp(s - maximum), both
  // [num_groups][kStripRows]. A group of -inf gives a finite maximum and the sum 0.
  void (*softmax_groups)(const float* tile, int64_t num_groups, int64_t group_slots, float* maxima,
                         float* sums);
  // Turns the sums into probabilities: sums[g] * exp(maxima[g] - M) / Z per lane; 0 where Z is 0.
  void (*normalize_groups)(const float* maxima, int64_t num_groups, float* sums);
};

const LaneKernels& generic_lane_kernels();
const LaneKernels& avx2_lane_kernels();
const LaneKernels& avx512_lane_kernels();

inline const LaneKernels& choose_lane_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512_lane_kernels();
  if (isa >= Isa::kAvx2) return avx2_lane_kernels();
#endif
  (void)isa;
  return generic_lane_kernels();
}

}  // namespace longctx::cpu
