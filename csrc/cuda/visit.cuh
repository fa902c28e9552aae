// Which keys an item visits, tile by tile. One warp walks them, a tile ahead of the arithmetic, and
// leaves in shared memory where each slot's key stands and how much of the tile the rows see. A
// slot whose key no row sees is dead: its values are never read, so that NaN in unused memory
// cannot reach a sum as 0 * NaN.
#pragma once
#include "cuda/item_mask.cuh"
#include "longctx/block_list.h"

namespace longctx::cuda {

// A tile of keys, in shared memory.
template <int kTileKeys>
struct KeyTile {
  // Key position in the sequence. A dead slot holds the complement of where its key would stand.
  int32_t positions[kTileKeys];
  int32_t first;       // the keys are first, first + 1, ... as far as they live; -1: gathered
  int32_t visibility;  // kNone: no tile is left
  LONGCTX_DEVICE bool exists() const { return visibility != static_cast<int>(Visibility::kNone); }
  LONGCTX_DEVICE bool partial() const {
    return visibility == static_cast<int>(Visibility::kPartial);
  }

  // Bit i: the row sees slot i.
  LONGCTX_DEVICE uint64_t slots_seen_by(const RowMask32& row) const {
    static_assert(kTileKeys <= 64);
    if (first < 0) {
      uint64_t bits = 0;
#pragma unroll 4
      for (int slot = 0; slot < kTileKeys; ++slot) {
        bits |= static_cast<uint64_t>(row.visible(positions[slot])) << slot;
      }
      return bits;
    }
    return (slots_in(row.window) | slots_in(row.sinks)) &
           (slots_in(row.ranges[0]) | slots_in(row.ranges[1]));
  }

 private:
  LONGCTX_DEVICE uint64_t slots_in(const Interval32& interval) const {
    const auto slot = [this](int32_t position) {
      const int32_t at = position - first;
      return at < 0 ? 0 : at > kTileKeys ? kTileKeys : at;
    };
    const int begin = slot(interval.begin), end = slot(interval.end);
    return begin < end ? ~uint64_t{0} >> (64 - (end - begin)) << begin : 0;
  }
};

// Streams the key tiles of an item; one warp owns it and calls everything with all lanes.
// Without a block list tiles are aligned runs of kTileKeys keys. With one, a tile holds the keys of
// kTileKeys / block_size_k neighbouring entries, or a part of one entry.
template <int kTileKeys, int kMaxRows>
class KeyTiles {
 public:
  LONGCTX_DEVICE explicit KeyTiles(ItemMask<kMaxRows>& mask) : mask_(mask) {}

  // `row` is the item's row of `blocks`, if there are any. The mask has its extents.
  LONGCTX_DEVICE void begin(const BlockList* blocks, BlockRow row, const Item& item,
                            int64_t num_splits) {
    KeyPlan plan = {};
    plan.listed = blocks != nullptr;
    plan.k_len = static_cast<int32_t>(item.seq.k_len);
    plan.entries = row.begin;
    plan.num_entries = static_cast<int32_t>(clamp_index(row.end - row.begin, 0, kMaxSeqlenK));
    plan.block_shift = kTileShift;
    if (plan.listed) plan.block_shift = device::lowest_bit(count32(blocks->block_size_k));
    plan.entries_per_tile_shift = plan.block_shift < kTileShift ? kTileShift - plan.block_shift : 0;
    plan.tiles_per_entry_shift = plan.block_shift > kTileShift ? plan.block_shift - kTileShift : 0;
    const int32_t num_runs = set_runs(plan);
    const int32_t slack = (1 << plan.entries_per_tile_shift) - 1;
    const int64_t num_groups = (plan.num_entries + slack) >> plan.entries_per_tile_shift;
    const int64_t num_tiles = plan.listed ? num_groups << plan.tiles_per_entry_shift : num_runs;
    plan.tile = static_cast<int32_t>(num_tiles * item.split / num_splits);
    plan.num_tiles = static_cast<int32_t>(num_tiles * (item.split + 1) / num_splits);
    plan.last_entry = last_entry_before(plan);
    store(plan);
  }

