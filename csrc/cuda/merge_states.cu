#include "cuda/kernels.h"
#include "cuda/merge_splits.h"
#include "cuda/merge_states.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {
namespace {

template <class T, class In, class Out>
void merge(const char* op, const MergeParams& p) {
  if (p.rows == 0) return;
  const auto grid = dim3(static_cast<unsigned>((p.rows + kMergeRows - 1) / kMergeRows));
  const auto kernel = merge_columns<In, Out>(p) > 1
                          ? &merge_states_kernel<T, In, Out, 16 / sizeof(In)>
                          : &merge_states_kernel<T, In, Out, 1>;
  launch(op, kernel, grid, kMergeRows * device::kWarpSize, 0, p);
}

}  // namespace

void run_merge_states_cuda(const MergeStatesParams& params) {
  MergeParams p;
  p.out = params.out;
  p.lse = params.lse_override != nullptr ? params.lse_override : params.lse;
  p.merged_out = {params.merged_out, 0, 0, params.dim};
  p.merged_lse = params.merged_lse;
  p.num_states = params.num_states;
  p.rows = p.seqlen = params.rows;
  p.dim = params.dim;
  switch (params.dtype) {
    case DType::kFloat32:
      return merge<float, float, float>("merge_states", p);
    case DType::kFloat64:
      return merge<double, double, double>("merge_states", p);
    case DType::kBFloat16:
      return merge<float, __nv_bfloat16, __nv_bfloat16>("merge_states", p);
    case DType::kFloat16:
      return merge<float, __half, __half>("merge_states", p);
  }
}

void merge_splits(const char* op, const SplitMerge& params) {
  const MergeParams p = merge_params(params);
  switch (params.dtype) {
    case DType::kBFloat16:
      return merge<float, float, __nv_bfloat16>(op, p);
    case DType::kFloat16:
      return merge<float, float, __half>(op, p);
    default:
      return merge<float, float, float>(op, p);
  }
}

}  // namespace longctx::cuda
