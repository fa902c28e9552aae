// The Hopper path of attention and block_sparse_attention: TMA loads, WGMMA products.
#pragma once
#include <cstdint>

#include "cuda/runtime.h"
#include "longctx/params.h"

namespace longctx::cuda {
struct ItemGrid;
struct AttentionPartials;
}  // namespace longctx::cuda

namespace longctx::cuda::sm90 {

constexpr int64_t kItemRows = 128;  // (row, head) pairs of an item, at most
constexpr int64_t kRowUnit = 8;     // an item's rows of one head: a multiple of this

// Whether this path can run the call on this device; if not, `why_not` says in a few words why.
bool supports(const AttentionParams& params, const BlockList* blocks, const DeviceLimits& device,
              const char** why_not);

// The compiled head_dim that serves both head_dim and head_dim_v; 0 if none does.
constexpr int padded_head_dim(int64_t head_dim, int64_t head_dim_v) {
  const int64_t most = head_dim > head_dim_v ? head_dim : head_dim_v;
  return most <= 64 ? 64 : most <= 128 ? 128 : most <= 256 ? 256 : 0;
}

// grid.block_rows * grid.heads_per_item <= kItemRows, grid.block_rows % kRowUnit == 0.
template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks, const ItemGrid& grid,
                      const AttentionPartials& partials);
template <class T, int head_dim>
int64_t attention_shared_bytes();

}  // namespace longctx::cuda::sm90
