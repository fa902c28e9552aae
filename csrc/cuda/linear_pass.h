// How a launcher cuts linear attention into passes over the tokens, and a pass into work items;
// from shapes and host scalars alone.
#pragma once
#include <cstdint>

#include "longctx/params.h"

namespace longctx::cuda {

// The keys of its own chunk that a row sees, beside the state.
enum class LinearPairs : int32_t { kNone, kUpToRow, kFromRow, kAll };

// A work item is a segment of a (sequence, query head) and a slice of the columns of v; it walks
// the chunks of the segment with the state of its columns.
struct LinearPass {
  const char* op = "";  // for messages
  LinearPairs pairs = LinearPairs::kNone;
  bool descending = false;    // chunks from the last to the first; rows see the state of later keys
  bool rows = false;          // out is wanted
  bool keys = false;          // the state takes up the keys
  bool beyond_keys = false;   // chunks go on where rows do and keys do not
  bool key_units = false;     // weights of keys are wanted in units that float16 can hold
  int64_t num_segments = 1;   // of a sequence, in the order in which they are walked
  int64_t num_walked = 1;     // the first so many of them are
  int64_t slice_columns = 0;  // of v, in an item
  int64_t num_slices = 1;     // of head_dim_v

  // [num_seqs, num_q_heads, start_stride, head_dim, state_dim]: where segments start; null: at
  // zero.
  const float* starts = nullptr;
  int64_t start_stride = 1;  // num_segments, or 1: all segments of a head start from its one state
  // Local: segments start at zero, and what they add is kept for the scan (linear_states.cuh).
  float* local_states = nullptr;  // [num_seqs, num_q_heads, num_segments, head_dim, state_dim]
  float* carries = nullptr;       // [num_seqs, num_q_heads, num_segments]: a start in what follows
  // Of the last segment; null: not wanted.
  float* final_state = nullptr;   // [num_seqs, num_q_heads, head_dim, state_dim]
  float* chunk_states = nullptr;  // params.chunk_states; null: not wanted

  TensorView out;         // of the pass, in the dtype of q, or float
  bool wide_out = false;  // float
  // The rows as they are accumulated, neither scaled nor normalised, go to out and `sums`, and come
  // from `more` and `more_sums` to be added. Contiguous, [batch, num_q_heads, seqlen_q, head_dim_v]
  // and, with normalize, [batch, num_q_heads, seqlen_q]; null: none.
  bool raw_out = false;
  float* sums = nullptr;
  const float* more = nullptr;
  const float* more_sums = nullptr;
};

inline int64_t num_items(const LinearAttentionParams& p, const LinearPass& pass) {
  return p.seqs.num_seqs * pass.num_walked * p.num_q_heads * pass.num_slices;
}

}  // namespace longctx::cuda
