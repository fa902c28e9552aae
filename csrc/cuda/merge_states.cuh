// out = sum_i w_i out_i with w = softmax over the states of their lse; lse = logsumexp of them.
// A state whose lse is -inf saw no key and is not read. One warp per row: its lanes stand for
// states while the weights are computed, then for columns. Reads every state once.
#pragma once
#include "cuda/columns.cuh"
#include "cuda/merge_splits.h"
#include "device/thread.cuh"
#include "longctx/params.h"

namespace longctx::cuda {

constexpr int kMergeRows = 4;  // rows of a block

struct MergeParams {
  const void* out = nullptr;     // [num_states, rows, dim], contiguous
  const void* lse = nullptr;     // [num_states, rows] of the statistics' type
  const float* sinks = nullptr;  // [heads] or null: one more logit per row, without a value
  TensorView merged_out;         // [batch, heads, seqlen, dim]
  void* merged_lse = nullptr;    // [rows], without sinks
  int64_t num_states = 0;
  int64_t rows = 0;  // batch * heads * seqlen
  int64_t heads = 1;
  int64_t seqlen = 0;
  int64_t dim = 0;
};

inline MergeParams merge_params(const SplitMerge& splits) {
  MergeParams p;
  p.out = splits.out;
  p.lse = splits.lse;
  p.sinks = splits.sinks;
  p.merged_out = splits.merged_out;
  p.merged_lse = splits.merged_lse;
  p.num_states = splits.num_splits;
  p.rows = splits.batch * splits.heads * splits.seqlen_q;
  p.heads = splits.heads;
  p.seqlen = splits.seqlen_q;
  p.dim = splits.dim_v;
  return p;
}

// Columns of an access: 16 bytes of the states where every row of both tensors is aligned for it.
template <class In, class Out>
int merge_columns(const MergeParams& p) {
  constexpr int kCount = 16 / sizeof(In);
  const TensorView& merged = p.merged_out;
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(merged.data) % (kCount * sizeof(Out)) == 0 &&
                       p.dim % kCount == 0 && merged.batch_stride % kCount == 0 &&
                       merged.head_stride % kCount == 0 && merged.seq_stride % kCount == 0;
  return aligned ? kCount : 1;
}

template <class T>
struct StateWeights {
  const T* lse;  // of state s: lse[s * rows]
  int64_t rows;
  int64_t num_states;
  T top;          // the largest lse, or 0 without any
  T scale;        // weight = exp(lse - top) * scale / denominator
  T denominator;  // 0 without a state, and then no weight is used
  T merged_lse;
  static constexpr T kInf = static_cast<T>(INFINITY);

  LONGCTX_DEVICE StateWeights(const MergeParams& p, int64_t row)
      : lse(static_cast<const T*>(p.lse) + row), rows(p.rows), num_states(p.num_states) {
    top = -kInf;
    for (int64_t first = 0; first < num_states; first += device::kWarpSize) {
      const T own = lse_of_lane(first);
      top = own > top ? own : top;
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      const T other = device::shuffle_xor(top, mask);
      top = other > top ? other : top;
    }
    if (top == -kInf) top = 0;
    // In the order of the states, so that absent ones leave no trace in the rounding.
    T sum = 0;
    for (int64_t first = 0; first < num_states; first += device::kWarpSize) {
      const T own = exp(lse_of_lane(first) - top);
      for (int lane = 0; lane < lanes(first); ++lane) sum += device::shuffle(own, lane);
    }
    merged_lse = sum == 0 ? -kInf : top + log(sum);
    scale = 1;
    denominator = sum;
    if (p.sinks == nullptr) return;
    // The sink joins the denominator; both are taken relative to the larger of the two.
    const T sink = p.sinks[row / p.seqlen % p.heads];
    const T larger = sink > top ? sink : top;
    scale = exp(top - larger);
    denominator = sum * scale + exp(sink - larger);
  }

  // Lane l stands for state first + l; -inf where there is none.
  LONGCTX_DEVICE T lse_of_lane(int64_t first) const {
    const int64_t state = first + device::lane_index();
    return state < num_states ? lse[state * rows] : -kInf;
  }
  LONGCTX_DEVICE T weight(T state_lse) const { return exp(state_lse - top) * scale / denominator; }
  LONGCTX_DEVICE int lanes(int64_t first) const {
    return num_states - first < device::kWarpSize ? static_cast<int>(num_states - first)
                                                  : device::kWarpSize;
  }
};

// By a warp. T: type of the statistics; In: of the states; Out: of the result. Every lane takes
// `count` columns at a time, which must be aligned in both.
template <class T, class In, class Out, int count>
LONGCTX_DEVICE void merge_row(const MergeParams& p, int64_t row) {
  // state weights
  const StateWeights<T> weights(p, row);
  if (device::lane_index() == 0) static_cast<T*>(p.merged_lse)[row] = weights.merged_lse;

  // merge row
  Out* merged = static_cast<Out*>(p.merged_out.data) +
                row / (p.seqlen * p.heads) * p.merged_out.batch_stride +
                row / p.seqlen % p.heads * p.merged_out.head_stride +
                row % p.seqlen * p.merged_out.seq_stride;
  for (int64_t begin = 0; begin < p.dim; begin += device::kWarpSize * count) {
    const int64_t column = begin + device::lane_index() * count;
    T acc[count] = {};
    for (int64_t first = 0; first < p.num_states; first += device::kWarpSize) {
      const T own_lse = weights.lse_of_lane(first);
      const T own_weight = weights.weight(own_lse);
      const uint32_t present = device::ballot(!(own_lse == -weights.kInf));
      const In* state = static_cast<const In*>(p.out) + (first * p.rows + row) * p.dim + column;
#pragma unroll 4
      for (int lane = 0; lane < weights.lanes(first); ++lane, state += p.rows * p.dim) {
        const T weight = device::shuffle(own_weight, lane);
        if ((present >> lane & 1) == 0 || column >= p.dim) continue;
        const auto out = *reinterpret_cast<const Columns<In, count>*>(state);
        for (int d = 0; d < count; ++d) acc[d] += weight * device::widen(out.values[d]);
      }
    }
    if (column >= p.dim) continue;
    Columns<Out, count> out;
    for (int d = 0; d < count; ++d) device::narrow(acc[d], out.values[d]);
    *reinterpret_cast<Columns<Out, count>*>(merged + column) = out;
  }
}

template <class T, class In, class Out, int count>
LONGCTX_KERNEL(kMergeRows* device::kWarpSize, 1)
merge_states_kernel(const MergeParams p) {
  const int64_t row = device::block_index() * kMergeRows + device::warp_index();
  if (row < p.rows) merge_row<T, In, Out, count>(p, row);
}

}  // namespace longctx::cuda
