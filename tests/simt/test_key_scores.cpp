// page_scores and token_scores against loops in float64.
#include <gtest/gtest.h>

#include <functional>

#include "cuda/kernels.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Score {
  DType dtype = DType::kFloat32;
  int64_t batch = 2, q_heads = 4, heads = 2, seqlen_q = 2, n = 70, dim = 40;
  Layout layout = Layout::kHeadsFirst;
  HeadReduce head_reduce = HeadReduce::kNone;
  QueryReduce query_reduce = QueryReduce::kNone;
  bool softmax = false;         // of pages
  bool with_counts = false;     // of pages
  bool candidates = false;      // of keys: of each query head and token its own
  int64_t cache_page_size = 0;  // of keys
  std::vector<int32_t> seqused_k;
  int64_t page_size = 4;  // of pages, with seqused_k
  double softcap = 0.0;   // of keys
};

// [batch][query head][token][n] -> the reduced scores; NaN stands for what a token does not see.
using Each = std::function<double(int64_t, int64_t, int64_t, int64_t)>;

void expect_scores(const Score& c, const Each& each, const std::vector<float>& got) {
  const bool none = c.head_reduce == HeadReduce::kNone, all = c.head_reduce == HeadReduce::kAllSum;
  const int64_t out_heads = none ? c.q_heads : all ? 1 : c.heads;
  const int64_t group = c.q_heads / out_heads;
  const int64_t out_rows = c.query_reduce == QueryReduce::kNone ? c.seqlen_q : 1;
  const double tolerance = 32 * unit(DType::kFloat32) * static_cast<double>(c.dim);
  size_t at = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < out_heads; ++h) {
      for (int64_t row = 0; row < out_rows; ++row) {
        for (int64_t n = 0; n < c.n; ++n) {
          double sum = 0, highest = -kInf;
          int64_t seen = 0;
          for (int64_t i = row; i < row + c.seqlen_q / out_rows; ++i) {
            double heads_sum = 0, heads_highest = -kInf;
            for (int64_t g = 0; g < group; ++g) {
              const double own = each(b, h * group + g, i, n);
              heads_sum += own;
              heads_highest = std::max(heads_highest, own);
            }
            if (std::isnan(heads_sum)) continue;
            if (c.head_reduce == HeadReduce::kGroupMean) heads_sum /= static_cast<double>(group);
            const double own = c.head_reduce == HeadReduce::kGroupMax ? heads_highest : heads_sum;
            ++seen;
            sum += own;
            highest = std::max(highest, own);
          }
          double expected = c.query_reduce == QueryReduce::kMax ? highest : sum;
          if (c.query_reduce == QueryReduce::kMean) expected /= static_cast<double>(seen);
          if (seen == 0) expected = -kInf;
          expect_close(got[at++], expected, tolerance * (1 + std::fabs(expected)), "score");
        }
      }
    }
  }
}

template <class Params>
std::vector<float> output(const Score& c, Params& params) {
  params.head_reduce = c.head_reduce;
  params.query_reduce = c.query_reduce;
  params.num_q_heads = c.q_heads;
  params.head_dim = c.dim;
  params.dtype = c.dtype;
  const int64_t out_heads = c.head_reduce == HeadReduce::kNone     ? c.q_heads
                            : c.head_reduce == HeadReduce::kAllSum ? 1
                                                                   : c.heads;
  const int64_t rows = c.query_reduce == QueryReduce::kNone ? c.seqlen_q : 1;
  std::vector<float> scores(static_cast<size_t>(c.batch * out_heads * rows * c.n), NAN);
  params.scores = scores.data();
  return scores;
}

void check_pages(const Score& c, bool minmax) {
  std::mt19937 rng(3);
  Tensor q(c.dtype, c.batch, c.q_heads, c.seqlen_q, c.dim, c.layout);
  Tensor summary(c.dtype, c.batch, c.heads, c.n, (minmax ? 2 : 1) * c.dim, c.layout);
  q.fill_normal(rng);
  summary.fill_normal(rng);
  std::vector<int32_t> counts(static_cast<size_t>(c.batch * c.heads * c.n), 1);
  if (c.with_counts) {
    for (int32_t& count : counts) count = static_cast<int32_t>(rng() % 4);
  }
  summary.for_each([&](int64_t b, int64_t h, int64_t page, int64_t d) {
    if (!minmax || d >= c.dim) return;
    const double x = summary.get(b, h, page, d), y = summary.get(b, h, page, d + c.dim);
    const bool empty = page == 5;
    summary.set(b, h, page, d, empty ? kInf : std::min(x, y));
    summary.set(b, h, page, d + c.dim, empty ? -kInf : std::max(x, y));
  });
  const double scale = 0.5;
  const auto group = c.q_heads / c.heads;
  const auto logit = [&](int64_t b, int64_t h, int64_t i, int64_t n) {
    const int64_t used = c.seqused_k.empty() ? 0 : c.seqused_k[b];
    const bool hidden = !c.seqused_k.empty() && n * c.page_size > used - c.seqlen_q + i;
    if (hidden || counts[(b * c.heads + h / group) * c.n + n] == 0) return kNaN;
    if (minmax && summary.get(b, h / group, n, 0) == kInf) return kNaN;
    double sum = 0;
    for (int64_t d = 0; d < c.dim; ++d) {
      const double x = scale * q.get(b, h, i, d), low = x * summary.get(b, h / group, n, d);
      sum += minmax ? std::max(low, x * summary.get(b, h / group, n, d + c.dim)) : low;
    }
    return sum;
  };
  const auto weight = [&](int64_t b, int64_t h, int64_t i, int64_t n) {
    double sum = 0;
    for (int64_t j = 0; j < c.n; ++j) {
      const double other = logit(b, h, i, j);
      if (!std::isnan(other)) sum += counts[(b * c.heads + h / group) * c.n + j] * std::exp(other);
    }
    return std::exp(logit(b, h, i, n)) / sum;
  };
  in_every_mode([&] {
    PageScoresParams params;
    std::vector<float> scores = output(c, params);
    params.batch = c.batch;
    params.seqlen_q = c.seqlen_q;
    params.q = q.view();
    params.summary = summary.view();
    params.minmax = minmax;
    params.num_pages = c.n;
    params.summary_heads = c.heads;
    params.softmax_scale = scale;
    params.softmax = c.softmax;
    if (c.with_counts) params.counts = {counts.data(), c.heads * c.n, c.n, 0};
    params.seqused_k = data_or_null(c.seqused_k);
    params.page_size = c.seqused_k.empty() ? 0 : c.page_size;
    cuda::run_page_scores_cuda(params);
    expect_scores(c, c.softmax ? Each(weight) : Each(logit), scores);
  });
}

