// Scores of key blocks -> the block list of each query block: cut and count, scan, write.
// 1. A block of threads per row keeps the row's keys in shared memory, finds the cut and leaves a
// bit
//    per column and a count. Scores are read once. A cut for a whole map is found before, by going
//    over the map up to seven times (map_cut.cuh).
// 2. Counts become block_indptr, bits become block_indices (list_rows.cuh); the rest of these is
// -1. Bytes per entry of the map: 4 for its score, 1/4 for its bit, and 4 for its place in
// block_indices. With a cut per map 4 more each time, of which a map that fits L2 costs a fraction.
#pragma once
#include "cuda/map_cut.cuh"
#include "cuda/score_cut.cuh"

namespace longctx::cuda {

constexpr int kMaxSelectThreads = 512;

struct SelectGrid {
  int64_t words = 0;           // ceil(num_k_blocks / 32)
  int64_t staged_columns = 0;  // num_k_blocks, or 0 where a row does not fit
  RowCut* row_cuts = nullptr;  // [batch, heads, num_q_blocks], or null: each row has its own cut
  uint32_t* chosen = nullptr;  // [batch, heads, num_q_blocks, words]: bit c of word w is column
                               // 32 * w + c; rows without an entry are not written
};

struct SelectShared {
  KeySums sums;
  BlockSlots slots;
  // [staged_columns] uint32 follow
  LONGCTX_DEVICE uint32_t* keys() { return reinterpret_cast<uint32_t*>(this + 1); }
};

// keys [num_visible]
LONGCTX_DEVICE void load_keys(const MapRow& row, uint32_t* keys) {
  constexpr int kBatch = 8;  // loads under way
  const uint32_t threads = device::num_threads();
  for (uint32_t j = device::thread_index(); j < row.num_visible; j += kBatch * threads) {
    float scores[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      scores[b] = j + b * threads < row.num_visible ? row.scores[j + b * threads] : 0.0f;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (j + b * threads < row.num_visible) keys[j + b * threads] = score_key(scores[b]);
    }
  }
  device::sync_threads();
}

// A row whose words of 32 columns are dealt out to the warps, each a run of neighbours.
class RowWriter {
 public:
  LONGCTX_DEVICE RowWriter(const RegionKeys& keys, BlockSlots& slots)
      : keys_(keys), slots_(slots), row_(map_row(keys.p, keys.region, 0)) {
    const uint32_t words = visible_words();
    const uint32_t num_warps = device::num_threads() / device::kWarpSize;
    const uint32_t own = (words + num_warps - 1) / num_warps;
    begin_ = device::thread_index() / device::kWarpSize * own;
    end_ = begin_ + own < words ? begin_ + own : words;
  }
  LONGCTX_DEVICE uint32_t num_forced() const { return row_.num_forced(); }

  // How many entries the cut chooses, forced ones included.
  LONGCTX_DEVICE int64_t count(const TieCut& cut) {
    int64_t better = 0, ties = 0;
    for (uint32_t word = begin_; word < end_; ++word) {
      const uint32_t key = competing_key(word);
      better += key > cut.key;
      ties += key == cut.key;
    }
    better = reduce_warp(better, Sum());
    ties = reduce_warp(ties, Sum());
    int64_t all_better, all_ties;
    sum_before_warp(better, all_better, slots_);
    ties_before_ = sum_before_warp(ties, all_ties, slots_);
    return row_.num_forced() + all_better + (all_ties < cut.ties ? all_ties : cut.ties);
  }

  // The bits of the cut that was counted last; words past the visible ones are 0.
  LONGCTX_DEVICE void write(const TieCut& cut, int64_t num_words, uint32_t* chosen) const {
    const int lane = device::lane_index();
    int64_t ties = ties_before_;
    for (uint32_t word = begin_; word < end_; ++word) {
      const uint32_t column = word * device::kWarpSize + lane;
      const bool forced = column < row_.num_visible && !row_.competes(column);
      const uint32_t key = competing_key(word);
      const uint32_t tied = device::ballot(key == cut.key);
      const int64_t rank = ties + device::count_bits(tied & ((uint32_t{1} << lane) - 1));
      ties += device::count_bits(tied);
      const uint32_t bits =
          device::ballot(forced || key > cut.key || (key == cut.key && rank < cut.ties));
      if (lane == 0) chosen[word] = bits;
    }
    for (int64_t word = visible_words() + device::thread_index(); word < num_words;
         word += device::num_threads()) {
      chosen[word] = 0;
    }
  }

 private:
  LONGCTX_DEVICE uint32_t visible_words() const {
    return (row_.num_visible + device::kWarpSize - 1) / device::kWarpSize;
  }

  // This lane's key of a word; 0, which no cut chooses, where it does not compete.
  LONGCTX_DEVICE uint32_t competing_key(uint32_t word) const {
    const uint32_t column = word * device::kWarpSize + device::lane_index();
    return row_.competes(column) ? keys_.key(row_, column) : 0;
  }

  const RegionKeys& keys_;
  BlockSlots& slots_;
  MapRow row_;
  uint32_t begin_, end_;  // words of this warp
  int64_t ties_before_ = 0;
};

// Grid: batch * heads * num_q_blocks, later rows first: they see more. Leaves in block_indptr the
// count of each row, behind the place of the row before it.
LONGCTX_KERNEL(kMaxSelectThreads, 1)
select_row_kernel(const SelectBlocksParams p, const SelectGrid grid) {
  auto& shared = *reinterpret_cast<SelectShared*>(device::shared_memory());
  const int64_t maps = p.map.seqs.batch * p.heads;
  const int64_t map = device::block_index() % maps;
  const int64_t map_row_index = p.map.num_q_blocks - 1 - device::block_index() / maps;
  const int64_t flat = map * p.map.num_q_blocks + map_row_index;
  const Region region = row_region(p, map / p.heads, map % p.heads, map_row_index);
  int64_t count = 0;
  if (region.num_rows == 1) {
    // load keys
    const RegionKeys keys{p, region, grid.staged_columns > 0 ? shared.keys() : nullptr};
    if (keys.staged != nullptr) load_keys(map_row(p, region, 0), shared.keys());

    // cut, count
    const KeyBounds bounds = key_bounds(keys, shared.slots);
    TieCut cut;
    if (grid.row_cuts == nullptr) {
      const EntryWeight weight = entry_weight(p, bounds, region.map.num_columns);
      const Masses masses = weight.is_mass ? sum_masses(keys, weight, shared.slots) : Masses();
      const Goal goal = method_goal(p, region.head, bounds, weight, masses);
      cut = find_cut(keys, bounds, goal, weight, shared.sums);
    } else {
      cut = grid.row_cuts[flat].cut();
    }
    RowWriter writer(keys, shared.slots);
    count = writer.count(cut);
    if (count > p.max_blocks_per_row) {
      const Goal best{p.max_blocks_per_row - int64_t{writer.num_forced()}, {}};
      cut = find_cut(keys, bounds, best, {}, shared.sums);
      count = writer.count(cut);
    }
    if (count > 0) writer.write(cut, grid.words, grid.chosen + flat * grid.words);
  }
  if (device::thread_index() == 0) p.block_indptr[flat + flat / p.map.num_q_blocks + 1] = count;
}

}  // namespace longctx::cuda
