// Entry points of the kernels of linear_attention_fp32.cuh; one instance per head_dim.
#pragma once
#include "cuda/linear_pass.h"

namespace longctx::cuda {

// One pass; head_dim holds that of q and k.
template <class T, int head_dim>
void launch_linear_attention_fp32(const LinearAttentionParams& params, const LinearPass& pass);
template <class T, int head_dim>
int64_t linear_attention_fp32_shared_bytes();

// Columns of v in an item of that kernel.
constexpr int64_t linear_fp32_slice_columns(int64_t head_dim) { return head_dim > 128 ? 32 : 64; }

}  // namespace longctx::cuda
