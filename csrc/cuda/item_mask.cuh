// The masks of an item's rows, and what all and what any of them see.
#pragma once
#include "cuda/items.cuh"
#include "device/thread.cuh"
#include "longctx/mask.h"

namespace longctx::cuda {

using Interval32 = BasicInterval<int32_t>;
using RowMask32 = BasicRowMask<int32_t>;

constexpr int64_t kMaxSeqlenK = int64_t{1} << 30;  // key positions are 32 bits in a kernel

LONGCTX_DEVICE Interval32 narrow_interval(const Interval& interval) {
  return {static_cast<int32_t>(clamp_index(interval.begin, -kMaxSeqlenK, kMaxSeqlenK)),
          static_cast<int32_t>(clamp_index(interval.end, -kMaxSeqlenK, kMaxSeqlenK))};
}

LONGCTX_DEVICE RowMask32 row_mask32(const MaskParams& mask, const Sequence& seq, int64_t row) {
  const RowMask wide = row_mask(mask, seq, row);
  return {narrow_interval(wide.window),
          narrow_interval(wide.sinks),
          {narrow_interval(wide.ranges[0]), narrow_interval(wide.ranges[1])}};
}

// The largest value of the warp's lanes.
LONGCTX_DEVICE int32_t warp_max(int32_t value) {
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    const int32_t other = device::shuffle_xor(value, mask);
    if (other > value) value = other;
  }
  return value;
}

// Where KeyTiles finds the keys of an item, and how far it has come. In shared memory: kernels have
// no registers to spare for what one warp needs once per tile.
struct KeyPlan {
  Interval32 runs[4];      // dense: tiles that hold the visible pieces; ascending, disjoint
  const int32_t* entries;  // block list: [num_entries], of one row
  int32_t num_entries;
  int32_t num_tiles;               // through the end of this split
  int32_t block_shift;             // log2(block_size_k)
  int32_t entries_per_tile_shift;  // log2 of the entries side by side in a tile
  int32_t tiles_per_entry_shift;   // log2 of the tiles that an entry fills
  int32_t k_len;
  int32_t tile;        // the next one
  int32_t last_entry;  // the largest so far
  bool listed;
  bool started;
  bool counts;  // of an entry that fills several tiles: whether it is one to visit
};

// In shared memory.
template <int kMaxRows>
struct ItemMask {
  RowMask32 rows[kMaxRows];  // of query rows, not of (row, head) pairs
  RowMask32 common;          // every row sees this much
  RowMask32 hull;            // no row sees more
  Interval32 visible[4];     // the union of the hulls: ascending, disjoint, some empty
  KeyPlan plan;
  int32_t num_rows;
  bool has_ranges;

  // Conservative, as RowMask::visibility().
  LONGCTX_DEVICE Visibility visibility(int32_t lo, int32_t hi) const {
    if (common.visibility(lo, hi) == Visibility::kFull) return Visibility::kFull;
    return hull.visibility(lo, hi) == Visibility::kNone ? Visibility::kNone : Visibility::kPartial;
  }

  // All threads of the block call this; the masks hold after the next barrier.
  LONGCTX_DEVICE void init_rows(const MaskParams& mask, const Item& item) {
    for (int row = device::thread_index(); row < item.num_rows; row += device::num_threads()) {
      rows[row] = row_mask32(mask, item.seq, item.row_begin + row);
    }
    if (device::thread_index() != 0) return;
    num_rows = item.num_rows;
    has_ranges = mask.key_ranges != nullptr;
  }

  // One warp calls this after the barrier.
  LONGCTX_DEVICE void init_extents() {
    RowMask32 all, any;
    if (!has_ranges) {
      // Without ranges a mask only moves on with its row: the outer rows tell the extents.
      const RowMask32 low = rows[0], high = rows[num_rows - 1];
      all = {{high.window.begin, low.window.end}, low.sinks, {low.ranges[0], {}}};
      any = {{low.window.begin, high.window.end}, high.sinks, {low.ranges[0], {}}};
    } else {
      reduce([](const RowMask32& row) { return row.window; }, all.window, any.window);
      reduce([](const RowMask32& row) { return row.sinks; }, all.sinks, any.sinks);
      reduce([](const RowMask32& row) { return row.ranges[0]; }, all.ranges[0], any.ranges[0]);
      reduce([](const RowMask32& row) { return row.ranges[1]; }, all.ranges[1], any.ranges[1]);
    }
    Interval32 pieces[4];
    join_hulls(any, pieces);
    device::sync_warp();
    if (device::lane_index() == 0) {
      common = all;
      hull = any;
#pragma unroll
      for (int i = 0; i < 4; ++i) visible[i] = pieces[i];
    }
    device::sync_warp();
  }

  // Whether a row of the item sees `key`.
  LONGCTX_DEVICE bool any_row_sees(int32_t key) const {
    for (int row = 0; row < num_rows; ++row) {
      if (rows[row].visible(key)) return true;
    }
    return false;
  }

 private:
  template <class Part>
  LONGCTX_DEVICE void reduce(const Part& part, Interval32& all, Interval32& any) const {
    constexpr int32_t kFar = static_cast<int32_t>(kMaxSeqlenK);
    Interval32 meet{-kFar, kFar}, join{kFar, -kFar};
    for (int row = device::lane_index(); row < num_rows; row += device::kWarpSize) {
      const Interval32 own = part(rows[row]);
      if (own.begin > meet.begin) meet.begin = own.begin;
      if (own.end < meet.end) meet.end = own.end;
      if (own.begin >= own.end) continue;
      if (own.begin < join.begin) join.begin = own.begin;
      if (own.end > join.end) join.end = own.end;
    }
    all = {warp_max(meet.begin), -warp_max(-meet.end)};
    any = {-warp_max(-join.begin), warp_max(join.end)};
    if (any.begin >= any.end) any = {};
  }

  // (window or sinks) and (range 0 or range 1) of the hulls, sorted and joined where they touch.
  LONGCTX_DEVICE static void join_hulls(const RowMask32& any, Interval32 (&pieces)[4]) {
    constexpr int32_t kFar = static_cast<int32_t>(kMaxSeqlenK);
    const Interval32 structure[2] = {any.window, any.sinks};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Interval32 &a = structure[i / 2], &b = any.ranges[i % 2];
      pieces[i] = {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
      if (pieces[i].begin >= pieces[i].end) pieces[i] = {kFar, kFar};  // empty: sorts behind
    }
    constexpr int kNetwork[5][2] = {{0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      Interval32 &low = pieces[kNetwork[i][0]], &high = pieces[kNetwork[i][1]];
      if (low.begin <= high.begin) continue;
      const Interval32 other = low;
      low = high;
      high = other;
    }
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      if (pieces[i].begin > pieces[i - 1].end || pieces[i].begin == kFar) continue;
      pieces[i].begin = pieces[i - 1].begin;
      if (pieces[i].end < pieces[i - 1].end) pieces[i].end = pieces[i - 1].end;
      pieces[i - 1].end = pieces[i - 1].begin;
    }
  }
};

}  // namespace longctx::cuda
