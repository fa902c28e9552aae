// topk_select and threshold_select against sorted lists. Which indices are chosen is exact: no
// tolerance.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cuda/kernels.h"
#include "longctx/logit_mass.h"  // whose formula the Python tests compare; here its sums and cuts
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

enum class Values { kRandom, kConstant, kFew, kSpecial };
enum class Rule { kTopK, kThreshold, kCumulative };

struct Select {
  DType dtype = DType::kFloat32;
  int64_t rows = 3, n = 100, k = 10;
  std::vector<int32_t> lengths;
  int64_t num_first = 0, num_last = 0;
  Rule rule = Rule::kTopK;
  float value = 0.0f;
  Values values = Values::kRandom;
  Layout layout = Layout::kHeadsFirst;
};

double value_of(const Select& c, std::mt19937& rng) {
  constexpr double kSpecials[] = {kNaN, kInf, -kInf, 0.0, -0.0, 1e-41, -1e-41, 2.0};
  switch (c.values) {
    case Values::kRandom:
      return std::normal_distribution<double>()(rng);
    case Values::kConstant:
      return -0.3;
    case Values::kFew:
      return static_cast<double>(rng() % 4) - 2;
    case Values::kSpecial:
      return kSpecials[rng() % 8];
  }
  return 0;
}

// ceil(share * total), as mass_target() has it.
int64_t share_of(float share, int64_t total) {
  const double clamped = std::clamp(share, 0.0f, 1.0f);
  return std::min(total, static_cast<int64_t>(std::ceil(clamped * static_cast<double>(total))));
}

std::vector<int64_t> expected_row(const Select& c, const std::vector<double>& row) {
  const auto length = static_cast<int64_t>(row.size());
  const int64_t first = std::min(c.num_first, length);
  const int64_t last = std::max(first, length - c.num_last);
  std::vector<int64_t> competing(static_cast<size_t>(last - first));
  std::iota(competing.begin(), competing.end(), first);
  const auto rank = [&](int64_t i) { return std::isnan(row[i]) ? -kInf : row[i]; };
  std::stable_sort(competing.begin(), competing.end(), [&](int64_t a, int64_t b) {
    if (std::isnan(row[a]) != std::isnan(row[b])) return std::isnan(row[b]);
    return rank(a) > rank(b);
  });
  const int64_t places = c.k - first - (length - last);
  competing.resize(std::min(competing.size(), static_cast<size_t>(places)));
  const auto drop_while = [&](const auto& drop) {
    while (!competing.empty() && drop(row[competing.back()])) competing.pop_back();
  };
  if (c.rule == Rule::kThreshold) drop_while([&](double score) { return !(score >= c.value); });
  if (c.rule == Rule::kCumulative) {
    drop_while([](double score) { return !(score > -kInf); });
    float best = -std::numeric_limits<float>::infinity();
    for (const double score : row) best = std::max(best, static_cast<float>(score));
    const int shift = logit_mass_shift(length);
    const auto mass = [&](int64_t i) {
      return logit_mass(static_cast<float>(row[i]), best, shift);
    };
    int64_t total = 0, reached = 0;
    for (int64_t i = 0; i < length; ++i) {
      total += mass(i);
      if (i < first || i >= last) reached += mass(i);
    }
    size_t kept = 0;
    for (; kept < competing.size() && reached < share_of(c.value, total); ++kept) {
      reached += mass(competing[kept]);
    }
    competing.resize(kept);
  }
  std::sort(competing.begin(), competing.end());
  std::vector<int64_t> chosen(static_cast<size_t>(first));
  std::iota(chosen.begin(), chosen.end(), 0);
  chosen.insert(chosen.end(), competing.begin(), competing.end());
  for (int64_t i = last; i < length; ++i) chosen.push_back(i);
  return chosen;
}

