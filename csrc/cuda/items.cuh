// Which query rows and heads a block works on. A work item is a tile of query rows and those heads
// of one kv head that visit the same keys; its keys may be split over several blocks.
#pragma once
#include "device/thread.cuh"
#include "longctx/block_list.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

// How the launcher cut the problem; from shapes and host scalars alone.
struct ItemGrid {
  int64_t block_rows = 0;        // query rows of an item; block_size_q with a block list
  int64_t blocks_per_seq = 0;    // upper bound; packed: of all sequences together
  int64_t heads_per_item = 1;    // divides the group
  int64_t head_groups = 1;       // num_q_heads / heads_per_item
  int64_t groups_at_a_time = 1;  // dense: head groups whose keys share the L2 cache
  int64_t num_splits = 1;        // of the keys of an item
  // Block list: its rows [pattern_batch * pattern_heads * num_q_blocks], longest first.
  const int32_t* order = nullptr;
};

// Pair p of an item is row p % num_rows of head first_head + p / num_rows.
struct Item {
  Sequence seq;
  int64_t list_row = 0;   // of the block list
  int64_t row_begin = 0;  // of the sequence
  int64_t first_head = 0;
  int64_t kv_head = 0;
  int64_t split = 0;
  int32_t num_rows = 0;  // 0: the block has nothing to do
  int32_t num_heads = 0;

  LONGCTX_DEVICE int num_pairs() const { return num_rows * num_heads; }
  LONGCTX_DEVICE int64_t row(int pair) const { return row_begin + pair % num_rows; }
  LONGCTX_DEVICE int64_t head(int pair) const { return first_head + pair / num_rows; }
};

// Blocks that a launch needs.
inline int64_t num_items(const AttentionParams& p, const BlockList* blocks, const ItemGrid& grid) {
  const int64_t batch = p.seqs.cu_seqlens_q == nullptr ? p.seqs.batch : 1;
  const int64_t rows = blocks == nullptr ? grid.blocks_per_seq : blocks->num_q_blocks;
  return batch * rows * grid.head_groups * grid.num_splits;
}

// The sequence that owns query block `block` of a packed query axis; `block` becomes its number in
// the sequence. An empty sequence when none owns it. A whole warp calls this.
LONGCTX_DEVICE Sequence packed_sequence(const SequenceParams& seqs, int64_t block_rows,
                                        int64_t& block) {
  for (int64_t first = 0; first < seqs.num_seqs; first += device::kWarpSize) {
    const int64_t index = first + device::lane_index();
    int64_t own = 0;
    if (index < seqs.num_seqs) own = (sequence_at(seqs, index).q_len + block_rows - 1) / block_rows;
    int64_t through = own;  // blocks of the sequences up to this lane's
    for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
      const int64_t other = device::shuffle_up(through, delta);
      if (device::lane_index() >= delta) through += other;
    }
    const uint32_t beyond = device::ballot(through > block);
    if (beyond != 0) {
      const int lane = device::lowest_bit(beyond);
      block -= device::shuffle(through - own, lane);
      return sequence_at(seqs, first + lane);
    }
    block -= device::shuffle(through, device::kWarpSize - 1);
  }
  return {};
}

// The rows of query block `list_row`, which counts along the whole query axis when packed.
LONGCTX_DEVICE void set_rows(const SequenceParams& seqs, int64_t batch_index, int64_t list_row,
                             int64_t block_rows, Item& item) {
  int64_t block = list_row;
  item.list_row = list_row;
  item.seq = seqs.cu_seqlens_q == nullptr ? sequence_at(seqs, batch_index)
                                          : packed_sequence(seqs, block_rows, block);
  item.row_begin = block * block_rows;
  const int64_t left = item.seq.q_len - item.row_begin;
  item.num_rows = static_cast<int32_t>(clamp_index(left, 0, block_rows));
}

// Item `index` in the order of work: long ones first. A whole warp calls this.
LONGCTX_DEVICE Item item_at(const AttentionParams& p, const BlockList* blocks, const ItemGrid& grid,
                            int64_t index) {
  Item item;
  item.split = index % grid.num_splits;
  index /= grid.num_splits;
  const int64_t batch = p.seqs.cu_seqlens_q == nullptr ? p.seqs.batch : 1;
  int64_t batch_index, group, list_row;
  if (blocks == nullptr) {
    // Later rows see more. Sections of heads keep the keys of a moment within the L2 cache.
    const int64_t maps = batch * grid.head_groups;
    const int64_t section = index / (grid.groups_at_a_time * grid.blocks_per_seq);
    const int64_t first_map = section * grid.groups_at_a_time;
    const int64_t left = maps - first_map;
    const int64_t width = left < grid.groups_at_a_time ? left : grid.groups_at_a_time;
    const int64_t within = index - first_map * grid.blocks_per_seq;
    list_row = grid.blocks_per_seq - 1 - within / width;
    batch_index = (first_map + within % width) / grid.head_groups;
    group = (first_map + within % width) % grid.head_groups;
  } else {
    const int64_t batches_per_row = batch / blocks->pattern_batch;
    const int64_t groups_per_row = grid.head_groups / blocks->pattern_heads;
    const int64_t sharing = index % (batches_per_row * groups_per_row);
    const int64_t row = grid.order[index / (batches_per_row * groups_per_row)];
    list_row = row % blocks->num_q_blocks;
    const int64_t pattern = row / blocks->num_q_blocks;
    batch_index = pattern / blocks->pattern_heads + sharing / groups_per_row;
    group = pattern % blocks->pattern_heads * groups_per_row + sharing % groups_per_row;
  }
  set_rows(p.seqs, batch_index, list_row, grid.block_rows, item);
  item.first_head = group * grid.heads_per_item;
  item.num_heads = static_cast<int32_t>(grid.heads_per_item);
  item.kv_head = item.first_head * p.num_kv_heads / p.num_q_heads;
  return item;
}

}  // namespace longctx::cuda
