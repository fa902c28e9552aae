// gather_kv, compact_kv and truncate_kv against loops over rows. Bits are copied: no tolerance.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cuda/kernels.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Rows {
  DType dtype = DType::kFloat32;
  int64_t batch = 2, heads = 2, seqlen_k = 75, dim = 24, dim_v = 40;
  Layout layout = Layout::kHeadsFirst;
  int64_t page_size = 0;  // 0: not paged
  int64_t index_heads = 2, num_entries = 40;
  int64_t num_layers = 1;
  bool all_stay = false;  // the list is 0, 1, ...
  std::vector<int32_t> seqused_k, counts;
  int64_t num_draft_tokens = -1;  // -1: no draft
  bool chain = false;             // a draft without a list
};

// Caches, lists and, in words of the host, what a list names.
class Problem {
 public:
  explicit Problem(const Rows& c) : c_(c), rng_(8) {
    const int64_t pages = c.page_size == 0 ? 0 : (c.seqlen_k + c.page_size - 1) / c.page_size;
    for (int64_t i = 0; i < 2 * c.num_layers; ++i) {
      const int64_t dim = i % 2 == 0 ? c.dim : c.dim_v;
      Tensor cache = c.page_size == 0
                         ? Tensor(c.dtype, c.batch, c.heads, c.seqlen_k, dim, c.layout)
                         : Tensor(c.dtype, c.batch * pages, c.heads, c.page_size, dim, c.layout);
      cache.fill_normal(rng_);
      caches.push_back(cache);
    }
    if (c.page_size > 0) {
      table_.resize(static_cast<size_t>(c.batch * pages));
      std::iota(table_.begin(), table_.end(), 0);
      std::shuffle(table_.begin(), table_.end(), rng_);
      // Pages that do not exist, the first one among them.
      table_[0] = -1;
      table_[1] = static_cast<int32_t>(c.batch * pages);
    }
    indices_.resize(static_cast<size_t>(c.batch * c.index_heads * c.num_entries));
    const int64_t draft = std::max<int64_t>(c.num_draft_tokens, 0);
    const int64_t range = c.num_draft_tokens < 0 ? c.seqlen_k : draft;
    for (size_t i = 0; i < indices_.size(); ++i) {
      const int64_t entry = static_cast<int64_t>(i) % c.num_entries;
      // Mostly ascending, some of it outside.
      const auto drawn = static_cast<int64_t>(rng_() % 9) - 4 + entry * range / c.num_entries;
      indices_[i] = static_cast<int32_t>(c.all_stay ? entry : drawn);
    }
  }

  void fill(KVRowsParams& p) const {
    p.dtype = c_.dtype;
    p.batch = c_.batch;
    p.seqlen_k = c_.seqlen_k;
    p.seqused_k = data_or_null(c_.seqused_k);
    if (c_.page_size > 0) {
      const int64_t max_pages = static_cast<int64_t>(table_.size()) / c_.batch;
      p.pages = {table_.data(), max_pages, static_cast<int64_t>(table_.size()), c_.page_size};
      p.seqlen_k = max_pages * c_.page_size;
    }
    p.num_entries = c_.num_entries;
    p.index_heads = c_.index_heads;
    if (!c_.chain) {
      p.indices = {indices_.data(), c_.index_heads * c_.num_entries, c_.num_entries, 0};
    }
    if (!c_.counts.empty()) p.counts = {c_.counts.data(), c_.index_heads, 1, 0};
    p.num_kv_heads = c_.heads;
    p.head_dim = c_.dim;
    p.head_dim_v = c_.dim_v;
  }

  struct Place {
    int64_t batch, row;
  };
  // Where the key stands in the caches; batch -1 where its page does not exist.
  Place place(int64_t b, int64_t key) const {
    if (c_.page_size == 0) return {b, key};
    const auto max_pages = static_cast<int64_t>(table_.size()) / c_.batch;
    const int64_t page = table_[static_cast<size_t>(b * max_pages + key / c_.page_size)];
    const bool exists = page >= 0 && page < static_cast<int64_t>(table_.size());
    return {exists ? page : -1, key % c_.page_size};
  }
  // The entries that count.
  std::vector<int64_t> entries(int64_t b, int64_t index_head) const {
    const int64_t list = b * c_.index_heads + index_head;
    int64_t count = c_.num_entries;
    if (!c_.counts.empty()) {
      count = std::clamp<int64_t>(c_.counts[static_cast<size_t>(list)], 0, count);
    }
    std::vector<int64_t> found;
    for (int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(list * c_.num_entries + i);
      found.push_back(c_.chain ? i : indices_[at]);
    }
    return found;
  }
  int64_t used(int64_t b) const {
    KVRowsParams p;
    fill(p);
    const int64_t all = p.seqlen_k;
    return c_.seqused_k.empty() ? all
                                : std::clamp<int64_t>(c_.seqused_k[static_cast<size_t>(b)], 0, all);
  }

  std::vector<Tensor> caches;  // k and v of each layer

 private:
  const Rows& c_;
  std::mt19937 rng_;
  std::vector<int32_t> table_, indices_;
};

