// Which keys an item visits, tile by tile. One warp walks them, a tile ahead of the arithmetic, and
// leaves in shared memory where each slot's key stands and how much of the tile the rows see. A
// slot whose key no row sees is dead: its values are never read, so that NaN in unused memory
// cannot reach a sum as 0 * NaN.
#pragma once
#include "cuda/items.cuh"
#include "device/thread.cuh"
#include "longctx/block_list.h"
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

// The masks of an item's rows, and what all and what any of them see.
template <int kMaxRows>
struct ItemMask {
  RowMask32 rows[kMaxRows];  // of query rows, not of (row, head) pairs
  RowMask32 common;          // every row sees this much
  RowMask32 hull;            // no row sees more
  Interval32 visible[4];     // the union of the hulls: ascending, disjoint, maybe empty ones last

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
  }

  // One warp calls this after the barrier.
  LONGCTX_DEVICE void init_extents(int num_rows) {
    RowMask32 all, any;
    reduce(num_rows, [](const RowMask32& row) { return row.window; }, all.window, any.window);
    reduce(num_rows, [](const RowMask32& row) { return row.sinks; }, all.sinks, any.sinks);
    reduce(
        num_rows, [](const RowMask32& row) { return row.ranges[0]; }, all.ranges[0], any.ranges[0]);
    reduce(
        num_rows, [](const RowMask32& row) { return row.ranges[1]; }, all.ranges[1], any.ranges[1]);
    if (device::lane_index() == 0) {
      common = all;
      hull = any;
      set_visible(any);
    }
    device::sync_warp();
  }

  // Whether a row of the item sees `key`.
  LONGCTX_DEVICE bool any_row_sees(int num_rows, int32_t key) const {
    for (int row = 0; row < num_rows; ++row) {
      if (rows[row].visible(key)) return true;
    }
    return false;
  }

 private:
  template <class Part>
  LONGCTX_DEVICE void reduce(int num_rows, const Part& part, Interval32& all, Interval32& any) {
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
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      const auto most = [mask](int32_t& mine) {
        const int32_t other = device::shuffle_xor(mine, mask);
        if (other > mine) mine = other;
      };
      const auto least = [mask](int32_t& mine) {
        const int32_t other = device::shuffle_xor(mine, mask);
        if (other < mine) mine = other;
      };
      most(meet.begin);
      least(meet.end);
      least(join.begin);
      most(join.end);
    }
    all = meet;
    any = join.begin < join.end ? join : Interval32{};
  }

  // (window or sinks) and (range 0 or range 1) of the hulls, sorted and joined.
  LONGCTX_DEVICE void set_visible(const RowMask32& any) {
    const Interval32 structure[2] = {any.window, any.sinks};
    int count = 0;
    for (int i = 0; i < 4; ++i) {
      const Interval32 &a = structure[i / 2], &b = any.ranges[i % 2];
      Interval32 piece{a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
      if (piece.begin >= piece.end) continue;
      int at = count;  // insertion sort, joining what touches
      for (; at > 0 && visible[at - 1].begin > piece.begin; --at) visible[at] = visible[at - 1];
      visible[at] = piece;
      ++count;
    }
    int kept = 0;
    for (int i = 1; i < count; ++i) {
      if (visible[i].begin <= visible[kept].end) {
        if (visible[i].end > visible[kept].end) visible[kept].end = visible[i].end;
      } else {
        visible[++kept] = visible[i];
      }
    }
    for (int i = count == 0 ? 0 : kept + 1; i < 4; ++i) visible[i] = {};
  }
};

// A tile of keys, in shared memory.
template <int kTileKeys>
struct KeyTile {
  // Key position in the sequence. A dead slot holds the complement of where its key would stand.
  int32_t positions[kTileKeys];
  int32_t visibility;  // kNone: no tile is left
  LONGCTX_DEVICE bool exists() const { return visibility != static_cast<int>(Visibility::kNone); }
  LONGCTX_DEVICE bool partial() const {
    return visibility == static_cast<int>(Visibility::kPartial);
  }
};

