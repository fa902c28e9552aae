// One cut for the whole map of a sequence and head, found by many blocks of threads. Every launch
// goes over the map once and adds what it saw to the map's state; what earlier launches found is
// worked out from the state by every block anew. Sums of integers: their order does not matter.
//   launch     what it reads the map for
//   bounds     the best key, and the bits in which keys differ
//   masses     total and forced mass ("cumulative")
//   digits     4 launches: weights by the next digit of the key ("cumulative" and "top_k")
//   ties       the number of ties of each row
//   share      nothing: hands the chosen ties to the rows, in their order
#pragma once
#include "cuda/score_cut.cuh"

namespace longctx::cuda {

constexpr int kMapThreads = 256;
constexpr int kMaxDigits = 4;  // of a key

// A row's share of a map's cut: a TieCut whose ties are those of the row.
struct RowCut {
  uint32_t key;
  int32_t ties;
  LONGCTX_DEVICE TieCut cut() const { return {key, ties == kAllTiesOfRow ? kAllTies : ties}; }
  static constexpr int32_t kAllTiesOfRow = INT32_MAX;
};

struct MapState {  // zero at first
  uint32_t best, present, absent, unused;
  int64_t total, forced;
  int64_t sums[kMaxDigits][KeySums::kBins];
};

struct MapGrid {
  MapState* states = nullptr;  // [num_seqs, heads]
  RowCut* row_cuts = nullptr;  // [batch, heads, num_q_blocks]
  int64_t slices = 1;          // blocks of threads per map; each takes every slices-th row
};

// The share of one block of threads.
struct MapSlice {
  Region region;
  MapState& state;
  RowCut* row_cuts;  // [map.num_rows]
};

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

LONGCTX_DEVICE MapSlice map_slice(const SelectBlocksParams& p, const MapGrid& grid) {
  const int64_t index = device::block_index() / grid.slices;
  const int64_t slice = device::block_index() % grid.slices;
  Region region = sequence_region(p, index / p.heads, index % p.heads);
  region.first_row = slice;
  region.row_step = grid.slices;
  region.num_rows = clamp_index((region.map.num_rows - slice + grid.slices - 1) / grid.slices, 0,
                                region.map.num_rows);
  const int64_t map = region.map.seq.batch_index * p.heads + region.head;
  return {region, grid.states[index],
          grid.row_cuts + map * p.map.num_q_blocks + region.map.first_row};
}

LONGCTX_DEVICE KeyBounds map_bounds(const MapSlice& slice) {
  return {slice.state.best, slice.state.present, slice.state.absent};
}
LONGCTX_DEVICE EntryWeight map_weight(const SelectBlocksParams& p, const MapSlice& slice) {
  const SequenceMap& map = slice.region.map;
  return entry_weight(p, map_bounds(slice), map.num_rows * map.num_columns);
}

// What the state tells about the cut.
struct MapSearch {
  const MapState& state;
  KeyBounds bounds;
  EntryWeight weight;
  Goal goal;

  LONGCTX_DEVICE MapSearch(const SelectBlocksParams& p, const MapSlice& slice)
      : state(slice.state), bounds(map_bounds(slice)), weight(map_weight(p, slice)) {
    goal = method_goal(p, slice.region.head, bounds, weight, {state.total, state.forced});
  }

  LONGCTX_DEVICE bool searches() const { return goal.wanted > 0 && bounds.present != 0; }

  // Goes on by `digits`, or to the end; false if the sums fall short. A whole warp calls this.
  LONGCTX_DEVICE bool descend(Descent& descent, int digits) const {
    for (int i = 0; i < digits && descent.low > 0; ++i) {
      if (!descent.descend(state.sums[i])) return false;
    }
    return true;
  }

