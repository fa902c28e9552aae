// out = sum_i w_i out_i with w = softmax over the states of their lse; lse = logsumexp of them.
// A state whose lse is -inf saw no key and is not read. One warp per row, lanes over columns.
#pragma once
#include "device/thread.cuh"
#include "longctx/params.h"

namespace longctx::cuda {

constexpr int kMergeRows = 4;  // rows of a block

// T: type of the statistics; In: type of the states.
template <class T, class In>
LONGCTX_KERNEL(kMergeRows* device::kWarpSize, 1)
merge_states_kernel(const MergeStatesParams params) {
  const int64_t row = device::block_index() * kMergeRows + device::warp_index();
  if (row >= params.rows) return;
  const T inf = static_cast<T>(INFINITY);
  const void* source = params.lse_override != nullptr ? params.lse_override : params.lse;
  const T* lse = static_cast<const T*>(source) + row;

  // state weights: every lane computes the same few numbers, in state order
  T top = -inf;
  for (int64_t s = 0; s < params.num_states; ++s) {
    top = lse[s * params.rows] > top ? lse[s * params.rows] : top;
  }
  const T safe_top = top == -inf ? T(0) : top;
  T sum = 0;
  for (int64_t s = 0; s < params.num_states; ++s) sum += exp(lse[s * params.rows] - safe_top);
  if (device::lane_index() == 0) {
    static_cast<T*>(params.merged_lse)[row] = sum == T(0) ? -inf : safe_top + log(sum);
  }

  // merge row
  for (int64_t d = device::lane_index(); d < params.dim; d += device::kWarpSize) {
    T acc = 0;
    for (int64_t s = 0; s < params.num_states; ++s) {
      const T state_lse = lse[s * params.rows];
      if (state_lse == -inf) continue;
      const In* out = static_cast<const In*>(params.out) + (s * params.rows + row) * params.dim;
      acc += exp(state_lse - safe_top) / sum * device::widen(out[d]);
    }
    device::narrow(acc, static_cast<In*>(params.merged_out)[row * params.dim + d]);
  }
}

}  // namespace longctx::cuda
