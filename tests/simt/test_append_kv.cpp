// append_kv against loops over rows, its summary against update_pages of what it wrote.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/kernels.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Append {
  DType dtype = DType::kFloat32;
  int64_t batch = 2, heads = 2, seqlen_k = 75, num_new = 20, dim = 24, dim_v = 40;
  Layout layout = Layout::kHeadsFirst, new_layout = Layout::kRowsFirst;
  std::vector<int32_t> starts = {3, 62}, counts;
  int64_t page_size = 0;  // of a summary; 0: none
  SummaryMethod method = SummaryMethod::kMinMax;
  std::vector<int32_t> page_table;  // [batch, max_pages] of 16 keys
  int64_t num_pages = 8;
};

void check(const Append& c) {
  std::mt19937 rng(9);
  const bool paged = !c.page_table.empty();
  const int64_t max_pages = static_cast<int64_t>(c.page_table.size()) / c.batch;
  const int64_t room = paged ? 16 * max_pages : c.seqlen_k;
  const int64_t entries = paged ? c.num_pages : c.batch, rows = paged ? 16 : c.seqlen_k;
  Tensor k_before(c.dtype, entries, c.heads, rows, c.dim, c.layout);
  Tensor v_before(c.dtype, entries, c.heads, rows, c.dim_v, c.layout);
  Tensor k(c.dtype, c.batch, c.heads, c.num_new, c.dim, c.new_layout);
  Tensor v(c.dtype, c.batch, c.heads, c.num_new, c.dim_v, c.new_layout);
  for (Tensor* tensor : {&k_before, &v_before, &k, &v}) tensor->fill_normal(rng);

  Tensor k_after = k_before, v_after = v_before;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < (c.counts.empty() ? c.num_new : c.counts[b]); ++i) {
      const int64_t key = c.starts[b] + i;
      if (key < 0 || key >= room) continue;
      const int64_t entry = paged ? c.page_table[b * max_pages + key / 16] : b;
      if (entry < 0 || entry >= entries) continue;
      const int64_t row = paged ? key % 16 : key;
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t d = 0; d < c.dim; ++d) k_after.set(entry, h, row, d, k.get(b, h, i, d));
        for (int64_t d = 0; d < c.dim_v; ++d) v_after.set(entry, h, row, d, v.get(b, h, i, d));
      }
    }
  }

  in_every_mode([&] {
    Tensor k_cache = k_before, v_cache = v_before;
    std::vector<int32_t> lengths(static_cast<size_t>(c.batch), -7);
    AppendKVParams params;
    params.dtype = c.dtype;
    params.batch = c.batch;
    params.seqlen_k = room;
    params.num_entries = c.num_new;
    params.num_kv_heads = c.heads;
    params.head_dim = c.dim;
    params.head_dim_v = c.dim_v;
    params.k_cache = k_cache.view();
    params.v_cache = v_cache.view();
    params.k = k.view();
    params.v = v.view();
    params.starts = c.starts.data();
    params.counts = {data_or_null(c.counts), 1, 0, 0};
    params.lengths = lengths.data();
    if (paged) params.pages = {c.page_table.data(), max_pages, c.num_pages, 16};
    SummarizePagesParams& update = params.summary;
    update.dtype = c.dtype;
    update.method = c.method;
    update.seqs.batch = c.batch;
    update.seqs.seqlen_k = room;
    update.seqs.seqused_k = lengths.data();
    update.k = params.k_cache;
    update.pages = params.pages;
    update.page_size = std::max<int64_t>(c.page_size, 1);
    update.num_pages = (room + update.page_size - 1) / update.page_size;
    update.heads = update.num_kv_heads = c.heads;
    update.head_dim = c.dim;
    update.update = true;
    update.starts = c.starts.data();
    const int64_t row = (c.method == SummaryMethod::kMinMax ? 2 : 1) * c.dim;
    Tensor summary(c.dtype, c.batch, c.heads, update.num_pages, row, c.layout), expected = summary;
    update.summary = summary.view();
    params.has_summary = c.page_size > 0;
    cuda::run_append_kv_cuda(params);

    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t count = c.counts.empty() ? c.num_new : c.counts[b];
      EXPECT_EQ(lengths[b], std::clamp<int64_t>(c.starts[b] + count, 0, room));
    }
    const auto expect_same = [](const Tensor& got, const Tensor& wanted, const char* what) {
      got.expect_gaps_untouched();
      got.for_each([&](int64_t b, int64_t h, int64_t at, int64_t d) {
        expect_close(got.get(b, h, at, d), wanted.get(b, h, at, d), 0, what);
      });
    };
    expect_same(k_cache, k_after, "k_cache");
    expect_same(v_cache, v_after, "v_cache");
    if (!params.has_summary) return;
    update.summary = expected.view();
    cuda::run_summarize_pages_cuda(update);
    expect_same(summary, expected, "summary");
  });
}

TEST(append_kv, odd_rows_without_a_summary) {
  Append c;
  c.dim = 7;
  c.dim_v = 33;
  c.layout = Layout::kOdd;
  c.counts = {20, 5};
  check(c);
}
TEST(append_kv, extremes) {
  Append c;
  c.dtype = DType::kBFloat16;
  c.page_size = 16;
  c.counts = {0, 13};
  check(c);
}
TEST(append_kv, one_token) {
  Append c;
  c.dtype = DType::kFloat16;
  c.num_new = 1;
  c.dim = c.dim_v = 128;
  c.starts = {15, 74};
  c.page_size = 16;
  check(c);
}
TEST(append_kv, means_of_pages_of_a_cache_in_pages) {
  Append c;
  c.num_new = 50;
  c.dim = 129;
  c.new_layout = Layout::kOdd;
  c.page_size = 7;
  c.method = SummaryMethod::kMean;
  c.page_table = {4, 7, -1, 1, 0, 3, 8, 2};
  c.starts = {11, 30};
  check(c);
}
TEST(append_kv, over_both_ends) {
  Append c;
  c.page_size = 1;
  c.starts = {-5, 70};
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