  LONGCTX_DEVICE TieCut cut() const {
    if (!searches()) return goal.cut;
    Descent descent(bounds, goal.wanted);
    return descend(descent, kMaxDigits) ? descent.cut(weight) : kEverything;
  }
};

// Grid of these kernels: num_seqs * heads * slices.
LONGCTX_KERNEL(kMapThreads, 1) map_bounds_kernel(const SelectBlocksParams p, const MapGrid grid) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  const MapSlice slice = map_slice(p, grid);
  if (slice.region.num_rows == 0) return;
  const KeyBounds bounds = key_bounds({p, slice.region, nullptr}, slots);
  if (device::thread_index() != 0) return;
  device::atomic_max_global(&slice.state.best, bounds.best);
  device::atomic_or_global(&slice.state.present, bounds.present);
  device::atomic_or_global(&slice.state.absent, bounds.absent);
}

LONGCTX_KERNEL(kMapThreads, 1) map_masses_kernel(const SelectBlocksParams p, const MapGrid grid) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  const MapSlice slice = map_slice(p, grid);
  if (slice.region.num_rows == 0) return;
  const EntryWeight weight = map_weight(p, slice);
  if (!weight.is_mass) return;
  const Masses masses = sum_masses({p, slice.region, nullptr}, weight, slots);
  if (device::thread_index() != 0) return;
  device::atomic_add_global(&slice.state.total, masses.total);
  device::atomic_add_global(&slice.state.forced, masses.forced);
}

LONGCTX_KERNEL(kMapThreads, 1)
map_digits_kernel(const SelectBlocksParams p, const MapGrid grid, const int digit) {
  auto& sums = *reinterpret_cast<KeySums*>(device::shared_memory());
  const MapSlice slice = map_slice(p, grid);
  if (slice.region.num_rows == 0) return;
  const MapSearch search(p, slice);
  if (!search.searches()) return;
  Descent descent(search.bounds, search.goal.wanted);
  if (!search.descend(descent, digit) || descent.low == 0) return;
  sum_digits({p, slice.region, nullptr}, descent, search.weight, sums);
  for (int bin = device::thread_index(); bin < KeySums::kBins; bin += device::num_threads()) {
    if (sums[bin] != 0) device::atomic_add_global(&slice.state.sums[digit][bin], sums[bin]);
  }
}

LONGCTX_KERNEL(kMapThreads, 1) map_ties_kernel(const SelectBlocksParams p, const MapGrid grid) {
  const MapSlice slice = map_slice(p, grid);
  if (slice.region.num_rows == 0) return;
  const TieCut cut = MapSearch(p, slice).cut();
  const RegionKeys keys{p, slice.region, nullptr};
  const int lane = device::lane_index();
  for (int64_t i = device::warp_index(); i < slice.region.num_rows;
       i += kMapThreads / device::kWarpSize) {
    int64_t ties = cut.ties == 0 ? 0 : RowCut::kAllTiesOfRow;
    if (cut.ties > 0 && cut.ties < kAllTies) {
      const MapRow row = map_row(p, slice.region, i);
      ties = 0;
      for (uint32_t j = row.first + lane; j < row.last; j += device::kWarpSize) {
        ties += keys.key(row, j) == cut.key;
      }
      ties = reduce_warp(ties, Sum());
    }
    const int64_t number = slice.region.first_row + i * slice.region.row_step;
    if (lane == 0) slice.row_cuts[number] = {cut.key, static_cast<int32_t>(ties)};
  }
}

// One warp and one slice per map.
LONGCTX_KERNEL(device::kWarpSize, 1)
share_ties_kernel(const SelectBlocksParams p, const MapGrid grid) {
  const MapSlice slice = map_slice(p, grid);
  if (slice.region.num_rows == 0) return;
  int64_t left = MapSearch(p, slice).cut().ties;
  if (left == 0 || left == kAllTies) return;
  for (int64_t first = 0; first < slice.region.num_rows; first += device::kWarpSize) {
    const int64_t row = first + device::lane_index();
    const int64_t own = row < slice.region.num_rows ? slice.row_cuts[row].ties : 0;
    const int64_t through = scan_warp(own);
    if (row < slice.region.num_rows) {
      slice.row_cuts[row].ties = static_cast<int32_t>(clamp_index(left - (through - own), 0, own));
    }
    left -= device::shuffle(through, device::kWarpSize - 1);
  }
}

}  // namespace longctx::cuda
