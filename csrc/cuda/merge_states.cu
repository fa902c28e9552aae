#include "cuda/kernels.h"
#include "cuda/merge_splits.h"
#include "cuda/merge_states.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {
namespace {

// 16 bytes of the states per access where every row of both tensors is aligned for it.
template <class In, class Out>
bool aligned(const MergeParams& p) {
  constexpr int64_t kCount = 16 / sizeof(In);
  const TensorView& merged = p.merged_out;
  return reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(merged.data) % (kCount * sizeof(Out)) == 0 &&
         p.dim % kCount == 0 && merged.batch_stride % kCount == 0 &&
         merged.head_stride % kCount == 0 && merged.seq_stride % kCount == 0;
}

template <class T, class In, class Out>
void merge(const char* op, const MergeParams& p) {
  if (p.rows == 0) return;
  const auto grid = dim3(static_cast<unsigned>((p.rows + kMergeRows - 1) / kMergeRows));
  const auto kernel = aligned<In, Out>(p) ? &merge_states_kernel<T, In, Out, 16 / sizeof(In)>
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
  MergeParams p;
  p.out = params.out;
  p.lse = params.lse;
  p.sinks = params.sinks;
  p.merged_out = params.merged_out;
  p.merged_lse = params.merged_lse;
  p.num_states = params.num_splits;
  p.rows = params.batch * params.heads * params.seqlen_q;
  p.heads = params.heads;
  p.seqlen = params.seqlen_q;
  p.dim = params.dim_v;
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
