// Where the list of chosen entries of a block map ends, found by one block of threads in a radix
// descent over the keys of the scores: 256 bins at a time, from the first bit in which keys differ.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/items.cuh"
#include "longctx/block_map.h"
#include "longctx/score_order.h"

namespace longctx::cuda {

// One row of the map. Columns [0, first) and [last, num_visible) are forced, [first, last) compete.
// There are less than 2^31 columns, so that unsigned ones can run past the end.
struct MapRow {
  const float* scores = nullptr;  // [num_k_blocks]
  uint32_t first = 0;
  uint32_t last = 0;
  uint32_t num_visible = 0;
  LONGCTX_DEVICE uint32_t num_forced() const { return first + num_visible - last; }
  LONGCTX_DEVICE bool competes(uint32_t column) const { return column >= first && column < last; }
};

// The rows that share a cut: one row, or all rows of a sequence.
struct Region {
  int64_t head = 0;
  SequenceMap map;
  int64_t first_row = 0;  // counted from the sequence's first
  int64_t num_rows = 0;
};

LONGCTX_DEVICE MapRow map_row(const SelectBlocksParams& p, const Region& region, int64_t i) {
  MapRow row;
  row.scores = p.scores + region.map.seq.batch_index * p.scores_batch_stride +
               region.head * p.scores_head_stride +
               (region.map.first_row + region.first_row + i) * p.scores_row_stride;
  const int64_t visible = region.map.num_visible(p.map, region.first_row + i);
  const int64_t first = p.num_first < visible ? p.num_first : visible;
  row.num_visible = static_cast<uint32_t>(visible);
  row.first = static_cast<uint32_t>(first);
  row.last = static_cast<uint32_t>(clamp_index(visible - p.num_local, first, visible));
  return row;
}

// The region of row `row` of the map of a head; without rows if no sequence owns it. Whole warps
// call this.
LONGCTX_DEVICE Region row_region(const SelectBlocksParams& p, int64_t batch_index, int64_t head,
                                 int64_t row) {
  int64_t number = row;  // in its sequence
  const Sequence seq = p.map.seqs.cu_seqlens_q == nullptr
                           ? sequence_at(p.map.seqs, batch_index)
                           : packed_sequence(p.map.seqs, p.map.block_size_q, number);
  Region region;
  region.head = head;
  region.map = sequence_map(p.map, seq, row - number);
  region.first_row = number;
  region.num_rows = number < region.map.num_rows ? 1 : 0;
  return region;
}

// The region of all rows of a sequence. Whole warps call this.
LONGCTX_DEVICE Region sequence_region(const SelectBlocksParams& p, int64_t sequence, int64_t head) {
  int64_t first_row = 0;
  if (p.map.seqs.cu_seqlens_q != nullptr) {
    for (int64_t s = device::lane_index(); s < sequence; s += device::kWarpSize) {
      const int64_t q_len = sequence_at(p.map.seqs, s).q_len;
      first_row += (q_len + p.map.block_size_q - 1) / p.map.block_size_q;
    }
    first_row = clamp_index(reduce_warp(first_row, Sum()), 0, p.map.num_q_blocks);
  }
  Region region;
  region.head = head;
  region.map = sequence_map(p.map, sequence, first_row);
  region.num_rows = region.map.num_rows;
  return region;
}

// The keys of a region's visible entries, dealt out to the threads of a block.
struct RegionKeys {
  const SelectBlocksParams& p;
  const Region& region;
  const uint32_t* staged;  // [num_visible] keys of a region of one row, in shared memory; or null

  LONGCTX_DEVICE uint32_t key(const MapRow& row, uint32_t column) const {
    return staged != nullptr ? staged[column] : score_key(row.scores[column]);
  }