void check(const Select& c) {
  std::mt19937 rng(5);
  Tensor scores(c.dtype, 1, 1, c.rows, c.n, c.layout);
  scores.for_each([&](int64_t b, int64_t h, int64_t row, int64_t i) {
    scores.set(b, h, row, i, value_of(c, rng));
  });
  ThresholdSelectParams params;
  params.scores.dtype = c.dtype;
  params.scores.n = c.n;
  params.scores.num_rows = params.scores.sizes[0] = c.rows;
  params.scores.num_dims = 1;
  params.scores.strides[0] = scores.view().seq_stride;
  params.scores.data = scores.view().data;
  params.scores.lengths = data_or_null(c.lengths);
  params.k = c.k;
  params.num_first = c.num_first;
  params.num_last = c.num_last;
  params.cumulative = c.rule == Rule::kCumulative;
  params.value = c.value;

  std::vector<std::vector<int64_t>> expected;
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t length = c.lengths.empty() ? c.n : std::clamp<int64_t>(c.lengths[r], 0, c.n);
    std::vector<double> row;
    for (int64_t i = 0; i < length; ++i) row.push_back(scores.get(0, 0, r, i));
    expected.push_back(expected_row(c, row));
  }
  in_every_mode([&] {
    std::vector<int32_t> indices(static_cast<size_t>(c.rows * c.k), -7), counts(c.rows, -7);
    params.indices = indices.data();
    params.counts = counts.data();
    if (c.rule == Rule::kTopK) {
      cuda::run_topk_select_cuda(params);
    } else {
      cuda::run_threshold_select_cuda(params);
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      std::vector<int64_t> padded = expected[r];
      padded.resize(static_cast<size_t>(c.k), -1);
      EXPECT_EQ(counts[r], static_cast<int32_t>(expected[r].size())) << "row " << r;
      const auto row = indices.begin() + r * c.k;
      const auto [got, wanted] = std::mismatch(row, row + c.k, padded.begin());
      if (wanted == padded.end()) continue;
      ADD_FAILURE() << "row " << r << ": index " << got - row << " is " << *got << " instead of "
                    << *wanted;
    }
  });
}

// ---- a block of threads per row ----

TEST(topk_select, few_scores) { check({}); }
TEST(topk_select, several_warps) {
  Select c;
  c.dtype = DType::kFloat16;
  c.n = 777;
  c.k = 300;
  c.layout = Layout::kOdd;
  c.values = Values::kSpecial;
  check(c);
}
TEST(topk_select, more_scores_than_loads_under_way) {
  Select c;
  c.rows = 1;
  c.n = 9001;
  c.k = 4096;
  c.values = Values::kFew;
  c.num_last = 100;
  check(c);
}
TEST(topk_select, lengths_and_forced) {
  Select c;
  c.dtype = DType::kBFloat16;
  c.rows = 7;
  c.lengths = {0, 1, 3, 9, 10, 100, -4};
  c.num_first = 2;
  c.num_last = 3;
  check(c);
}
TEST(topk_select, more_places_than_scores) {
  Select c;
  c.k = 130;
  c.values = Values::kSpecial;
  check(c);
}
TEST(topk_select, threshold) {
  Select c;
  c.rule = Rule::kThreshold;
  c.value = 1.2f;
  c.k = 20;
  c.num_first = 1;
  check(c);
}
TEST(topk_select, cumulative) {
  Select c;
  c.dtype = DType::kBFloat16;
  c.rule = Rule::kCumulative;
  c.value = 0.7f;
  c.n = 300;
  c.k = 200;
  c.num_first = 3;
  c.num_last = 40;
  check(c);
  c.k = 60;  // too few
  check(c);
  c.num_last = 0;
  c.values = Values::kSpecial;
  check(c);
}
TEST(topk_select, nothing) {
  Select c;
  c.rows = 0;
  check(c);
  c.rows = 3;
  c.n = 0;
  check(c);
  c.n = 50;
  c.k = 0;
  check(c);
}

// ---- several blocks of threads per row ----

Select long_rows(DType dtype, int64_t n) {
  Select c;
  c.dtype = dtype;
  c.rows = 2;
  c.n = n;
  c.k = 700;
  return c;
}

TEST(topk_select, slices) {
  Select c = long_rows(DType::kFloat32, 20001);
  c.num_first = 4;
  c.num_last = 6000;
  c.k = 7000;
  check(c);
}
// Rows of which some slices have nothing, or only what is forced.
TEST(topk_select, slices_of_short_rows) {
  Select c = long_rows(DType::kBFloat16, 40000);
  c.rows = 4;
  c.lengths = {0, 9000, 40000, 21000};
  c.num_last = 600;
  c.layout = Layout::kOdd;
  check(c);
}
TEST(topk_select, ties_across_slices) {
  Select c = long_rows(DType::kFloat32, 17000);
  c.rows = 1;
  c.k = 16000;
  c.values = Values::kConstant;
  check(c);
}
TEST(topk_select, slices_below_a_threshold) {
  Select c = long_rows(DType::kFloat16, 33000);
  c.rule = Rule::kThreshold;
  c.value = 2.5f;
  check(c);
}
TEST(topk_select, slices_with_masses) {
  Select c = long_rows(DType::kFloat32, 17000);
  c.rule = Rule::kCumulative;
  c.value = 0.1f;
  c.num_first = 5000;
  c.k = 5600;
  check(c);
}
TEST(topk_select, slices_with_few_masses) {
  Select c = long_rows(DType::kBFloat16, 33000);
  c.rows = 1;
  c.rule = Rule::kCumulative;
  c.value = 0.3f;
  c.k = 20000;
  c.values = Values::kFew;
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
