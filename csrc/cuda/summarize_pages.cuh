// summarize_pages, update_pages: one or two rows that stand for the keys of a page. A warp has a
// page, or a part of a long one; so many lanes have a key as it has eights of elements, and the
// others the next keys. What a page's sums are depends on page_size and its own keys alone, and an
// update gives the bits of a new summary.
#pragma once
#include "cuda/block_reduce.cuh"
#include "cuda/key_rows.cuh"
#include "longctx/float_order.h"

namespace longctx::cuda {

constexpr int kSummaryWarps = 4;    // of a block whose warps have a page each
constexpr int64_t kLongPage = 128;  // keys
constexpr int kLongPageParts = 8;   // and warps of a block that has such a page

struct SummaryGrid {
  int64_t blocks = 1;           // of threads, for each head of each batch entry
  bool block_has_page = false;  // a long one; else each of its warps has one
  bool k_aligned = false;
  bool queries_aligned = false;
  bool summary_aligned = false;
};

// What is known of some keys: nothing yet, joined with what others found, that of another lane.
struct Extremes {
  float low[kEight], high[kEight];
  LONGCTX_DEVICE Extremes() {
    for (int e = 0; e < kEight; ++e) {
      low[e] = INFINITY;
      high[e] = -INFINITY;
    }
  }
  LONGCTX_DEVICE void join(const Extremes& other) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      low[e] = fminf(low[e], other.low[e]);
      high[e] = fmaxf(high[e], other.high[e]);
    }
  }
  LONGCTX_DEVICE Extremes of_lane(int mask) const {
    Extremes other;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      other.low[e] = device::shuffle_xor(low[e], mask);
      other.high[e] = device::shuffle_xor(high[e], mask);
    }
    return other;
  }
};

struct Average {
  float sum[kEight] = {};
  int64_t count = 0;
  LONGCTX_DEVICE void join(const Average& other) {
    count += other.count;
#pragma unroll
    for (int e = 0; e < kEight; ++e) sum[e] += other.sum[e];
  }
  LONGCTX_DEVICE Average of_lane(int mask) const {
    Average other;
    other.count = device::shuffle_xor(count, mask);
#pragma unroll
    for (int e = 0; e < kEight; ++e) other.sum[e] = device::shuffle_xor(sum[e], mask);
    return other;
  }
};

struct Pooled {
  float top = -INFINITY, total = 0.0f, sum[kEight] = {};
  LONGCTX_DEVICE void join(const Pooled& other) {
    const float higher = other.top > top ? other.top : top;
    const float kept = top == -INFINITY ? 0.0f : expf(top - higher);
    const float joined = other.top == -INFINITY ? 0.0f : expf(other.top - higher);
    total = total * kept + other.total * joined;
#pragma unroll
    for (int e = 0; e < kEight; ++e) sum[e] = sum[e] * kept + other.sum[e] * joined;
    top = higher;
  }
  LONGCTX_DEVICE Pooled of_lane(int mask) const {
    Pooled other;
    other.top = device::shuffle_xor(top, mask);
    other.total = device::shuffle_xor(total, mask);
#pragma unroll
    for (int e = 0; e < kEight; ++e) other.sum[e] = device::shuffle_xor(sum[e], mask);
    return other;
  }
};

struct Count {
  int64_t count = 0;
  LONGCTX_DEVICE void join(const Count& other) { count += other.count; }
};

// Shared memory of a block that has a page.
constexpr int64_t kPagePartsBytes = kLongPageParts * device::kWarpSize * sizeof(Extremes);
static_assert(sizeof(Average) <= sizeof(Extremes) && sizeof(Pooled) <= sizeof(Extremes));

// The keys that a head of the summary is of; null where a key's page does not exist.
template <class T>
struct StoredKeys {
  const SummarizePagesParams& p;
  int64_t batch, kv_head;
  LONGCTX_DEVICE const T* operator()(int64_t key) const {
    return key_row<T>(p.k, p.pages, batch, kv_head, key);
  }
};

