// Launchers of the tensor-core attention kernel, one instance per dtype and head_dim; see
// attention.cuh.
#pragma once
#include <cstdint>

#include "cuda/item_grid.h"
#include "cuda/partials.h"

namespace longctx::cuda {

// How attention.cu wants a call to run.
struct AttentionPlan {
  const char* op = "";
  ItemGrid grid;
  int64_t tile_rows = 0;       // (row, head) pairs of a tile
  AttentionPartials partials;  // with grid.num_splits > 1
};

// head_dim: the smallest instance that holds both head_dim and head_dim_v. `blocks` is null for
// dense attention.
template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks,
                      const AttentionPlan& plan);
template <class T, int head_dim>
int64_t attention_shared_bytes();

}  // namespace longctx::cuda
