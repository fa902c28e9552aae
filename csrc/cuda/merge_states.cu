#include "cuda/kernels.h"
#include "cuda/merge_states.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {

void run_merge_states_cuda(const MergeStatesParams& params) {
  if (params.rows == 0) return;
  const auto grid = dim3(static_cast<unsigned>((params.rows + kMergeRows - 1) / kMergeRows));
  const auto run = [&](auto kernel) {
    launch("merge_states", kernel, grid, kMergeRows * device::kWarpSize, 0, params);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return run(&merge_states_kernel<float, float>);
    case DType::kFloat64:
      return run(&merge_states_kernel<double, double>);
    case DType::kBFloat16:
      return run(&merge_states_kernel<float, __nv_bfloat16>);
    case DType::kFloat16:
      return run(&merge_states_kernel<float, __half>);
  }
}

}  // namespace longctx::cuda
