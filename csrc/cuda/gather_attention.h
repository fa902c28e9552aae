// Launchers of the kernel of gather_attention, one instance per dtype and head_dim; see
// gather_attention.cuh.
#pragma once
#include <cstdint>

#include "cuda/merge_splits.h"
#include "cuda/partials.h"
#include "longctx/params.h"

namespace longctx::cuda {

// Rows of a block: those of a tensor core product, and what the registers hold of float32.
constexpr int kTensorGatherRows = 16, kPlainGatherRows = 8;

// How gather_attention.cu wants a call to run.
struct GatherPlan {
  int64_t heads = 1;           // of the units: kv heads, or query heads that select for themselves
  int64_t unit_tokens = 1;     // 1, or seqlen_q where one pass over the keys serves all
  int64_t num_segments = 1;    // of a unit's set
  AttentionPartials partials;  // with num_segments > 1, and then
  SplitMerge merge;            // what becomes of them
  // [units, blocks that share the rows of a unit] zeros: the last of the blocks that share rows
  // merges them; null: another launch does.
  uint32_t* counters = nullptr;
  // Scores of every slot of a set, where masses are wanted: [batch, num_q_heads, seqlen_q,
  // max_slots], natural logarithms of weights; -inf where a slot holds no key.
  float* scores = nullptr;
  int64_t max_slots = 0;
  int64_t block_rows = 1;  // of a unit
};

// head_dim: the smallest instance that holds both head_dim and head_dim_v.
template <class T, int head_dim>
void launch_gather_attention(const GatherAttentionParams& params, const GatherPlan& plan);
template <class T, int head_dim>
int64_t gather_attention_shared_bytes();

}  // namespace longctx::cuda