void check_gather(const Rows& c) {
  Problem problem(c);
  in_every_mode([&] {
    Tensor k_out(c.dtype, c.batch, c.heads, c.num_entries, c.dim);
    Tensor v_out(c.dtype, c.batch, c.heads, c.num_entries, c.dim_v);
    GatherKVParams params;
    problem.fill(params);
    params.k = problem.caches[0].view();
    params.v = problem.caches[1].view();
    params.k_out = k_out.data();
    params.v_out = v_out.data();
    cuda::run_gather_kv_cuda(params);
    const auto compare = [&](const Tensor& cache, const Tensor& out) {
      out.for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
        const auto entries = problem.entries(b, h * c.index_heads / c.heads);
        const int64_t key = i < static_cast<int64_t>(entries.size()) ? entries[i] : -1;
        const bool named = key >= 0 && key < problem.used(b) && problem.place(b, key).batch >= 0;
        const auto at = problem.place(b, named ? key : 0);
        ASSERT_EQ(out.get(b, h, i, d), named ? cache.get(at.batch, h, at.row, d) : 0.0);
      });
    };
    compare(problem.caches[0], k_out);
    compare(problem.caches[1], v_out);
  });
}

void check_compact(const Rows& c) {
  const Problem problem(c);
  const bool of_draft = c.num_draft_tokens >= 0;
  std::vector<Tensor> expected = problem.caches;
  std::vector<int32_t> lengths(static_cast<size_t>(c.batch * c.index_heads));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t index_head = h * c.index_heads / c.heads;
      const int64_t first = of_draft ? problem.used(b) - c.num_draft_tokens : 0;
      int64_t to = std::max<int64_t>(first, 0), last = to - 1;
      for (const int64_t entry : problem.entries(b, index_head)) {
        const int64_t key = first + entry;
        const bool named = entry >= 0 && key > last && key < problem.used(b);
        if (!named || problem.place(b, key).batch < 0) continue;
        last = key;
        const auto source = problem.place(b, key), target = problem.place(b, to++);
        for (size_t i = 0; target.batch >= 0 && i < expected.size(); ++i) {
          for (int64_t d = 0; d < expected[i].size(3); ++d) {
            const double moved = expected[i].get(source.batch, h, source.row, d);
            expected[i].set(target.batch, h, target.row, d, moved);
          }
        }
      }
      lengths[static_cast<size_t>(b * c.index_heads + index_head)] = static_cast<int32_t>(to);
    }
  }
  in_every_mode([&] {
    std::vector<Tensor> caches = problem.caches;
    std::vector<TensorView> k, v;
    for (size_t i = 0; i < caches.size(); ++i) (i % 2 == 0 ? k : v).push_back(caches[i].view());
    std::vector<int32_t> got(lengths.size(), -7);
    CompactKVParams params;
    problem.fill(params);
    params.k_cache = k.data();
    params.v_cache = v.data();
    params.num_layers = c.num_layers;
    params.of_draft = of_draft;
    params.num_draft_tokens = std::max<int64_t>(c.num_draft_tokens, 0);
    params.lengths = got.data();
    cuda::run_compact_kv_cuda(params);
    EXPECT_EQ(got, lengths);
    for (size_t i = 0; i < caches.size(); ++i) {
      caches[i].expect_gaps_untouched();
      caches[i].for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
        ASSERT_EQ(caches[i].get(b, h, row, d), expected[i].get(b, h, row, d)) << "row " << row;
      });
    }
  });
}

TEST(gather_kv, rows) {
  Rows c;
  c.dtype = DType::kBFloat16;
  c.num_entries = 150;
  c.seqused_k = {75, 33};
  check_gather(c);
}
TEST(gather_kv, odd_rows_of_one_list) {
  Rows c;
  c.dtype = DType::kFloat16;
  c.layout = Layout::kOdd;
  c.dim = 67;
  c.dim_v = 1;
  c.index_heads = 1;
  c.counts = {40, -3};
  check_gather(c);
}
TEST(gather_kv, wide_rows_in_pages) {
  Rows c;
  c.dtype = DType::kFloat64;
  c.dim = 130;
  c.page_size = 7;
  c.num_entries = 30;
  c.seqused_k = {70, 99};
  c.layout = Layout::kRowsFirst;
  check_gather(c);
}
TEST(compact_kv, rows) {
  Rows c;
  c.dtype = DType::kBFloat16;
  c.seqlen_k = 700;
  c.num_entries = 600;
  c.dim = 8;
  c.dim_v = 3;
  c.counts = {600, 531, 0, 7};
  check_compact(c);
}
TEST(compact_kv, wide_rows_in_slices) {
  Rows c;
  c.dim = 72;
  c.dim_v = 0;
  c.heads = 1;
  c.index_heads = 1;
  c.layout = Layout::kRowsFirst;
  check_compact(c);
}
TEST(compact_kv, odd_rows_in_pages) {
  Rows c;
  c.layout = Layout::kOdd;
  c.page_size = 7;
  c.seqused_k = {60, 77};
  c.index_heads = 1;
  check_compact(c);
}
TEST(compact_kv, more_layers_than_a_launch_takes) {
  Rows c;
  c.dtype = DType::kFloat64;
  c.batch = c.heads = c.index_heads = 1;
  c.seqlen_k = 12;
  c.num_entries = 6;
  c.dim = c.dim_v = 2;
  c.num_layers = 50;
  check_compact(c);
}
TEST(compact_kv, all_stay) {
  Rows c;
  c.all_stay = true;
  check_compact(c);
}
TEST(truncate_kv, a_path) {
  Rows c;
  c.index_heads = 1;
  c.num_entries = 9;
  c.num_draft_tokens = 16;
  c.seqused_k = {75, 11};
  check_compact(c);
}
TEST(truncate_kv, a_chain) {
  Rows c;
  c.index_heads = 1;
  c.chain = true;
  c.num_entries = c.num_draft_tokens = 20;
  c.counts = {8, 20};
  c.seqused_k = {75, 17};
  check_compact(c);
  c.page_size = 7;  // keys of pages that do not exist leave gaps
  c.seqused_k = {17, 77};
  check_compact(c);
}

}  // namespace
}  // namespace longctx::simt_tests
