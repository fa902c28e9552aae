// Reading a block list safely: whatever the tensors hold, an entry is visited only if it is a
// block of the sequence and larger than the entry before it, and nothing outside is read.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx {

struct BlockRow {
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;
};

// Pattern head that serves query head `q_head`.
LONGCTX_HD inline int64_t pattern_head(const BlockList& blocks, int64_t q_head,
                                       int64_t num_q_heads) {
  return q_head * blocks.pattern_heads / num_q_heads;
}

// `row` counts query blocks along the whole query axis; packed sequences own consecutive rows.
LONGCTX_HD inline BlockRow block_row(const BlockList& blocks, int64_t batch_index, int64_t head,
                                     int64_t row) {
  if (row < 0 || row >= blocks.num_q_blocks) return {};
  const int64_t b = blocks.pattern_batch == 1 ? 0 : batch_index;
  const int64_t* indptr =
      blocks.block_indptr + (b * blocks.pattern_heads + head) * (blocks.num_q_blocks + 1) + row;
  const int64_t first = clamp_index(indptr[0], 0, blocks.capacity);
  const int64_t last = clamp_index(indptr[1], first, blocks.capacity);
  return {blocks.block_indices + first, blocks.block_indices + last};
}

}  // namespace longctx
