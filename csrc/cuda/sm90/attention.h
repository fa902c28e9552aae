// The Hopper path of attention and block_sparse_attention: TMA loads, WGMMA products.
#pragma once
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/runtime.h"

namespace longctx::cuda::sm90 {

// An item takes at most this many (row, head) pairs: grid.block_rows * grid.heads_per_item, where
// block_rows is a multiple of kRowUnit.
constexpr int64_t kItemRows = 128;
constexpr int64_t kRowUnit = 8;

// Whether this path can run the call on this device; if not, `why_not` says in a few words why.
bool supports(const AttentionParams& params, const BlockList* blocks, const DeviceLimits& device,
              const char** why_not);

template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks,
                      const AttentionPlan& plan);
template <class T, int head_dim>
int64_t attention_shared_bytes();

}  // namespace longctx::cuda::sm90
