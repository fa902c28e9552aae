#include "cuda/kernels.h"
#include "cuda/merge_states.cuh"
#include "cuda/stream.h"

namespace longctx::cuda {

void run_merge_states_cuda(const MergeStatesParams& params) {
  if (params.rows == 0) return;
  const dim3 block(kWarp, kRowsPerBlock);
  const auto grid = static_cast<unsigned>((params.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  const cudaStream_t stream = current_stream();
  switch (params.dtype) {
    case DType::kFloat32:
      merge_states_kernel<float, float><<<grid, block, 0, stream>>>(params);
      break;
    case DType::kFloat64:
      merge_states_kernel<double, double><<<grid, block, 0, stream>>>(params);
      break;
    case DType::kBFloat16:
      merge_states_kernel<float, __nv_bfloat16><<<grid, block, 0, stream>>>(params);
      break;
    case DType::kFloat16:
      merge_states_kernel<float, __half><<<grid, block, 0, stream>>>(params);
      break;
  }
  check_launch("merge_states");
}

}  // namespace longctx::cuda