  // visit(key, competes) for this thread's entries, but not for those that are never chosen.
  template <class Visit>
  LONGCTX_DEVICE void for_each(const Visit& visit) const {
    constexpr int kBatch = 4;  // loads under way
    const int num_warps = device::num_threads() / device::kWarpSize;
    const bool row_per_warp = region.num_rows >= num_warps;
    const uint32_t lane = row_per_warp ? device::lane_index() : device::thread_index();
    const uint32_t lanes = row_per_warp ? device::kWarpSize : device::num_threads();
    const int64_t first_row = row_per_warp ? device::thread_index() / device::kWarpSize : 0;
    for (int64_t i = first_row; i < region.num_rows; i += row_per_warp ? num_warps : 1) {
      const MapRow row = map_row(p, region, i);
      for (uint32_t j = lane; j < row.num_visible; j += kBatch * lanes) {
        uint32_t keys[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const uint32_t column = j + b * lanes;
          keys[b] = column < row.num_visible ? key(row, column) : 0;
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (keys[b] != 0) visit(keys[b], row.competes(j + b * lanes));
        }
      }
    }
  }
};

// Entries better than `key`, and of those at `key` the first `ties`, in the order of their indices.
// What ScoreCut says by an index, this says by a count.
struct TieCut {
  uint32_t key = 0xffffffffu;
  int64_t ties = 0;  // the default chooses nothing
};

constexpr int64_t kAllTies = INT64_MAX;
constexpr TieCut kEverything = {1, kAllTies};

// What an entry adds to the sum that a cut must reach.
struct EntryWeight {
  bool is_mass = false;  // else every entry counts 1
  int shift = 0;
  LONGCTX_DEVICE int64_t operator()(uint32_t key) const {
    return is_mass ? score_mass(key_score(key), shift) : 1;
  }
};

// 64-bit sums out of 32-bit atomics, which are single instructions where 64-bit ones are loops: the
// old value tells whether the addition carried.
struct WideSums {
  static constexpr int kBins = 256;
  int32_t low[kBins];
  int32_t high[kBins];

  LONGCTX_DEVICE void clear() {
    for (int bin = device::thread_index(); bin < kBins; bin += device::num_threads()) {
      low[bin] = high[bin] = 0;
    }
  }
  LONGCTX_DEVICE void add(uint32_t bin, int64_t value) {
    const uint32_t part = static_cast<uint32_t>(value);
    const uint32_t old =
        static_cast<uint32_t>(device::atomic_add_shared(&low[bin], static_cast<int32_t>(part)));
    const int32_t rest = static_cast<int32_t>(value >> 32) + (old + part < old ? 1 : 0);
    if (rest != 0) device::atomic_add_shared(&high[bin], rest);
  }
  LONGCTX_DEVICE int64_t sum(int bin) const {
    return static_cast<int64_t>(high[bin]) << 32 | static_cast<uint32_t>(low[bin]);
  }