  // Fills `tile` with the next one that a row sees; visibility kNone when none is left. The other
  // warps see it after a barrier.
  LONGCTX_DEVICE void next(KeyTile<kTileKeys>& tile) {
    KeyPlan plan = mask_.plan;
    Visibility visibility = Visibility::kNone;
    while (plan.tile < plan.num_tiles && visibility == Visibility::kNone) {
      visibility = plan.listed ? load_entries(plan, tile) : load_run(plan, tile);
      ++plan.tile;
    }
    if (device::lane_index() == 0) tile.visibility = static_cast<int>(visibility);
    store(plan);
  }

 private:
  static constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }
  static constexpr int kSlots = kTileKeys / device::kWarpSize;  // of a lane
  static constexpr int kTileShift = log2_of(kTileKeys);

  LONGCTX_DEVICE static uint32_t count32(int64_t value) { return static_cast<uint32_t>(value); }
  LONGCTX_DEVICE static int slot(int i) { return i * device::kWarpSize + device::lane_index(); }

  LONGCTX_DEVICE void store(const KeyPlan& plan) {
    device::sync_warp();
    if (device::lane_index() == 0) mask_.plan = plan;
    device::sync_warp();
  }

  // The visible pieces as runs of tiles, and the number of those.
  LONGCTX_DEVICE int32_t set_runs(KeyPlan& plan) const {
    int32_t count = 0, last = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Interval32 piece = mask_.visible[i];
      Interval32 run{piece.begin >> kTileShift, (piece.end + kTileKeys - 1) >> kTileShift};
      if (run.begin < last) run.begin = last;  // one tile may hold the end of a piece and the next
      if (piece.begin >= piece.end || run.begin > run.end) run = {last, last};
      plan.runs[i] = run;
      last = run.end;
      count += run.end - run.begin;
    }
    return count;
  }

  LONGCTX_DEVICE static bool in_sequence(const KeyPlan& plan, int32_t entry) {
    return entry >= 0 && entry <= (plan.k_len - 1) >> plan.block_shift;
  }

  // An entry counts only if it is larger than all before it: those of earlier splits as well.
  LONGCTX_DEVICE static int32_t last_entry_before(const KeyPlan& plan) {
    int32_t last = -1;
    int32_t count = (plan.tile >> plan.tiles_per_entry_shift) << plan.entries_per_tile_shift;
    if (count > plan.num_entries) count = plan.num_entries;
    for (int32_t i = device::lane_index(); i < count; i += device::kWarpSize) {
      const int32_t entry = plan.entries[i];
      if (in_sequence(plan, entry) && entry > last) last = entry;
    }
    return warp_max(last);
  }

  // Entry `index` of the tile, -1 where there is none. Neighbouring tiles find theirs in the L1
  // cache.
  LONGCTX_DEVICE static int32_t entry_of_tile(const KeyPlan& plan, int index) {
    const int32_t first = (plan.tile >> plan.tiles_per_entry_shift) << plan.entries_per_tile_shift;
    const bool listed =
        index >> plan.entries_per_tile_shift == 0 && first + index < plan.num_entries;
    return listed ? plan.entries[first + index] : -1;
  }

  LONGCTX_DEVICE Visibility load_run(const KeyPlan& plan, KeyTile<kTileKeys>& tile) const {
    int32_t index = plan.tile, number = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Interval32 run = plan.runs[i];
      const int32_t length = run.end - run.begin;
      if (!found && index < length) {
        number = run.begin + index;
        found = true;
      }
      index -= length;
    }
    return load_consecutive(plan, number << kTileShift, tile);
  }

  // The keys [first, first + kTileKeys), as far as the sequence has them.
  LONGCTX_DEVICE Visibility load_consecutive(const KeyPlan& plan, int32_t first,
                                             KeyTile<kTileKeys>& tile) const {
    const int32_t left = plan.k_len - first;
    const int32_t end = first + (left < kTileKeys ? left : kTileKeys);
    const Visibility visibility = mask_.visibility(first, end);
    if (visibility == Visibility::kNone) return visibility;
    const bool full = visibility == Visibility::kFull && left >= kTileKeys;
    bool any = full;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int32_t position = first + slot(i);
      const bool live = full || (position < end && lives(position));
      tile.positions[slot(i)] = live ? position : ~position;
      any |= live;
    }
    if (device::ballot(any) == 0) return Visibility::kNone;
    if (device::lane_index() == 0) tile.first = first;
    return full ? Visibility::kFull : Visibility::kPartial;
  }

  LONGCTX_DEVICE Visibility load_entries(KeyPlan& plan, KeyTile<kTileKeys>& tile) {
    if (plan.entries_per_tile_shift > 0) return gather_entries(plan, tile);
    const int32_t part = plan.tile & ((1 << plan.tiles_per_entry_shift) - 1);
    const int32_t entry = entry_of_tile(plan, 0);
    // The parts of an entry follow each other: only its first one decides whether it counts.
    if (part == 0 || !plan.started) {
      plan.started = true;
      plan.counts = entry > plan.last_entry && in_sequence(plan, entry);
      if (plan.counts) plan.last_entry = entry;
    }
    if (!plan.counts) return Visibility::kNone;
    const int32_t first = (entry << plan.block_shift) + (part << kTileShift);
    return first < plan.k_len ? load_consecutive(plan, first, tile) : Visibility::kNone;
  }

  // kTileKeys / block_size_k entries side by side; one that does not count leaves dead slots.
  LONGCTX_DEVICE Visibility gather_entries(KeyPlan& plan, KeyTile<kTileKeys>& tile) {
    static_assert(kTileKeys <= 256, "entries of 8 keys and more fit the lanes of a warp");
    const int32_t shift = plan.block_shift, k_len = plan.k_len;
    int32_t positions[kSlots];
    int32_t entries[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) entries[i] = entry_of_tile(plan, slot(i));
    int32_t entry = accept_entry(plan, entries[0]);
    int32_t lowest = static_cast<int32_t>(kMaxSeqlenK), highest = -1;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (shift == 0 && i > 0) entry = accept_entry(plan, entries[i]);
      const int32_t own =
          shift == 0 ? entry : device::shuffle(entry, slot(i) >> shift & (device::kWarpSize - 1));
      const int32_t position = own * (1 << shift) + (slot(i) & ((1 << shift) - 1));
      positions[i] = own >= 0 && position < k_len ? position : -1;
      if (positions[i] < 0) continue;
      if (position < lowest) lowest = position;
      if (position > highest) highest = position;
    }
    lowest = -warp_max(-lowest);
    highest = warp_max(highest);
    if (highest < 0) return Visibility::kNone;
    const Visibility visibility = mask_.visibility(lowest, highest + 1);
    if (visibility == Visibility::kNone) return visibility;
    bool any = false, all = visibility == Visibility::kFull;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int32_t position = positions[i];
      const bool live = position >= 0 && (visibility == Visibility::kFull || lives(position));
      tile.positions[slot(i)] = live || position < 0 ? position : ~position;
      any |= live;
      all &= live;
    }
    if (device::ballot(any) == 0) return Visibility::kNone;
    if (device::lane_index() == 0) tile.first = -1;
    return device::ballot(!all) == 0 ? Visibility::kFull : Visibility::kPartial;
  }

  // `entry` of each lane if it counts, else -1.
  LONGCTX_DEVICE static int32_t accept_entry(KeyPlan& plan, int32_t entry) {
    if (!in_sequence(plan, entry)) entry = -1;
    int32_t largest = entry;  // of the entries up to this lane's
    for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
      const int32_t other = device::shuffle_up(largest, delta);
      if (other > largest) largest = other;
    }
    int32_t bar = device::shuffle_up(largest, 1);
    if (device::lane_index() == 0 || plan.last_entry > bar) bar = plan.last_entry;
    const int32_t last = device::shuffle(largest, device::kWarpSize - 1);
    if (last > plan.last_entry) plan.last_entry = last;
    return entry > bar ? entry : -1;
  }

  // Whether some row sees the key. Without key ranges the pieces are exact.
  LONGCTX_DEVICE bool lives(int32_t position) const {
    bool inside = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) inside |= mask_.visible[i].contains(position);
    return inside && (!mask_.has_ranges || mask_.any_row_sees(position));
  }

  ItemMask<kMaxRows>& mask_;
};

}  // namespace longctx::cuda
