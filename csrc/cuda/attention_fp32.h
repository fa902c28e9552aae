// Launchers of the float32 attention kernel, one instance per head_dim; see attention_fp32.cuh.
#pragma once
#include "cuda/attention.h"

namespace longctx::cuda {

template <class T, int head_dim>
void launch_attention_fp32(const AttentionParams& params, const BlockList* blocks,
                           const AttentionPlan& plan);
template <class T, int head_dim>
int64_t attention_fp32_shared_bytes();

}  // namespace longctx::cuda
