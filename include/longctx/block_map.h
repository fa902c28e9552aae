// A block map has a row for each query block and a column for each key block of a sequence. This is
// the rule, for both backends, of which columns a row may see.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx {

// The rows and columns that one sequence owns; block numbers count from its own first key.
struct SequenceMap {
  Sequence seq;
  int64_t first_row = 0;  // in the map; packed sequences own consecutive rows
  int64_t num_rows = 0;
  int64_t num_columns = 0;
  int64_t first_position = 0;  // key position of the first query row

  // Row `row` (counted from first_row) may see columns [0, num_visible).
  LONGCTX_HD int64_t num_visible(const BlockMapParams& map, int64_t row) const {
    if (!map.causal) return num_columns;
    const int64_t last_position = first_position + (row + 1) * map.block_size_q - 1;
    if (last_position < 0) return 0;
    const int64_t visible = last_position / map.block_size_k + 1;
    return visible < num_columns ? visible : num_columns;
  }
};

// The map of a sequence whose rows start at `first_row`; never reaches outside the map.
LONGCTX_HD inline SequenceMap sequence_map(const BlockMapParams& map, const Sequence& seq,
                                           int64_t first_row) {
  SequenceMap result;
  result.seq = seq;
  result.first_row = first_row;
  result.num_rows = clamp_index((result.seq.q_len + map.block_size_q - 1) / map.block_size_q, 0,
                                map.num_q_blocks - first_row);
  result.num_columns = clamp_index((result.seq.k_len + map.block_size_k - 1) / map.block_size_k, 0,
                                   map.num_k_blocks);
  result.first_position = result.seq.diagonal();
  if (map.has_q_offset) {
    result.first_position = map.q_offset + (map.seqs.seqused_k == nullptr ? 0 : result.seq.k_len);
  }
  // Sequences that overlap own more rows than the map has: queries without a row do not exist.
  const int64_t queries_with_row = result.num_rows * map.block_size_q;
  if (result.seq.q_len > queries_with_row) result.seq.q_len = queries_with_row;
  return result;
}

LONGCTX_HD inline SequenceMap sequence_map(const BlockMapParams& map, int64_t index,
                                           int64_t first_row) {
  return sequence_map(map, sequence_at(map.seqs, index), first_row);
}

}  // namespace longctx
