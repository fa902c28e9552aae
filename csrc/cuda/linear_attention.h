// Entry points of the kernels of linear_attention.cuh; one instance per dtype and head_dim.
#pragma once
#include "cuda/linear_pass.h"

namespace longctx::cuda {

// One pass. T is __nv_bfloat16 or __half; head_dim holds that of q and k.
template <class T, int head_dim>
void launch_linear_attention(const LinearAttentionParams& params, const LinearPass& pass);
template <class T, int head_dim>
int64_t linear_attention_shared_bytes();

// Columns of v in an item of that kernel.
constexpr int64_t linear_slice_columns(int64_t head_dim, int64_t head_dim_v) {
  return head_dim > 64 && head_dim <= 128 && head_dim_v > 64 ? 128 : 64;
}

}  // namespace longctx::cuda
