// A stable counting sort of the rows of a block list by the magnitude of their length, in two
// launches: every warp counts a slice of the rows, then knows from the counts of all slices where
// its own rows go. A lane stands for a row while rows are read and for a magnitude while they are
// counted. Moves 16 bytes per row, and 4 to write.
#pragma once
#include "device/thread.cuh"
#include "longctx/block_list.h"

namespace longctx::cuda {

constexpr int kScheduleWarps = 8;
constexpr int kScheduleThreads = kScheduleWarps * device::kWarpSize;
constexpr int kMagnitudes = device::kWarpSize;  // 0: 2^30 entries and more, ..., 31: none

struct ScheduleParams {
  BlockList blocks;
  int64_t num_rows = 0;
  int64_t slice_rows = 0;     // a multiple of the warp size
  int64_t num_slices = 0;     // one per warp
  int32_t* counts = nullptr;  // [num_slices, kMagnitudes]
  int32_t* order = nullptr;   // [num_rows]
};

// A row, at its place in the order of rows of the same magnitude.
struct ScheduledRow {
  int32_t row = 0;
  int magnitude = 0;
  bool exists = false;
};

LONGCTX_DEVICE ScheduledRow scheduled_row(const ScheduleParams& p, int64_t place) {
  if (place >= p.num_rows) return {};
  const int64_t rows = p.blocks.num_q_blocks;
  const int64_t pattern = place / rows;  // batch and head
  const int64_t row = rows - 1 - place % rows;
  const BlockRow list =
      block_row(p.blocks, pattern / p.blocks.pattern_heads, pattern % p.blocks.pattern_heads, row);
  int magnitude = kMagnitudes - 1;
  for (int64_t length = list.end - list.begin; length > 0 && magnitude > 0; length /= 2) {
    --magnitude;
  }
  return {static_cast<int32_t>(pattern * rows + row), magnitude, true};
}

// The lanes whose row has this lane's number as its magnitude, and those whose row has the
// magnitude of this lane's row.
struct MagnitudeLanes {
  uint32_t counted;
  uint32_t alike;
};

LONGCTX_DEVICE MagnitudeLanes lanes_by_magnitude(const ScheduledRow& row) {
  MagnitudeLanes lanes;
  lanes.counted = lanes.alike = device::ballot(row.exists);
  for (int bit = 1; bit < kMagnitudes; bit *= 2) {
    const uint32_t set = device::ballot((row.magnitude & bit) != 0);
    lanes.counted &= (device::lane_index() & bit) != 0 ? set : ~set;
    lanes.alike &= (row.magnitude & bit) != 0 ? set : ~set;
  }
  return lanes;
}

LONGCTX_KERNEL(kScheduleThreads, 1) count_rows_kernel(const ScheduleParams p) {
  const int64_t slice = device::block_index() * kScheduleWarps + device::warp_index();
  if (slice >= p.num_slices) return;
  int32_t count = 0;
  for (int64_t first = 0; first < p.slice_rows; first += device::kWarpSize) {
    const int64_t place = slice * p.slice_rows + first + device::lane_index();
    count += device::count_bits(lanes_by_magnitude(scheduled_row(p, place)).counted);
  }
  p.counts[slice * kMagnitudes + device::lane_index()] = count;
}

struct PlaceRowsShared {
  int32_t total[kScheduleWarps][kMagnitudes];   // of a part of the slices
  int32_t before[kScheduleWarps][kMagnitudes];  // the same, in slices before the block's first
};

LONGCTX_KERNEL(kScheduleThreads, 1) place_rows_kernel(const ScheduleParams p) {
  auto& shared = *reinterpret_cast<PlaceRowsShared*>(device::shared_memory());
  const int lane = device::lane_index(), warp = device::warp_index();
  const int64_t first_slice = device::block_index() * kScheduleWarps;
  const int64_t slice = first_slice + warp;

  // rows of magnitude `lane`: all, and those in earlier slices
  int32_t total = 0, before = 0;
  for (int64_t s = warp; s < p.num_slices; s += kScheduleWarps) {
    const int32_t count = p.counts[s * kMagnitudes + lane];
    total += count;
    if (s < first_slice) before += count;
  }
  shared.total[warp][lane] = total;
  shared.before[warp][lane] = before;
  device::sync_threads();
  if (slice >= p.num_slices) return;
  total = before = 0;
  for (int w = 0; w < kScheduleWarps; ++w) {
    total += shared.total[w][lane];
    before += shared.before[w][lane];
  }
  for (int64_t s = first_slice; s < slice; ++s) before += p.counts[s * kMagnitudes + lane];

  // scan over the magnitudes
  int32_t through = total;
  for (int delta = 1; delta < kMagnitudes; delta *= 2) {
    const int32_t other = device::shuffle_up(through, delta);
    if (lane >= delta) through += other;
  }
  int32_t next = through - total + before;  // where the next row of magnitude `lane` goes

  // place the rows of the slice
  for (int64_t first = 0; first < p.slice_rows; first += device::kWarpSize) {
    const ScheduledRow row = scheduled_row(p, slice * p.slice_rows + first + lane);
    const MagnitudeLanes lanes = lanes_by_magnitude(row);
    const uint32_t earlier = lanes.alike & ((uint32_t{1} << lane) - 1);
    const int32_t position = device::shuffle(next, row.magnitude) + device::count_bits(earlier);
    if (row.exists) p.order[position] = row.row;
    next += device::count_bits(lanes.counted);
  }
}

}  // namespace longctx::cuda
