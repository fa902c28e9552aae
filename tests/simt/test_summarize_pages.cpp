// summarize_pages and update_pages against loops in float64.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/kernels.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Summarize {
  DType dtype = DType::kFloat32;
  SummaryMethod method = SummaryMethod::kMinMax;
  int64_t batch = 2, kv_heads = 2, heads = 2, seqlen_k = 75, dim = 24, page_size = 16;
  Layout layout = Layout::kHeadsFirst;
  std::vector<int32_t> seqused_k;
  int64_t num_representative = 3;
  std::vector<int32_t> starts;  // an update
};

void check(const Summarize& c) {
  std::mt19937 rng(6);
  const bool minmax = c.method == SummaryMethod::kMinMax;
  const int64_t pages = (c.seqlen_k + c.page_size - 1) / c.page_size;
  Tensor k(c.dtype, c.batch, c.kv_heads, c.seqlen_k, c.dim, c.layout);
  Tensor queries(c.dtype, c.batch, c.heads, pages, c.dim, c.layout);
  k.fill_normal(rng);
  queries.fill_normal(rng);
  std::vector<float> scores(static_cast<size_t>(c.batch * c.heads * c.seqlen_k));
  for (float& score : scores) score = static_cast<float>(rng() % 5);
  scores[2] = NAN;

  const auto expected = [&](int64_t b, int64_t h, int64_t page, int64_t d) {
    const int64_t used = c.seqused_k.empty() ? c.seqlen_k : c.seqused_k[b];
    std::vector<int64_t> keys;
    for (int64_t key = page * c.page_size; key < std::min((page + 1) * c.page_size, used); ++key) {
      keys.push_back(key);
    }
    const auto element = [&](int64_t key, int64_t at) {
      return k.get(b, h * c.kv_heads / c.heads, key, at);
    };
    if (minmax) {
      const bool low = d < c.dim;
      double end = low ? kInf : -kInf;
      for (const int64_t key : keys) {
        const double x = element(key, d % c.dim);
        end = low ? std::min(end, x) : std::max(end, x);
      }
      return end;
    }
    if (c.method == SummaryMethod::kRepresentative) {
      const float* own = scores.data() + (b * c.heads + h) * c.seqlen_k;
      const auto rank = [&](int64_t key) { return std::isnan(own[key]) ? -1.0f : own[key]; };
      std::stable_sort(keys.begin(), keys.end(),
                       [&](int64_t x, int64_t y) { return rank(x) > rank(y); });
      keys.resize(std::min(keys.size(), static_cast<size_t>(c.num_representative)));
    }
    double sum = 0, total = 0;
    for (const int64_t key : keys) {
      double logit = 0;
      for (int64_t at = 0; at < c.dim; ++at) {
        logit += 0.7 * queries.get(b, h, page, at) * element(key, at);
      }
      const double weight = c.method == SummaryMethod::kPooled ? std::exp(logit) : 1;
      sum += weight * element(key, d);
      total += weight;
    }
    return total == 0 ? 0 : sum / total;
  };

  in_every_mode([&] {
    Tensor summary(c.dtype, c.batch, c.heads, pages, (minmax ? 2 : 1) * c.dim, c.layout);
    SummarizePagesParams params;
    params.dtype = c.dtype;
    params.method = c.method;
    params.seqs.batch = c.batch;
    params.seqs.seqlen_k = c.seqlen_k;
    params.seqs.seqused_k = data_or_null(c.seqused_k);
    params.k = k.view();
    params.summary = summary.view();
    params.page_size = c.page_size;
    params.num_pages = pages;
    params.heads = c.heads;
    params.num_kv_heads = c.kv_heads;
    params.head_dim = c.dim;
    params.key_scores = {scores.data(), c.heads * c.seqlen_k, c.seqlen_k, 0};
    params.num_representative = c.num_representative;
    params.queries = queries.view();
    params.softmax_scale = 0.7;
    params.update = !c.starts.empty();
    params.starts = data_or_null(c.starts);
    cuda::run_summarize_pages_cuda(params);
    summary.expect_gaps_untouched();
    summary.for_each([&](int64_t b, int64_t h, int64_t page, int64_t d) {
      const double got = summary.get(b, h, page, d);
      if (params.update) {
        const int64_t used = c.seqused_k.empty() ? c.seqlen_k : c.seqused_k[b];
        const int64_t first = c.starts[b] / c.page_size * c.page_size;
        const bool written =
            c.starts[b] < used && page * c.page_size >= first && page * c.page_size < used;
        ASSERT_EQ(std::isnan(got), !written) << "page " << page;
        if (!written) return;
      }
      const double wanted = expected(b, h, page, d);
      expect_close(got, wanted, 2 * unit(c.dtype) * std::fabs(wanted) + 64 * unit(DType::kFloat32),
                   "summary");
    });
  });
}

TEST(summarize_pages, extremes) {
  Summarize c;
  c.dtype = DType::kBFloat16;
  c.seqused_k = {75, 20};
  check(c);
}
TEST(summarize_pages, means_of_odd_rows) {
  Summarize c;
  c.method = SummaryMethod::kMean;
  c.dim = 129;
  c.page_size = 7;
  c.layout = Layout::kOdd;
  check(c);
}
TEST(summarize_pages, representatives) {
  Summarize c;
  c.dtype = DType::kFloat16;
  c.method = SummaryMethod::kRepresentative;
  c.heads = 4;
  c.page_size = 33;
  check(c);
}
TEST(summarize_pages, pooled) {
  Summarize c;
  c.method = SummaryMethod::kPooled;
  c.heads = 4;
  c.seqused_k = {0, 74};
  check(c);
}
TEST(summarize_pages, long_pages) {
  for (const SummaryMethod method : {SummaryMethod::kMinMax, SummaryMethod::kMean,
                                     SummaryMethod::kRepresentative, SummaryMethod::kPooled}) {
    Summarize c;
    c.method = method;
    c.seqlen_k = 300;
    c.page_size = 131;
    c.num_representative = 70;
    c.batch = c.kv_heads = c.heads = 1;
    c.seqused_k = {290};
    check(c);
  }
}
TEST(summarize_pages, update) {
  Summarize c;
  c.page_size = 1;
  c.seqused_k = {75, 40};
  c.starts = {3, 40};
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
