// Launches gather_attention: the instance and the segments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/gather_attention.h"
#include "cuda/gather_mass.cuh"
#include "cuda/kernels.h"
#include "cuda/merge_splits.h"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "gather_attention";

// The most keys that a token's set can name.
int64_t num_slots(const GatherAttentionParams& p) {
  return p.num_entries * std::min(p.block_size_k, p.seqs.seqlen_k) + p.num_first + p.num_last;
}

// Whether one pass over the keys can serve all tokens.
bool tokens_share_keys(const GatherAttentionParams& p) {
  const auto same = [](const auto& rows) { return rows.data == nullptr || rows.row_stride == 0; };
  if (p.seqs.seqlen_q < 2 || !same(p.indices) || !same(p.counts) || !same(p.bias) ||
      !same(p.rope.k_positions)) {
    return false;
  }
  // The last keys stand where they do for every token. Only the device knows `q_positions`.
  return p.rope.cos_sin == nullptr || p.rope.q_positions.data == nullptr || p.num_last == 0 ||
         p.tree_mask.data != nullptr;
}

// Enough blocks for two waves of a large GPU, but no segment without two tiles for every warp. By
// shapes alone, so that the bits are the same on every GPU.
int64_t choose_segments(const GatherAttentionParams& p, int64_t units) {
  if (p.block_out != nullptr) return p.num_entries + 1;
  constexpr int64_t kBlocks = 1024, kMinKeys = 128, kMaxSegments = 128;
  return std::max<int64_t>(1, std::min({kBlocks / units, num_slots(p) / kMinKeys, kMaxSegments}));
}

// Whether the last block of a row group to finish merges its segments. It has a warp for every
// fourth row; with more states than this, a launch with a warp for every row is done sooner.
bool merges_in_launch(const GatherAttentionParams& p, const GatherPlan& plan) {
  constexpr int64_t kMaxStates = 256;
  const int64_t rows = std::min(p.num_q_heads / plan.heads * plan.unit_tokens, plan.block_rows);
  return p.workspace != nullptr && plan.num_segments > 1 && plan.num_segments * rows <= kMaxStates;
}

template <class T>
void launch_dim(const GatherAttentionParams& p, const GatherPlan& plan) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 64) return launch_gather_attention<T, 64>(p, plan);
  if (dim <= 128) return launch_gather_attention<T, 128>(p, plan);
  launch_gather_attention<T, 256>(p, plan);
}

void launch_dtype(const GatherAttentionParams& p, const GatherPlan& plan) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_dim<__nv_bfloat16>(p, plan);
    case DType::kFloat16:
      return launch_dim<__half>(p, plan);
    default:
      return launch_dim<float>(p, plan);
  }
}

void sum_masses(const GatherAttentionParams& p, const GatherPlan& plan) {
  const int64_t masses = p.seqs.batch * p.index_heads * p.index_tokens * (p.num_entries + 1);
  if (masses == 0) return;
  const auto grid = dim3(static_cast<unsigned>((masses + kMassWarps - 1) / kMassWarps));
  launch(kOp, &gather_mass_kernel, grid, kMassWarps * device::kWarpSize, 0, p, plan);
}

SplitMerge merge_of_segments(const GatherAttentionParams& p, const GatherPlan& plan) {
  SplitMerge merge;
  merge.dtype = p.dtype;
  merge.out = plan.partials.out;
  merge.lse = plan.partials.lse;
  merge.num_splits = plan.num_segments;
  merge.batch = p.seqs.batch;
  merge.heads = p.num_q_heads;
  merge.seqlen_q = p.seqs.seqlen_q;
  merge.dim_v = p.head_dim_v;
  merge.merged_out = p.out;
  merge.merged_lse = static_cast<float*>(p.lse);
  return merge;
}

}  // namespace

void run_gather_attention_cuda(const GatherAttentionParams& p) {
  require_supported(kOp, p.dtype, p.head_dim, p.seqs);
  require_head_dim_v(kOp, p.head_dim_v);
  // Where tokens share keys, each adds a slot.
  if (num_slots(p) + p.seqs.seqlen_q > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string("longctx::") + kOp +
                                ": `indices` must list fewer than 2^31 keys a token on CUDA; got " +
                                std::to_string(num_slots(p)));
  }
  constexpr int64_t kFloat = sizeof(float);
  const int64_t rows = p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q;
  GatherPlan plan;
  plan.heads = p.index_heads == p.num_q_heads ? p.num_q_heads : p.num_kv_heads;
  plan.block_rows = p.dtype == DType::kFloat32 ? kPlainGatherRows : kTensorGatherRows;
  if (tokens_share_keys(p)) plan.unit_tokens = p.seqs.seqlen_q;
  plan.max_slots = num_slots(p) + plan.unit_tokens - 1;
  const Workspace scores(p.key_mass == nullptr ? 0 : rows * plan.max_slots * kFloat);
  plan.scores = scores.as<float>();
  if (rows > 0) {
    plan.num_segments =
        choose_segments(p, p.seqs.batch * plan.heads * p.seqs.seqlen_q / plan.unit_tokens);
    const int64_t states = plan.num_segments == 1 ? 0 : plan.num_segments * rows;
    const Workspace partial_out(states * p.head_dim_v * kFloat);
    const Workspace partial_lse(states * kFloat);
    plan.partials = {partial_out.as<float>(), partial_lse.as<float>()};
    plan.merge = merge_of_segments(p, plan);
    if (merges_in_launch(p, plan)) plan.counters = p.workspace;
    launch_dtype(p, plan);
    if (plan.num_segments > 1 && plan.counters == nullptr) merge_splits(kOp, plan.merge);
  }
  if (p.key_mass != nullptr) sum_masses(p, plan);
}

}  // namespace longctx::cuda
