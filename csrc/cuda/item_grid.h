// How a launcher cuts attention into work items; from shapes and host scalars alone.
#pragma once
#include <cstdint>

#include "longctx/params.h"

namespace longctx::cuda {

// A work item is a tile of query rows and those heads of one kv head that visit the same keys; its
// keys may be split over several blocks.
struct ItemGrid {
  int64_t block_rows = 0;        // query rows of an item
  int64_t blocks_per_seq = 0;    // dense: upper bound; packed: of all sequences together
  int64_t items_per_block = 1;   // block list: block_size_q / block_rows
  int64_t heads_per_item = 1;    // divides the group
  int64_t head_groups = 1;       // num_q_heads / heads_per_item
  int64_t groups_at_a_time = 1;  // dense: head groups whose keys share the L2 cache
  int64_t num_splits = 1;        // of the keys of an item
  // Block list: its rows [pattern_batch * pattern_heads * num_q_blocks], longest first; null: as
  // they come.
  const int32_t* order = nullptr;
};

// Blocks that a launch needs.
inline int64_t num_items(const AttentionParams& p, const BlockList* blocks, const ItemGrid& grid) {
  const int64_t rows =
      blocks == nullptr ? grid.blocks_per_seq : blocks->num_q_blocks * grid.items_per_block;
  return p.seqs.batch * rows * grid.head_groups * grid.num_splits;
}

}  // namespace longctx::cuda