// A page as a warp sees it, whole warps call its functions; a long one as a block of kLongPageParts
// warps does, all of them call its functions and have shared memory for `parts`. With `in_turn` a
// warp takes the parts of a long page in turn, and finds the same bits.
template <class T, class Keys = StoredKeys<T>, bool in_turn = true>
class PageSummary {
 public:
  LONGCTX_DEVICE PageSummary(const SummarizePagesParams& p, const SummaryGrid& grid,
                             const Keys& keys, int64_t batch, int64_t head, int64_t page,
                             int64_t k_len, void* parts = nullptr)
      : p_(p), grid_(grid), keys_(keys), parts_(parts), batch_(batch), head_(head), page_(page) {
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
    const auto all = of_parts<Extremes>([&](int64_t begin, int64_t end) {
      Extremes own;
#pragma unroll 4
      for (int64_t key = begin + offset_; key < end; key += step_) {
        float x[kEight];
        if (!load(key, x)) continue;
#pragma unroll
        for (int e = 0; e < kEight; ++e) {  // not NaN
          own.low[e] = x[e] < own.low[e] ? x[e] : own.low[e];
          own.high[e] = x[e] > own.high[e] ? x[e] : own.high[e];
        }
      }
      return of_warp(own);
    });
    store(all.low, 0);
    store(all.high, p_.head_dim);
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
      return of_parts<Count>([&](int64_t begin, int64_t end) {
               Count own;
               for (int64_t key = begin + device::lane_index(); key < end;
                    key += device::kWarpSize) {
                 own.count += keys_(key) != nullptr && counts(key);
               }
               own.count = reduce_warp(own.count, Sum());
               return own;
             })
          .count;
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
    auto all = of_parts<Pooled>([&](int64_t begin, int64_t end) {
      Pooled own;
      for (int64_t base = begin; base < end; base += step_) {
        float x[kEight] = {};
        const bool exists = base + offset_ < end && load(base + offset_, x);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < kEight; ++e) dot += query[e] * x[e];
        for (int mask = 1; mask < lanes_; mask *= 2) dot += device::shuffle_xor(dot, mask);
        if (!exists) continue;
        const float score = scale * dot;
        const float higher = score > own.top ? score : own.top;
        const float kept = higher == own.top ? 1.0f : expf(own.top - higher);
        const float weight = expf(score - higher);
        own.total = own.total * kept + weight;
#pragma unroll
        for (int e = 0; e < kEight; ++e) own.sum[e] = own.sum[e] * kept + weight * x[e];
        own.top = higher;
      }
      return of_warp(own);
    });
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      all.sum[e] = all.total == 0.0f ? 0.0f : all.sum[e] / all.total;
    }
    store(all.sum, 0);
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
    auto all = of_parts<Average>([&](int64_t begin, int64_t end) {
      Average own;
#pragma unroll 4
      for (int64_t key = begin + offset_; key < end; key += step_) {
        float x[kEight];
        if (!takes(key) || !load(key, x)) continue;
        ++own.count;
#pragma unroll
        for (int e = 0; e < kEight; ++e) own.sum[e] += x[e];
      }
      return of_warp(own);
    });
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      all.sum[e] = all.count == 0 ? 0.0f : all.sum[e] / static_cast<float>(all.count);
    }
    store(all.sum, 0);
  }

  // Joined over the lanes that have the same elements of other keys.
  template <class Known>
  LONGCTX_DEVICE Known of_warp(Known known) const {
    for (int mask = lanes_; mask < device::kWarpSize; mask *= 2) known.join(known.of_lane(mask));
    return known;
  }

  // What collect(begin, end) finds in the page, or in each part of a long one, joined.
  template <class Known, class Collect>
  LONGCTX_DEVICE Known of_parts(const Collect& collect) const {
    const int num_parts = p_.page_size < kLongPage ? 1 : kLongPageParts;
    const int64_t keys = (p_.page_size - 1) / num_parts + 1;
    const auto of_part = [&](int part) {
      const int64_t begin = begin_ + part * keys;
      return collect(begin, end_ - begin < keys ? end_ : begin + keys);
    };
    Known all;
    if constexpr (in_turn) {
#pragma unroll 1
      for (int part = 0; part < num_parts; ++part) all.join(of_part(part));
      return all;
    }
    const Known own = of_part(parts_ == nullptr ? 0 : device::thread_index() / device::kWarpSize);
    if (parts_ == nullptr) return own;
    Known* slots = static_cast<Known*>(parts_);
    slots[device::thread_index()] = own;
    device::sync_threads();
#pragma unroll 1
    for (int part = 0; part < num_parts; ++part) {
      all.join(slots[part * device::kWarpSize + device::lane_index()]);
    }
    device::sync_threads();
    return all;
  }

  LONGCTX_DEVICE void store(const float (&x)[kEight], int64_t offset) const {
    if (offset_ != 0 || (parts_ != nullptr && device::thread_index() >= device::kWarpSize)) return;
    T* to = static_cast<T*>(p_.summary.data) + batch_ * p_.summary.batch_stride +
            head_ * p_.summary.head_stride + page_ * p_.summary.seq_stride + offset;
    store_eight(x, to, first_, dim_, grid_.summary_aligned);
  }

  const SummarizePagesParams& p_;
  const SummaryGrid& grid_;
  const Keys& keys_;
  void* parts_;
  int64_t batch_, head_, page_, begin_, end_;
  int dim_, lanes_, first_, offset_, step_;
};

// Grid: batch * heads * grid.blocks; the warps of a head, or its blocks, take turns at its pages.
template <class T>
LONGCTX_KERNEL(kLongPageParts* device::kWarpSize, 1)
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
  const int at_a_time = grid.block_has_page ? 1 : kSummaryWarps;  // pages of a block
  void* parts = grid.block_has_page ? device::shared_memory() : nullptr;
  page += device::block_index() % grid.blocks * at_a_time;
  if (!grid.block_has_page) page += device::warp_index();
  const StoredKeys<T> keys = {p, batch, head * p.num_kv_heads / p.heads};
  for (; page < last; page += grid.blocks * at_a_time) {
    const PageSummary<T, StoredKeys<T>, false> summary(p, grid, keys, batch, head, page, k_len,
                                                       parts);
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
