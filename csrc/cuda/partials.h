// What attention leaves where the keys of an item are split over several blocks.
#pragma once

namespace longctx::cuda {

// Null without splits. Every row's out is normalised over the split's keys, without sinks; it is
// not written where lse is -inf.
struct AttentionPartials {
  float* out = nullptr;  // [num_splits, batch, num_q_heads, seqlen_q, head_dim_v]
  float* lse = nullptr;  // [num_splits, batch, num_q_heads, seqlen_q], natural log
};

}  // namespace longctx::cuda
