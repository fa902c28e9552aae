// Which query rows and heads a block works on.
#pragma once
#include "cuda/item_grid.h"
#include "device/thread.cuh"
#include "longctx/block_list.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

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

// The rows of query block `list_row`, which counts along the whole query axis when packed; the item
// is part `part` of those that share the block.
LONGCTX_DEVICE void set_rows(const SequenceParams& seqs, int64_t batch_index, int64_t list_row,
                             int64_t part, const ItemGrid& grid, Item& item) {
  const int64_t block_size = grid.block_rows * grid.items_per_block;
  int64_t block = list_row;
  item.list_row = list_row;
  item.seq = seqs.cu_seqlens_q == nullptr ? sequence_at(seqs, batch_index)
                                          : packed_sequence(seqs, block_size, block);
  item.row_begin = block * block_size + part * grid.block_rows;
  const int64_t left = item.seq.q_len - item.row_begin;
  item.num_rows = static_cast<int32_t>(clamp_index(left, 0, grid.block_rows));
}

// Item `index` in the order of work: long ones first. A whole warp calls this. Counts fit 32 bits,
// whose divisions cost a fraction of 64-bit ones.
LONGCTX_DEVICE Item item_at(const AttentionParams& p, const BlockList* blocks, const ItemGrid& grid,
                            int64_t block) {
  const auto count = [](int64_t value) { return static_cast<uint32_t>(value); };
  uint32_t index = count(block);
  Item item;
  item.split = index % count(grid.num_splits);
  index /= count(grid.num_splits);
  const uint32_t head_groups = count(grid.head_groups);
  uint32_t batch_index, group, list_row, part = 0;
  if (blocks == nullptr) {
    // Later rows see more. Sections of heads keep the keys of a moment within the L2 cache.
    const uint32_t rows = count(grid.blocks_per_seq), width = count(grid.groups_at_a_time);
    const uint32_t first_map = index / (width * rows) * width;
    const uint32_t left = count(p.seqs.batch) * head_groups - first_map;
    const uint32_t maps = left < width ? left : width;
    const uint32_t within = index - first_map * rows;
    list_row = rows - 1 - within / maps;
    batch_index = (first_map + within % maps) / head_groups;
    group = (first_map + within % maps) % head_groups;
  } else {
    // The items that share a row of the list follow each other.
    part = index % count(grid.items_per_block);
    index /= count(grid.items_per_block);
    const uint32_t groups_per_row = head_groups / count(blocks->pattern_heads);
    const uint32_t shares = count(p.seqs.batch / blocks->pattern_batch) * groups_per_row;
    const uint32_t sharing = index % shares;
    const uint32_t place = index / shares;
    const uint32_t row = grid.order == nullptr ? place : count(grid.order[place]);
    const uint32_t pattern = row / count(blocks->num_q_blocks);
    list_row = row % count(blocks->num_q_blocks);
    batch_index = pattern / count(blocks->pattern_heads) + sharing / groups_per_row;
    group = pattern % count(blocks->pattern_heads) * groups_per_row + sharing % groups_per_row;
  }
  set_rows(p.seqs, batch_index, list_row, part, grid, item);
  item.first_head = group * grid.heads_per_item;
  item.num_heads = static_cast<int32_t>(grid.heads_per_item);
  item.kv_head = count(item.first_head) / count(p.num_q_heads / p.num_kv_heads);
  return item;
}

// The item's row of the list; none without a list.
LONGCTX_DEVICE BlockRow item_block_row(const AttentionParams& p, const BlockList* blocks,
                                       const Item& item) {
  if (blocks == nullptr) return {};
  const int64_t head = pattern_head(*blocks, item.first_head, p.num_q_heads);
  return block_row(*blocks, item.seq.batch_index, head, item.list_row);
}

// Row `row` of the query or key axis.
template <class T>
LONGCTX_DEVICE T* row_address(const TensorView& view, const Item& item, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + item.seq.batch_index * view.batch_stride +
         head * view.head_stride + row * view.seq_stride;
}

// Where lse, or the states of the item's split, has the row of a pair.
LONGCTX_DEVICE int64_t state_index(const AttentionParams& p, const Item& item, int pair) {
  const int64_t map = (item.split * p.seqs.batch + item.seq.batch_index) * p.num_q_heads;
  return (map + item.head(pair)) * p.seqs.seqlen_q + item.seq.q_begin + item.row(pair);
}

}  // namespace longctx::cuda