void check_tokens(const Score& c) {
  std::mt19937 rng(4);
  const int64_t seqlen_k = 90, size = c.cache_page_size;
  const int64_t pages = size == 0 ? 0 : (seqlen_k + size - 1) / size;
  Tensor q(c.dtype, c.batch, c.q_heads, c.seqlen_q, c.dim, c.layout);
  Tensor k(c.dtype, size == 0 ? c.batch : c.batch * pages, c.heads, size == 0 ? seqlen_k : size,
           c.dim, c.layout);
  q.fill_normal(rng);
  k.fill_normal(rng);
  // Pages in reverse, and one that does not exist.
  std::vector<int32_t> table(static_cast<size_t>(c.batch * pages));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - 1 - i);
  if (!table.empty()) table[1] = static_cast<int32_t>(table.size());
  std::vector<int32_t> candidates(static_cast<size_t>(c.batch * c.q_heads * c.seqlen_q * c.n));
  for (int32_t& key : candidates) key = static_cast<int32_t>(rng() % (seqlen_k + 8)) - 4;
  const auto group = c.q_heads / c.heads;
  const auto logit = [&](int64_t b, int64_t h, int64_t i, int64_t n) {
    const int64_t used = c.seqused_k.empty() ? seqlen_k : c.seqused_k[b];
    int64_t key = n;
    if (c.candidates) key = candidates[((b * c.q_heads + h) * c.seqlen_q + i) * c.n + n];
    if (key < 0 || key >= used || key > used - c.seqlen_q + i) return kNaN;
    const int64_t page = size == 0 ? b : table[b * pages + key / size];
    if (size > 0 && page == c.batch * pages) return kNaN;
    double sum = 0;
    for (int64_t d = 0; d < c.dim; ++d) {
      sum += 0.25 * q.get(b, h, i, d) * k.get(page, h / group, size == 0 ? key : key % size, d);
    }
    return c.softcap > 0 ? c.softcap * std::tanh(sum / c.softcap) : sum;
  };
  in_every_mode([&] {
    TokenScoresParams params;
    std::vector<float> scores = output(c, params);
    params.seqs.batch = c.batch;
    params.seqs.seqlen_q = c.seqlen_q;
    params.seqs.seqlen_k = size == 0 ? seqlen_k : pages * size;
    params.seqs.seqused_k = data_or_null(c.seqused_k);
    params.q = q.view();
    params.k = k.view();
    if (size > 0) params.pages = {table.data(), pages, c.batch * pages, size};
    if (c.candidates) {
      params.candidates = {candidates.data(), c.q_heads * c.seqlen_q * c.n, c.seqlen_q * c.n, c.n};
      params.candidate_heads = c.q_heads;
      params.candidate_rows = c.seqlen_q;
    }
    params.num_scores = c.n;
    params.num_kv_heads = c.heads;
    params.softmax_scale = 0.25;
    params.softcap = c.softcap;
    cuda::run_token_scores_cuda(params);
    expect_scores(c, logit, scores);
  });
}

TEST(key_scores, bounds_of_pages_by_group) {
  Score c;
  c.dtype = DType::kBFloat16;
  c.head_reduce = HeadReduce::kGroupMax;
  check_pages(c, true);
}
TEST(key_scores, more_rows_than_a_block_has) {
  Score c;
  c.batch = 1;
  c.seqlen_q = 5;
  c.layout = Layout::kOdd;
  c.head_reduce = HeadReduce::kGroupMean;
  c.query_reduce = QueryReduce::kMax;
  c.seqused_k = {30};
  check_pages(c, true);
}
TEST(key_scores, shares_of_a_softmax) {
  Score c;
  c.dtype = DType::kFloat16;
  c.dim = 8;
  c.softmax = c.with_counts = true;
  c.head_reduce = HeadReduce::kAllSum;
  c.query_reduce = QueryReduce::kMean;
  c.seqused_k = {200, 1};
  check_pages(c, false);
}
TEST(key_scores, keys) {
  Score c;
  c.n = 90;
  c.softcap = 1.5;
  c.query_reduce = QueryReduce::kMean;
  c.seqused_k = {90, 1};
  check_tokens(c);
}
TEST(key_scores, candidates_in_pages) {
  Score c;
  c.dtype = DType::kBFloat16;
  c.candidates = true;
  c.cache_page_size = 7;
  c.seqused_k = {90, 33};
  c.layout = Layout::kOdd;
  check_tokens(c);
}

}  // namespace
}  // namespace longctx::simt_tests
