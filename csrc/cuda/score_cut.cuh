// Where the list of chosen entries of a block map ends, found in a radix descent over the keys of
// the scores: 256 bins at a time, from the first bit in which keys differ.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/items.cuh"
#include "cuda/wide_sums.cuh"
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

// Rows of the map of a sequence and head.
struct Region {
  int64_t head = 0;
  SequenceMap map;
  int64_t first_row = 0;  // counted from the sequence's first
  int64_t row_step = 1;
  int64_t num_rows = 0;
};

LONGCTX_DEVICE MapRow map_row(const SelectBlocksParams& p, const Region& region, int64_t i) {
  const int64_t number = region.first_row + i * region.row_step;
  MapRow row;
  row.scores = p.scores + region.map.seq.batch_index * p.scores_batch_stride +
               region.head * p.scores_head_stride +
               (region.map.first_row + number) * p.scores_row_stride;
  const int64_t visible = region.map.num_visible(p.map, number);
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

using KeySums = WideSums<256>;

// The highest digit down to which the sums of the digits reach `wanted`, which keeps what that
// digit must still give; -1 if they fall short. A whole warp calls this.
template <class Sums>
LONGCTX_DEVICE int digit_that_reaches(const Sums& sums, int64_t& wanted) {
  constexpr int kOfLane = KeySums::kBins / device::kWarpSize;
  const int highest = KeySums::kBins - 1 - device::lane_index() * kOfLane;
  int64_t own = 0;
  for (int i = 0; i < kOfLane; ++i) own += sums[highest - i];
  const int64_t through = scan_warp(own);
  const uint32_t reached = device::ballot(through >= wanted);
  if (reached == 0) return -1;
  int64_t left = wanted - (through - own);
  int digit = highest;
  for (; digit > highest - kOfLane + 1 && sums[digit] < left; --digit) left -= sums[digit];
  const int lane = device::lowest_bit(reached);
  wanted = device::shuffle(left, lane);
  return device::shuffle(digit, lane);
}

struct KeyBounds {
  uint32_t best = 0;     // of the visible entries
  uint32_t present = 0;  // bits that a competing entry has
  uint32_t absent = 0;   // bits that a competing entry lacks
};

// The search for the smallest prefix of the order whose weights sum to `wanted`. The key at which
// the sum is reached has `prefix` in its bits from `low` up.
struct Descent {
  int64_t wanted;  // by the keys with that prefix
  uint32_t prefix;
  int low = 0;

  LONGCTX_DEVICE Descent(const KeyBounds& bounds, int64_t wanted_sum) : wanted(wanted_sum) {
    while (low < 32 && ((bounds.present & bounds.absent) >> low) != 0) ++low;
    prefix = static_cast<uint32_t>(static_cast<uint64_t>(bounds.present) >> low);
  }
  LONGCTX_DEVICE int shift() const { return low > 8 ? low - 8 : 0; }
  LONGCTX_DEVICE bool contains(uint32_t key) const {
    return (static_cast<uint64_t>(key) >> low) == prefix;
  }
  LONGCTX_DEVICE uint32_t digit(uint32_t key) const {
    return key >> shift() & ((1u << (low - shift())) - 1);
  }

  // Goes on by a digit, given the sum of the weights for each; false if they fall short. A whole
  // warp calls this.
  template <class Sums>
  LONGCTX_DEVICE bool descend(const Sums& sums) {
    const int digit = digit_that_reaches(sums, wanted);
    if (digit < 0) return false;
    prefix = prefix << (low - shift()) | static_cast<uint32_t>(digit);
    low = shift();
    return true;
  }

  // At the end: entries with the same key weigh the same.
  LONGCTX_DEVICE TieCut cut(const EntryWeight& weight) const {
    const int64_t each = weight(prefix);
    return each > 0 ? TieCut{prefix, (wanted - 1) / each + 1} : kEverything;
  }
};

// ---- what a method asks for --------------------------------------------------------------------

LONGCTX_DEVICE EntryWeight entry_weight(const SelectBlocksParams& p, const KeyBounds& bounds,
                                        int64_t num_entries) {
  const float best = key_score(bounds.best);
  if (p.method != SelectMethod::kCumulative || !(best > 0.0f)) return {};
  return {true, mass_shift(best, num_entries)};
}

struct Masses {
  int64_t total = 0;   // of the visible entries
  int64_t forced = 0;  // of those that do not compete
};

// The smallest prefix of the order whose weights sum to `wanted`, or else `cut`.
struct Goal {
  int64_t wanted = 0;
  TieCut cut;
};

LONGCTX_DEVICE Goal method_goal(const SelectBlocksParams& p, int64_t head, const KeyBounds& bounds,
                                const EntryWeight& weight, const Masses& masses) {
  const float value = p.head_values == nullptr ? p.value : p.head_values[head];
  const auto everything_from = [](float limit) {
    const ScoreCut cut = cut_at(limit);
    return Goal{0, {cut.key, cut.last_index < 0 ? 0 : kAllTies}};
  };
  switch (p.method) {
    case SelectMethod::kTopK: {
      constexpr float kLargest = 9.0e18f;  // below 2^63
      const float k = value < kLargest ? value : kLargest;
      return {value > 0.0f ? static_cast<int64_t>(k) : 0, {}};
    }
    case SelectMethod::kThreshold:
      return everything_from(value);
    case SelectMethod::kRelative:
      return everything_from(value * key_score(bounds.best));
    case SelectMethod::kCumulative:
      break;
  }
  return {weight.is_mass ? mass_target(value, masses.total) - masses.forced : 0, {}};
}

// ---- by one block of threads -------------------------------------------------------------------

// All threads of the block call this and what follows; each gets the result.
LONGCTX_DEVICE KeyBounds key_bounds(const RegionKeys& keys, BlockSlots& slots) {
  KeyBounds own;
  keys.for_each([&](uint32_t key, bool competes) {
    own.best = key > own.best ? key : own.best;
    if (!competes) return;
    own.present |= key;
    own.absent |= ~key;
  });
  return {static_cast<uint32_t>(reduce_block(own.best, Maximum(), slots)),
          static_cast<uint32_t>(reduce_block(own.present, BitOr(), slots)),
          static_cast<uint32_t>(reduce_block(own.absent, BitOr(), slots))};
}

LONGCTX_DEVICE Masses sum_masses(const RegionKeys& keys, const EntryWeight& mass,
                                 BlockSlots& slots) {
  Masses own;
  keys.for_each([&](uint32_t key, bool competes) {
    own.total += mass(key);
    if (!competes) own.forced += mass(key);
  });
  return {reduce_block(own.total, Sum(), slots), reduce_block(own.forced, Sum(), slots)};
}

// The sums hold after the call's last barrier.
LONGCTX_DEVICE void sum_digits(const RegionKeys& keys, const Descent& descent,
                               const EntryWeight& weight, KeySums& sums) {
  sums.clear();
  device::sync_threads();
  keys.for_each([&](uint32_t key, bool competes) {
    if (competes && descent.contains(key)) sums.add(descent.digit(key), weight(key));
  });
  device::sync_threads();
}

LONGCTX_DEVICE TieCut find_cut(const RegionKeys& keys, const KeyBounds& bounds, const Goal& goal,
                               const EntryWeight& weight, KeySums& sums) {
  if (goal.wanted <= 0 || bounds.present == 0) return goal.cut;
  Descent descent(bounds, goal.wanted);
  while (descent.low > 0) {
    sum_digits(keys, descent, weight, sums);
    const bool reached = descent.descend(sums);
    device::sync_threads();
    if (!reached) return kEverything;
  }
  return descent.cut(weight);
}

}  // namespace longctx::cuda