// Streams the key tiles of an item; one warp owns it and calls everything with all lanes.
// Without a block list tiles are aligned runs of kTileKeys keys. With one, a tile holds the keys of
// kTileKeys / block_size_k neighbouring entries, or a part of one entry.
template <int kTileKeys, int kMaxRows>
class KeyTiles {
 public:
  LONGCTX_DEVICE KeyTiles(const MaskParams& params, const BlockList* blocks, BlockRow row,
                          const Item& item, int64_t num_splits, const ItemMask<kMaxRows>& mask)
      : mask_(mask),
        row_(row),
        k_len_(static_cast<int32_t>(item.seq.k_len)),
        num_rows_(item.num_rows),
        has_ranges_(params.key_ranges != nullptr),
        listed_(blocks != nullptr) {
    if (blocks != nullptr) {
      block_size_ = static_cast<int32_t>(blocks->block_size_k);
      entries_per_tile_ = block_size_ < kTileKeys ? kTileKeys / block_size_ : 1;
      tiles_per_entry_ = block_size_ > kTileKeys ? block_size_ / kTileKeys : 1;
    }
    const int64_t tiles = blocks == nullptr ? set_runs() : list_tiles();
    tile_ = tiles * item.split / num_splits;
    end_ = tiles * (item.split + 1) / num_splits;
    if (blocks != nullptr) skip_entries(tile_ / tiles_per_entry_ * entries_per_tile_);
  }

  // Fills `tile` with the next one that a row sees; visibility kNone when none is left. The other
  // warps see it after a barrier.
  LONGCTX_DEVICE void next(KeyTile<kTileKeys>& tile) {
    Visibility visibility = Visibility::kNone;
    while (tile_ < end_ && visibility == Visibility::kNone) {
      visibility = listed_ ? load_entries(tile) : load_run(tile);
      ++tile_;
    }
    if (device::lane_index() == 0) tile.visibility = static_cast<int>(visibility);
  }

 private:
  static constexpr int kSlots = kTileKeys / device::kWarpSize;  // of a lane

