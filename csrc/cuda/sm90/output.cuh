// Where a row's result goes: out and lse, or the partial ones of a split.
#pragma once
#include "cuda/items.cuh"
#include "cuda/partials.h"
#include "cuda/sm90/softmax.cuh"

namespace longctx::cuda::sm90 {

class OutputRow {
 public:
  // `row` and `head` count from the item's first ones.
  LONGCTX_DEVICE OutputRow(const AttentionParams& p, const AttentionPartials& partials,
                           const Item& item, int row, int head)
      : sinks_(p.sinks) {
    head_ = item.first_head + head;
    const int64_t q_row = item.seq.q_begin + item.row_begin + row;
    const int64_t index =
        (item.seq.batch_index * p.num_q_heads + head_) * p.seqs.seqlen_q + q_row;
    if (partials.out == nullptr) {
      lse_ = static_cast<float*>(p.lse) + index;
      offset_ = item.seq.batch_index * p.out.batch_stride + head_ * p.out.head_stride +
                q_row * p.out.seq_stride;
      out_ = p.out.data;
    } else {
      const int64_t split_index =
          item.split * p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q + index;
      lse_ = partials.lse + split_index;
      partial_ = partials.out + split_index * p.head_dim_v;
    }
  }

  // Writes lse (one thread of those that hold the row) and returns what the accumulated values are
  // worth; 0 for a row that has seen no key. `top` in base 2.
  LONGCTX_DEVICE float finish(float top, float sum, bool writes_lse) const {
    if (sum == 0.0f) {
      if (writes_lse) *lse_ = -INFINITY;
      return 0.0f;
    }
    if (writes_lse) *lse_ = (top + log2f(sum)) * kLn2;
    if (sinks_ == nullptr || partial_ != nullptr) return 1.0f / sum;
    // The sink joins the denominator; both are taken relative to the larger of the two.
    const float sink = sinks_[head_] * kLog2E;
    const float reference = fmaxf(top, sink);
    const float scale = device::exp2_fast(top - reference);
    return scale / fmaf(sum, scale, device::exp2_fast(sink - reference));
  }

  // Columns `column` (even) and the next; head_dim_v is even.
  template <class T>
  LONGCTX_DEVICE void store_pair(int column, float low, float high) const {
    if (partial_ != nullptr) {
      *reinterpret_cast<float2*>(partial_ + column) = float2{low, high};
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(out_) + offset_ + column) =
          device::pack_pair(T(), low, high);
    }
  }

 private:
  const float* sinks_;
  void* out_ = nullptr;
  float* partial_ = nullptr;
  float* lse_;
  int64_t head_, offset_ = 0;
};

}  // namespace longctx::cuda::sm90
