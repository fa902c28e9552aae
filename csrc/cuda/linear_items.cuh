// Which chunks of which sequence and head a block of linear attention walks.
#pragma once
#include "cuda/linear_pass.h"
#include "device/thread.cuh"
#include "longctx/decay.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

struct LinearItem {
  Sequence seq;
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t kv_head = 0;
  int64_t segment = 0;       // in the order in which they are walked
  int64_t first_column = 0;  // of v
  int64_t first_chunk = 0;   // of the sequence, where the walk begins
  int64_t num_chunks = 0;
  int64_t chunk_row = 0;  // of the sequence's first chunk in chunk_states

  LONGCTX_DEVICE int64_t chunk(const LinearPass& pass, int64_t step) const {
    return pass.descending ? first_chunk - step : first_chunk + step;
  }
  // Rows and keys of a chunk.
  LONGCTX_DEVICE int num_rows(int64_t chunk) const { return in_chunk(seq.q_len, chunk); }
  LONGCTX_DEVICE int num_keys(int64_t chunk) const { return in_chunk(seq.k_len, chunk); }
  // The (sequence, head) in initial_state and final_state.
  LONGCTX_DEVICE int64_t map(const LinearAttentionParams& p) const {
    return sequence * p.num_q_heads + head;
  }
  // The head's row `row` of the sequence in contiguous [batch, num_q_heads, seqlen_q].
  LONGCTX_DEVICE int64_t row_index(const LinearAttentionParams& p, int64_t row) const {
    return (seq.batch_index * p.num_q_heads + head) * p.seqs.seqlen_q + seq.q_begin + row;
  }

 private:
  LONGCTX_DEVICE static int in_chunk(int64_t length, int64_t chunk) {
    return static_cast<int>(clamp_index(length - chunk * kLinearChunk, 0, kLinearChunk));
  }
};

LONGCTX_HD inline int64_t linear_chunks(int64_t length) {
  return (length + kLinearChunk - 1) / kLinearChunk;
}

// Chunks that the packed sequences before `sequence` own. A whole warp calls this.
LONGCTX_DEVICE int64_t chunks_before(const SequenceParams& seqs, int64_t sequence) {
  int64_t chunks = 0;
  for (int64_t s = device::lane_index(); s < sequence; s += device::kWarpSize) {
    chunks += linear_chunks(sequence_at(seqs, s).k_len);
  }
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    chunks += device::shuffle_xor(chunks, mask);
  }
  return chunks;
}

// The item of block `index`: slices of a head side by side, then the heads that share keys. A whole
// warp calls this.
LONGCTX_DEVICE LinearItem linear_item_at(const LinearAttentionParams& p, const LinearPass& pass,
                                         int64_t index) {
  LinearItem item;
  item.first_column = index % pass.num_slices * pass.slice_columns;
  index /= pass.num_slices;
  item.head = index % p.num_q_heads;
  item.kv_head = item.head / (p.num_q_heads / p.num_kv_heads);
  index /= p.num_q_heads;
  item.segment = index % pass.num_walked;
  item.sequence = index / pass.num_walked;
  item.seq = sequence_at(p.seqs, item.sequence);
  const int64_t rows = linear_chunks(item.seq.q_len), keys = linear_chunks(item.seq.k_len);
  const int64_t chunks = !pass.keys || (pass.beyond_keys && rows > keys) ? rows : keys;
  const int64_t begin = chunks * item.segment / pass.num_segments;
  const int64_t end = chunks * (item.segment + 1) / pass.num_segments;
  item.first_chunk = pass.descending ? chunks - 1 - begin : begin;
  item.num_chunks = end - begin;
  if (pass.chunk_states != nullptr && p.seqs.cu_seqlens_k != nullptr) {
    item.chunk_row = chunks_before(p.seqs, item.sequence);
  }
  return item;
}

}  // namespace longctx::cuda
