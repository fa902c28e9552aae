// The Hopper path of attention and block_sparse_attention: TMA loads, WGMMA products.
#pragma once
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/runtime.h"

namespace longctx::cuda::sm90 {

// Whether this path can run the call on this device; if not, `why_not` says in a few words why.
bool supports(const AttentionParams& params, const BlockList* blocks, const DeviceLimits& device,
              const char** why_not);

// plan.grid: at most 128 (row, head) pairs an item, block_rows a multiple of 8, items_per_block 1.
template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks,
                      const AttentionPlan& plan);
template <class T, int head_dim>
int64_t attention_shared_bytes();

}  // namespace longctx::cuda::sm90
