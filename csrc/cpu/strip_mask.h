// The mask of one strip of query rows, laid over the key tiles of a chunk. Most tiles are decided
// by a few comparisons against what all rows and what any row sees; the rest get one bit per pair.
#pragma once
#include <algorithm>
#include <cstdint>

#include "longctx/mask.h"
#include "strip_engine.h"

namespace longctx::cpu {

class StripMask {
 public:
  // Lane i is query row rows[i] of the sequence; lanes from num_rows on repeat the last row.
  void init(const MaskParams& mask, const Sequence& seq, const int64_t* rows, int num_rows) {
    mask_ = &mask;
    seq_ = seq;
    for (int lane = 0; lane < kStripRows; ++lane) rows_[lane] = rows[std::min(lane, num_rows - 1)];
    if (mask.key_ranges == nullptr) {
      // Without ranges a mask only moves on with its row: the outer rows tell the extents.
      const auto [first, last] = std::minmax_element(rows_, rows_ + kStripRows);
      const RowMask low = row_mask(mask, seq, *first), high = row_mask(mask, seq, *last);
      window_ = {{high.window.begin, low.window.end}, {low.window.begin, high.window.end}};
      sinks_ = {low.sinks, high.sinks};
      ranges_[0] = {low.ranges[0], low.ranges[0]};
      ranges_[1] = {};
      return;
    }
    for (int lane = 0; lane < kStripRows; ++lane) {
      const RowMask row = row_mask(mask, seq, rows_[lane]);
      window_.add(row.window, lane);
      sinks_.add(row.sinks, lane);
      for (int r = 0; r < 2; ++r) ranges_[r].add(row.ranges[r], lane);
    }
  }

  // Fills `result`; false when the strip sees nothing of the chunk.
  bool apply(const KeyChunk& chunk, ChunkMask* result) const {
    bool any = false;
    for (int64_t first = 0; first < chunk.num_keys; first += kKeyTile) {
      const int count = static_cast<int>(std::min<int64_t>(kKeyTile, chunk.num_keys - first));
      const int64_t* positions = chunk.positions + first;
      Visibility tile = visibility(positions[0], positions[count - 1] + 1);
      if (tile == Visibility::kFull && count < kKeyTile) tile = Visibility::kPartial;
      if (tile == Visibility::kPartial && !set_bits(positions, count, result->visible + first)) {
        tile = Visibility::kNone;
      }
      result->tiles[first / kKeyTile] = static_cast<uint8_t>(tile);
      any |= tile != Visibility::kNone;
    }
    return any;
  }

 private:
  // What every lane and what some lane sees of one part of the mask.
  struct Extent {
    Interval common;
    Interval hull;
    void add(const Interval& part, int lane) {
      const bool empty = part.begin >= part.end;
      common = lane == 0
                   ? part
                   : Interval{std::max(common.begin, part.begin), std::min(common.end, part.end)};
      if (lane == 0) hull = {};
      if (empty) return;
      hull = hull.begin >= hull.end
                 ? part
                 : Interval{std::min(hull.begin, part.begin), std::max(hull.end, part.end)};
    }
  };

  Visibility visibility(int64_t lo, int64_t hi) const {
    const bool full_structure = window_.common.covers(lo, hi) || sinks_.common.covers(lo, hi);
    const bool full_ranges = ranges_[0].common.covers(lo, hi) || ranges_[1].common.covers(lo, hi);
    if (full_structure && full_ranges) return Visibility::kFull;
    const bool structure = window_.hull.overlaps(lo, hi) || sinks_.hull.overlaps(lo, hi);
    const bool ranges = ranges_[0].hull.overlaps(lo, hi) || ranges_[1].hull.overlaps(lo, hi);
    return structure && ranges ? Visibility::kPartial : Visibility::kNone;
  }

  // Bits [begin, end) of the tile's slots whose positions lie in the interval.
  static uint32_t slots_in(const Interval& interval, const int64_t* positions, int count,
                           bool consecutive) {
    int64_t begin, end;
    if (consecutive) {
      begin = std::clamp<int64_t>(interval.begin - positions[0], 0, count);
      end = std::clamp<int64_t>(interval.end - positions[0], 0, count);
    } else {
      begin = std::lower_bound(positions, positions + count, interval.begin) - positions;
      end = std::lower_bound(positions, positions + count, interval.end) - positions;
    }
    if (begin >= end) return 0;
    return static_cast<uint32_t>((uint64_t{1} << end) - (uint64_t{1} << begin));
  }

  bool set_bits(const int64_t* positions, int count, uint32_t* visible) const {
    const bool consecutive = positions[count - 1] - positions[0] == count - 1;
    uint32_t any = 0;
    for (int lane = 0; lane < kStripRows; ++lane) {
      const RowMask row = row_mask(*mask_, seq_, rows_[lane]);
      const auto slots = [&](const Interval& part) {
        return part.begin < part.end ? slots_in(part, positions, count, consecutive) : 0u;
      };
      visible[lane] =
          (slots(row.window) | slots(row.sinks)) & (slots(row.ranges[0]) | slots(row.ranges[1]));
      any |= visible[lane];
    }
    transpose(visible);
    return any != 0;
  }

  // 32 x 32 bits: rows of slots become slots of rows (Warren, Hacker's Delight, 7-3).
  static void transpose(uint32_t* bits) {
    uint32_t low = 0x0000ffffu;
    for (int width = 16; width != 0; width /= 2, low ^= low << width) {
      for (int i = 0; i < 32; i = (i + width + 1) & ~width) {
        const uint32_t swap = ((bits[i] >> width) ^ bits[i + width]) & low;
        bits[i + width] ^= swap;
        bits[i] ^= swap << width;
      }
    }
  }

  const MaskParams* mask_;
  Sequence seq_;
  int64_t rows_[kStripRows];
  Extent window_, sinks_, ranges_[2];
};

}  // namespace longctx::cpu