  // The visible pieces as runs of tiles, and their number.
  LONGCTX_DEVICE int64_t set_runs() {
    int64_t count = 0;
    int32_t last = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Interval32 piece = mask_.visible[i];
      const int32_t first = piece.begin / kTileKeys;
      runs_[i] = {first > last ? first : last, (piece.end + kTileKeys - 1) / kTileKeys};
      if (piece.begin >= piece.end || runs_[i].begin > runs_[i].end) runs_[i] = {last, last};
      last = runs_[i].end;
      count += runs_[i].end - runs_[i].begin;
    }
    return count;
  }

  LONGCTX_DEVICE int64_t list_tiles() const {
    const int64_t entries = row_.end - row_.begin;
    return (entries + entries_per_tile_ - 1) / entries_per_tile_ * tiles_per_entry_;
  }

  LONGCTX_DEVICE bool in_sequence(int32_t entry) const {
    return entry >= 0 && static_cast<int64_t>(entry) * block_size_ < k_len_;
  }

  // An entry counts only if it is larger than all before it: those of earlier splits as well.
  LONGCTX_DEVICE void skip_entries(int64_t count) {
    const int64_t entries = row_.end - row_.begin;
    for (int64_t i = device::lane_index(); i < count && i < entries; i += device::kWarpSize) {
      const int32_t entry = row_.begin[i];
      if (in_sequence(entry) && entry > last_entry_) last_entry_ = entry;
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      const int32_t other = device::shuffle_xor(last_entry_, mask);
      if (other > last_entry_) last_entry_ = other;
    }
  }

  LONGCTX_DEVICE Visibility load_run(KeyTile<kTileKeys>& tile) {
    int64_t index = tile_;
    int32_t number = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t length = runs_[i].end - runs_[i].begin;
      if (!found && index < length) {
        number = runs_[i].begin + static_cast<int32_t>(index);
        found = true;
      }
      index -= length;
    }
    return load_consecutive(number * kTileKeys, tile);
  }

  // The keys [first, first + kTileKeys), as far as the sequence has them.
  LONGCTX_DEVICE Visibility load_consecutive(int32_t first, KeyTile<kTileKeys>& tile) {
    const int32_t end = first + kTileKeys < k_len_ ? first + kTileKeys : k_len_;
    const Visibility visibility = mask_.visibility(first, end);
    if (visibility == Visibility::kNone) return visibility;
    const bool full = visibility == Visibility::kFull && end - first == kTileKeys;
    bool any = false;
    for (int i = 0; i < kSlots; ++i) {
      const int slot = i * device::kWarpSize + device::lane_index();
      const int32_t position = first + slot;
      const bool live = full || (position < end && lives(position));
      tile.positions[slot] = live ? position : ~position;
      any |= live;
    }
    if (device::ballot(any) == 0) return Visibility::kNone;
    return full ? Visibility::kFull : Visibility::kPartial;
  }

  LONGCTX_DEVICE Visibility load_entries(KeyTile<kTileKeys>& tile) {
    if (entries_per_tile_ > 1) return gather_entries(tile);
    const int64_t part = tile_ % tiles_per_entry_;
    const int32_t entry = row_.begin[tile_ / tiles_per_entry_];
    const bool new_entry = entry > last_entry_ && in_sequence(entry);
    // The parts of an entry follow each other: only its first one decides whether it counts.
    if (part == 0 || !started_) {
      started_ = true;
      counts_ = new_entry;
      if (new_entry) last_entry_ = entry;
    }
    const int64_t first = static_cast<int64_t>(entry) * block_size_ + part * kTileKeys;
    if (!counts_ || first >= k_len_) return Visibility::kNone;
    return load_consecutive(static_cast<int32_t>(first), tile);
  }

  // kTileKeys / block_size_k entries side by side; one that does not count leaves dead slots.
  LONGCTX_DEVICE Visibility gather_entries(KeyTile<kTileKeys>& tile) {
    static_assert(kTileKeys <= 128, "entries of 8 keys and more fit the lanes of a warp");
    int32_t positions[kSlots];
    int32_t entry = -1;
    int32_t lowest = static_cast<int32_t>(kMaxSeqlenK), highest = -1;
    for (int i = 0; i < kSlots; ++i) {
      const int slot = i * device::kWarpSize + device::lane_index();
      if (block_size_ == 1 || i == 0) entry = accept_entry(i * device::kWarpSize);
      const int32_t own =
          block_size_ == 1 ? entry : device::shuffle(entry, slot / block_size_ % 32);
      const int32_t position = own * block_size_ + slot % block_size_;
      positions[i] = own >= 0 && position < k_len_ ? position : -1;
      if (positions[i] < 0) continue;
      if (position < lowest) lowest = position;
      if (position > highest) highest = position;
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      const int32_t low = device::shuffle_xor(lowest, mask);
      const int32_t high = device::shuffle_xor(highest, mask);
      if (low < lowest) lowest = low;
      if (high > highest) highest = high;
    }
    if (highest < 0) return Visibility::kNone;
    const Visibility visibility = mask_.visibility(lowest, highest + 1);
    if (visibility == Visibility::kNone) return visibility;
    bool any = false, all = true;
    for (int i = 0; i < kSlots; ++i) {
      const bool live =
          positions[i] >= 0 && (visibility == Visibility::kFull || lives(positions[i]));
      const int32_t dead = positions[i] >= 0 ? ~positions[i] : -1;
      tile.positions[i * device::kWarpSize + device::lane_index()] = live ? positions[i] : dead;
      any |= live;
      all &= live;
    }
    if (device::ballot(any) == 0) return Visibility::kNone;
    const bool full = device::ballot(!all) == 0 && visibility == Visibility::kFull;
    return full ? Visibility::kFull : Visibility::kPartial;
  }

  // Entry `first` + lane of the tile, or -1 where there is none or it does not count.
  LONGCTX_DEVICE int32_t accept_entry(int first) {
    const int in_tile = first + device::lane_index();
    const int64_t index = tile_ * entries_per_tile_ + in_tile;
    const bool listed = in_tile < entries_per_tile_ && index < row_.end - row_.begin;
    int32_t entry = listed ? row_.begin[index] : -1;
    if (!in_sequence(entry)) entry = -1;
    int32_t largest = entry;  // of the entries up to this lane's
    for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
      const int32_t other = device::shuffle_up(largest, delta);
      if (other > largest) largest = other;
    }
    int32_t bar = device::shuffle_up(largest, 1);
    if (device::lane_index() == 0 || last_entry_ > bar) bar = last_entry_;
    const int32_t last = device::shuffle(largest, device::kWarpSize - 1);
    if (last > last_entry_) last_entry_ = last;
    return entry > bar ? entry : -1;
  }

  // Whether some row sees the key. Without key ranges the pieces are exact.
  LONGCTX_DEVICE bool lives(int32_t position) const {
    bool inside = false;
    for (int i = 0; i < 4; ++i) inside |= mask_.visible[i].contains(position);
    return inside && (!has_ranges_ || mask_.any_row_sees(num_rows_, position));
  }

  const ItemMask<kMaxRows>& mask_;
  BlockRow row_;
  Interval32 runs_[4];
  int64_t tile_ = 0, end_ = 0;
  int32_t last_entry_ = -1;
  int32_t block_size_ = kTileKeys, entries_per_tile_ = 1, tiles_per_entry_ = 1;
  int32_t k_len_;
  int num_rows_;
  bool has_ranges_, listed_;
  bool started_ = false, counts_ = false;
};

}  // namespace longctx::cuda
