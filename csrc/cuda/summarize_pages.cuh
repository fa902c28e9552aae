// summarize_pages, update_pages: one or two rows that stand for the keys of a page. A warp has a
// page; so many lanes have a key as it has eights of elements, and the others the next keys. What
// a page's sums are depends on its own keys alone, and an update gives the bits of a new summary.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/key_rows.cuh"
#include "longctx/float_order.h"

namespace longctx::cuda {

constexpr int kSummaryWarps = 4;

struct SummaryGrid {
  int64_t blocks = 1;  // of threads, for each head of each batch entry
  bool k_aligned = false;
  bool queries_aligned = false;
  bool summary_aligned = false;
};

// The keys that a head of the summary is of; null where a key's page does not exist.
template <class T>
struct StoredKeys {
  const SummarizePagesParams& p;
  int64_t batch, kv_head;
  LONGCTX_DEVICE const T* operator()(int64_t key) const {
    return key_row<T>(p.k, p.pages, batch, kv_head, key);
  }
};

// A page as one warp sees it. Whole warps call its functions.
template <class T, class Keys = StoredKeys<T>>
class PageSummary {
 public:
  LONGCTX_DEVICE PageSummary(const SummarizePagesParams& p, const SummaryGrid& grid,
                             const Keys& keys, int64_t batch, int64_t head, int64_t page,
                             int64_t k_len)
      : p_(p), grid_(grid), keys_(keys), batch_(batch), head_(head), page_(page) {
    begin_ = clamp_index(page * p.page_size, 0, k_len);
    end_ = clamp_index(begin_ + p.page_size, 0, k_len);
    dim_ = static_cast<int>(p.head_dim);
    lanes_ = 1;
    while (lanes_ * kEight < dim_) lanes_ *= 2;
    first_ = device::lane_index() % lanes_ * kEight;
    offset_ = device::lane_index() / lanes_;
    step_ = device::kWarpSize / lanes_;
  }

  LONGCTX_DEVICE void extremes() const {
    float low[kEight], high[kEight];
    for (int e = 0; e < kEight; ++e) {
      low[e] = INFINITY;
      high[e] = -INFINITY;
    }
#pragma unroll 4
    for (int64_t key = begin_ + offset_; key < end_; key += step_) {
      float x[kEight];
      if (!load(key, x)) continue;
#pragma unroll
      for (int e = 0; e < kEight; ++e) {  // not NaN
        low[e] = x[e] < low[e] ? x[e] : low[e];
        high[e] = x[e] > high[e] ? x[e] : high[e];
      }
    }
    for (int mask = lanes_; mask < device::kWarpSize; mask *= 2) {
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        low[e] = fminf(low[e], device::shuffle_xor(low[e], mask));
        high[e] = fmaxf(high[e], device::shuffle_xor(high[e], mask));
      }
    }
    store(low, 0);
    store(high, p_.head_dim);
  }

  LONGCTX_DEVICE void mean() const {
    average([](int64_t) { return true; });
  }

  LONGCTX_DEVICE void representative() const {
    const float* scores = p_.key_scores.row(batch_, head_, 0);
    const auto key_of = [&](int64_t key) {
      uint32_t bits;
      memcpy(&bits, scores + key, sizeof(bits));
      return order_key(bits, float_format(DType::kFloat32));
    };
    const auto count = [&](const auto& counts) {
      int64_t own = 0;
      for (int64_t key = begin_ + device::lane_index(); key < end_; key += device::kWarpSize) {
        own += keys_(key) != nullptr && counts(key);
      }
      return reduce_warp(own, Sum());
    };
    const int64_t wanted = p_.num_representative;
    if (count([](int64_t) { return true; }) <= wanted) return mean();
    // The key of the last one, bit by bit; then, of those at this key, the index of the last.
    uint32_t cut = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t higher = cut | uint32_t{1} << bit;
      if (count([&](int64_t key) { return key_of(key) >= higher; }) >= wanted) cut = higher;
    }
    const int64_t ties = wanted - count([&](int64_t key) { return key_of(key) > cut; });
    int64_t last = begin_;
    int64_t step = 1;
    while (2 * step < p_.page_size) step *= 2;
    for (; step > 0; step /= 2) {
      const int64_t further = last + step;
      if (further >= end_) continue;
      const int64_t before =
          count([&](int64_t key) { return key < further && key_of(key) == cut; });
      if (before < ties) last = further;
    }
    average([&](int64_t key) {
      const uint32_t order = key_of(key);
      return order > cut || (order == cut && key <= last);
    });
  }

  LONGCTX_DEVICE void pooled() const {
    float query[kEight];
    load_eight(static_cast<const T*>(p_.queries.data) + batch_ * p_.queries.batch_stride +
                   head_ * p_.queries.head_stride + page_ * p_.queries.seq_stride,
               first_, dim_, grid_.queries_aligned, query);
    const float scale = static_cast<float>(p_.softmax_scale);
    float top = -INFINITY, total = 0.0f, sum[kEight] = {};
    for (int64_t base = begin_; base < end_; base += step_) {
      float x[kEight] = {};
      const bool exists = base + offset_ < end_ && load(base + offset_, x);
      float dot = 0.0f;
#pragma unroll
      for (int e = 0; e < kEight; ++e) dot += query[e] * x[e];
      for (int mask = 1; mask < lanes_; mask *= 2) dot += device::shuffle_xor(dot, mask);
      if (!exists) continue;
      const float score = scale * dot;
      const float higher = score > top ? score : top;
      const float kept = higher == top ? 1.0f : expf(top - higher);
      const float weight = expf(score - higher);
      total = total * kept + weight;
#pragma unroll
      for (int e = 0; e < kEight; ++e) sum[e] = sum[e] * kept + weight * x[e];
      top = higher;
    }
    for (int mask = lanes_; mask < device::kWarpSize; mask *= 2) {
      const float other = device::shuffle_xor(top, mask);
      const float higher = other > top ? other : top;
      const float kept = top == -INFINITY ? 0.0f : expf(top - higher);
      const float joined = other == -INFINITY ? 0.0f : expf(other - higher);
      total = total * kept + device::shuffle_xor(total, mask) * joined;
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        sum[e] = sum[e] * kept + device::shuffle_xor(sum[e], mask) * joined;
      }
      top = higher;
    }