  // The highest digit down to which the sums reach `wanted`, which keeps what that digit must still
  // give; -1 if they fall short. A whole warp calls this.
  LONGCTX_DEVICE int digit_that_reaches(int64_t& wanted) const {
    constexpr int kOfLane = kBins / device::kWarpSize;
    const int highest = kBins - 1 - device::lane_index() * kOfLane;
    int64_t own = 0;
    for (int i = 0; i < kOfLane; ++i) own += sum(highest - i);
    const int64_t through = scan_warp(own);
    const uint32_t reached = device::ballot(through >= wanted);
    if (reached == 0) return -1;
    int64_t left = wanted - (through - own);
    int digit = highest;
    for (; digit > highest - kOfLane + 1 && sum(digit) < left; --digit) left -= sum(digit);
    const int lane = device::lowest_bit(reached);
    wanted = device::shuffle(left, lane);
    return device::shuffle(digit, lane);
  }
};

struct CutShared {
  WideSums sums;
  BlockSlots slots;
};

struct KeyBounds {
  uint32_t best = 0;  // of the visible entries
  uint32_t any = 0;   // the bits that a competing entry has,
  uint32_t all = 0;   // and those that all of them have
};

// All threads of the block call this and what follows.
LONGCTX_DEVICE KeyBounds key_bounds(const RegionKeys& keys, CutShared& shared) {
  uint32_t best = 0, any = 0, all = 0xffffffffu;
  keys.for_each([&](uint32_t key, bool competes) {
    best = key > best ? key : best;
    if (!competes) return;
    any |= key;
    all &= key;
  });
  return {static_cast<uint32_t>(reduce_block(best, Maximum(), shared.slots)),
          static_cast<uint32_t>(reduce_block(any, BitOr(), shared.slots)),
          static_cast<uint32_t>(reduce_block(all, BitAnd(), shared.slots))};
}

// The smallest prefix of the order whose weights sum to `wanted`; everything if they fall short.
// Descends digit by digit to the key at which the sum is reached; entries with the same key weigh
// the same.
LONGCTX_DEVICE TieCut reach(const RegionKeys& keys, const KeyBounds& bounds, int64_t wanted,
                            const EntryWeight& weight, CutShared& shared) {
  if (wanted <= 0 || bounds.any == 0) return {};
  int low = 0;  // bits that are still unknown
  while (low < 32 && ((bounds.any & ~bounds.all) >> low) != 0) ++low;
  uint32_t prefix = static_cast<uint32_t>(static_cast<uint64_t>(bounds.any) >> low);
  while (low > 0) {
    const int shift = low > 8 ? low - 8 : 0;
    const uint32_t digits = (1u << (low - shift)) - 1;
    shared.sums.clear();
    device::sync_threads();
    keys.for_each([&](uint32_t key, bool competes) {
      if (!competes || (static_cast<uint64_t>(key) >> low) != prefix) return;
      shared.sums.add(key >> shift & digits, weight(key));
    });
    device::sync_threads();
    const int digit = shared.sums.digit_that_reaches(wanted);
    device::sync_threads();
    if (digit < 0) return kEverything;
    prefix = prefix << (low - shift) | static_cast<uint32_t>(digit);
    low = shift;
  }
  const int64_t each = weight(prefix);
  return each > 0 ? TieCut{prefix, (wanted - 1) / each + 1} : kEverything;
}

// What the method chooses among the competing entries of a region.
LONGCTX_DEVICE TieCut find_cut(const SelectBlocksParams& p, const RegionKeys& keys,
                               const KeyBounds& bounds, CutShared& shared) {
  const Region& region = keys.region;
  const float value = p.head_values == nullptr ? p.value : p.head_values[region.head];
  const float best = key_score(bounds.best);
  const auto everything_from = [](float limit) {
    const ScoreCut cut = cut_at(limit);
    return TieCut{cut.key, cut.last_index < 0 ? 0 : kAllTies};
  };
  switch (p.method) {
    case SelectMethod::kTopK: {
      constexpr float kLargest = 9.0e18f;  // below 2^63
      const float k = value < kLargest ? value : kLargest;
      return reach(keys, bounds, value > 0.0f ? static_cast<int64_t>(k) : 0, {}, shared);
    }
    case SelectMethod::kThreshold:
      return everything_from(value);
    case SelectMethod::kRelative:
      return everything_from(value * best);
    case SelectMethod::kCumulative:
      break;
  }
  if (!(best > 0.0f)) return {};
  const EntryWeight mass{true, mass_shift(best, region.num_rows * region.map.num_columns)};
  int64_t own_total = 0, own_forced = 0;
  keys.for_each([&](uint32_t key, bool competes) {
    own_total += mass(key);
    if (!competes) own_forced += mass(key);
  });
  const int64_t total = reduce_block(own_total, Sum(), shared.slots);
  const int64_t forced = reduce_block(own_forced, Sum(), shared.slots);
  return reach(keys, bounds, mass_target(value, total) - forced, mass, shared);
}

}  // namespace longctx::cuda
