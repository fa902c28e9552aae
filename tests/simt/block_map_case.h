// The rows and columns of a block map, for the tests of the ops that make and read one.
#pragma once
#include <algorithm>
#include <vector>

#include "tensors.h"

namespace longctx::simt_tests {

struct MapCase {
  int64_t batch = 1;
  int64_t seqlen_q = 200, seqlen_k = 200;
  int64_t block_size_q = 32, block_size_k = 16;
  bool causal = true;
  bool has_q_offset = false;
  int64_t q_offset = 0;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, seqused_k;

  bool packed() const { return !cu_seqlens_q.empty(); }
  int64_t num_q_blocks() const {
    return blocks(seqlen_q, block_size_q) +
           (packed() ? static_cast<int64_t>(cu_seqlens_q.size()) - 1 : 0);
  }
  int64_t num_k_blocks() const { return blocks(seqlen_k, block_size_k); }
  static int64_t blocks(int64_t length, int64_t size) { return (length + size - 1) / size; }

  BlockMapParams params() const {
    BlockMapParams map;
    map.seqs.batch = batch;
    map.seqs.num_seqs = packed() ? static_cast<int64_t>(cu_seqlens_q.size()) - 1 : batch;
    map.seqs.seqlen_q = seqlen_q;
    map.seqs.seqlen_k = seqlen_k;
    map.seqs.cu_seqlens_q = data_or_null(cu_seqlens_q);
    map.seqs.cu_seqlens_k = data_or_null(cu_seqlens_k);
    map.seqs.seqused_k = data_or_null(seqused_k);
    map.num_q_blocks = num_q_blocks();
    map.num_k_blocks = num_k_blocks();
    map.block_size_q = block_size_q;
    map.block_size_k = block_size_k;
    map.causal = causal;
    map.has_q_offset = has_q_offset;
    map.q_offset = q_offset;
    return map;
  }
};

struct MapSequence {
  int64_t batch_index, q_begin, q_len, k_begin, k_len;
  int64_t first_row;       // of the map
  int64_t first_position;  // key position of the first query
};

inline std::vector<MapSequence> map_sequences(const MapCase& c) {
  std::vector<MapSequence> result;
  if (!c.packed()) {
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t k_len = c.seqused_k.empty() ? c.seqlen_k : c.seqused_k[b];
      const int64_t from_end = c.seqused_k.empty() ? 0 : k_len;
      result.push_back({b, 0, c.seqlen_q, 0, k_len, 0,
                        c.has_q_offset ? c.q_offset + from_end : k_len - c.seqlen_q});
    }
    return result;
  }
  int64_t row = 0;
  for (size_t s = 0; s + 1 < c.cu_seqlens_q.size(); ++s) {
    const int64_t q_len = c.cu_seqlens_q[s + 1] - c.cu_seqlens_q[s];
    const int64_t k_len = c.cu_seqlens_k[s + 1] - c.cu_seqlens_k[s];
    result.push_back({0, c.cu_seqlens_q[s], q_len, c.cu_seqlens_k[s], k_len, row,
                      c.has_q_offset ? c.q_offset : k_len - q_len});
    row += MapCase::blocks(q_len, c.block_size_q);
  }
  return result;
}

}  // namespace longctx::simt_tests