#pragma unroll
    for (int e = 0; e < kEight; ++e) sum[e] = total == 0.0f ? 0.0f : sum[e] / total;
    store(sum, 0);
  }

 private:
  LONGCTX_DEVICE bool load(int64_t key, float (&x)[kEight]) const {
    const T* from = keys_(key);
    if (from == nullptr) return false;
    load_eight(from, first_, dim_, grid_.k_aligned, x);
    return true;
  }

  template <class Takes>
  LONGCTX_DEVICE void average(const Takes& takes) const {
    float sum[kEight] = {};
    int64_t count = 0;
#pragma unroll 4
    for (int64_t key = begin_ + offset_; key < end_; key += step_) {
      float x[kEight];
      if (!takes(key) || !load(key, x)) continue;
      ++count;
#pragma unroll
      for (int e = 0; e < kEight; ++e) sum[e] += x[e];
    }
    for (int mask = lanes_; mask < device::kWarpSize; mask *= 2) {
      count += device::shuffle_xor(count, mask);
#pragma unroll
      for (int e = 0; e < kEight; ++e) sum[e] += device::shuffle_xor(sum[e], mask);
    }
#pragma unroll
    for (int e = 0; e < kEight; ++e)
      sum[e] = count == 0 ? 0.0f : sum[e] / static_cast<float>(count);
    store(sum, 0);
  }

  LONGCTX_DEVICE void store(const float (&x)[kEight], int64_t offset) const {
    if (offset_ != 0) return;
    T* to = static_cast<T*>(p_.summary.data) + batch_ * p_.summary.batch_stride +
            head_ * p_.summary.head_stride + page_ * p_.summary.seq_stride + offset;
    store_eight(x, to, first_, dim_, grid_.summary_aligned);
  }

  const SummarizePagesParams& p_;
  const SummaryGrid& grid_;
  const Keys& keys_;
  int64_t batch_, head_, page_, begin_, end_;
  int dim_, lanes_, first_, offset_, step_;
};

// Grid: batch * heads * grid.blocks; the warps of a head take turns at its pages.
template <class T>
LONGCTX_KERNEL(kSummaryWarps* device::kWarpSize, 1)
summarize_pages_kernel(const SummarizePagesParams p, const SummaryGrid grid) {
  const int64_t map = device::block_index() / grid.blocks;
  const int64_t batch = map / p.heads, head = map % p.heads;
  const int64_t k_len = sequence_at(p.seqs, batch).k_len;
  int64_t page = 0, last = p.num_pages;
  if (p.update) {
    const int64_t start = p.starts == nullptr ? p.start : p.starts[batch];
    page = (start > 0 ? start : 0) / p.page_size;
    last = start >= k_len ? page : (k_len + p.page_size - 1) / p.page_size;
  }
  page += device::block_index() % grid.blocks * kSummaryWarps + device::warp_index();
  const StoredKeys<T> keys = {p, batch, head * p.num_kv_heads / p.heads};
  for (; page < last; page += grid.blocks * kSummaryWarps) {
    const PageSummary<T> summary(p, grid, keys, batch, head, page, k_len);
    switch (p.method) {
      case SummaryMethod::kMinMax:
        summary.extremes();
        break;
      case SummaryMethod::kMean:
        summary.mean();
        break;
      case SummaryMethod::kRepresentative:
        summary.representative();
        break;
      case SummaryMethod::kPooled:
        summary.pooled();
        break;
    }
  }
}

}  // namespace longctx::cuda
