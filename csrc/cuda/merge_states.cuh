// out = sum_i w_i out_i with w = softmax over the states of their lse; lse = logsumexp of them.
// A state whose lse is -inf saw no key and is not read. One warp per row, lanes over columns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "longctx/params.h"

namespace longctx::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;

// T: type of the statistics; In: type of the states.
template <class T, class In>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    merge_states_kernel(MergeStatesParams params) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
  if (row >= params.rows) return;
  const T inf = static_cast<T>(INFINITY);
  const void* source = params.lse_override != nullptr ? params.lse_override : params.lse;
  const T* lse = static_cast<const T*>(source) + row;

  // state weights: every lane computes the same few numbers, in state order
  T top = -inf;
  for (int64_t s = 0; s < params.num_states; ++s) top = max(top, lse[s * params.rows]);
  const T safe_top = top == -inf ? T(0) : top;
  T sum = 0;
  for (int64_t s = 0; s < params.num_states; ++s) sum += exp(lse[s * params.rows] - safe_top);
  if (threadIdx.x == 0) {
    static_cast<T*>(params.merged_lse)[row] = sum == T(0) ? -inf : safe_top + log(sum);
  }

  // merge row
  for (int64_t d = threadIdx.x; d < params.dim; d += kWarp) {
    T acc = 0;
    for (int64_t s = 0; s < params.num_states; ++s) {
      const T state_lse = lse[s * params.rows];
      if (state_lse == -inf) continue;
      const In* out = static_cast<const In*>(params.out) + (s * params.rows + row) * params.dim;
      acc += exp(state_lse - safe_top) / sum * widen(out[d]);
    }
    narrow(acc, static_cast<In*>(params.merged_out)[row * params.dim + d]);
  }
}

}  // namespace longctx::cuda
