#include <gtest/gtest.h>

#include "cuda/kernels.h"
#include "cuda/merge_splits.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

// Row 2 has no state; row 1 and the last state see nothing of each other, and what they would have
// said is NaN.
void check_merge(DType dtype, int64_t num_states, int64_t rows, int64_t dim, bool override) {
  std::mt19937 rng(7);
  std::normal_distribution<double> normal;
  const DType lse_type = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  Tensor out(dtype, num_states, 1, rows, dim), lse(lse_type, num_states, 1, rows, 1);
  Tensor other_lse(lse_type, num_states, 1, rows, 1);
  out.fill_normal(rng);
  lse.fill_normal(rng);
  other_lse.fill_normal(rng);
  for (int64_t s = 0; s < num_states; ++s) {
    for (int64_t row = 0; row < rows; ++row) {
      if (row != 2 && !(row == 1 && s + 1 == num_states)) continue;
      lse.set(s, 0, row, 0, -kInf);
      other_lse.set(s, 0, row, 0, -kInf);
      for (int64_t d = 0; d < dim; ++d) out.set(s, 0, row, d, kNaN);
    }
  }
  in_every_mode([&] {
    Tensor merged(dtype, 1, 1, rows, dim), merged_lse(lse_type, 1, 1, rows, 1);
    MergeStatesParams params;
    params.dtype = dtype;
    params.out = out.data();
    params.lse = lse.data();
    params.lse_override = override ? other_lse.data() : nullptr;
    params.merged_out = merged.data();
    params.merged_lse = merged_lse.data();
    params.num_states = num_states;
    params.rows = rows;
    params.dim = dim;
    cuda::run_merge_states_cuda(params);

    const Tensor& weights = override ? other_lse : lse;
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t s = 0; s < num_states; ++s) sum += std::exp(weights.get(s, 0, row, 0));
      expect_close(merged_lse.get(0, 0, row, 0), std::log(sum), 16 * unit(lse_type), "lse");
      for (int64_t d = 0; d < dim; ++d) {
        double expected = 0;
        for (int64_t s = 0; s < num_states; ++s) {
          const double weight = std::exp(weights.get(s, 0, row, 0));
          if (weight > 0) expected += weight / sum * out.get(s, 0, row, d);
        }
        expect_close(merged.get(0, 0, row, d), expected,
                     unit(dtype) * std::fabs(expected) + 32 * unit(lse_type), "out");
      }
    }
  });
}

// Split s of row r saw no key where r + s is a multiple of 3, and no split did in row 5.
void check_splits(DType dtype, int64_t num_splits, int64_t dim, Layout layout, bool with_sinks) {
  constexpr int64_t kBatch = 2, kHeads = 3, kRows = 7;
  std::mt19937 rng(9);
  Tensor out(DType::kFloat32, num_splits, kBatch * kHeads, kRows, dim);
  Tensor lse(DType::kFloat32, num_splits, kBatch * kHeads, kRows, 1);
  out.fill_normal(rng);
  lse.fill_normal(rng);
  lse.for_each([&](int64_t s, int64_t map, int64_t row, int64_t) {
    if (row != 5 && (row + s) % 3 != 0) return;
    lse.set(s, map, row, 0, -kInf);
    for (int64_t d = 0; d < dim; ++d) out.set(s, map, row, d, kNaN);
  });
  const std::vector<float> sinks = {-40.0f, 0.5f, 40.0f};
  in_every_mode([&] {
    Tensor merged(dtype, kBatch, kHeads, kRows, dim, layout);
    Tensor merged_lse(DType::kFloat32, kBatch, kHeads, kRows, 1);
    cuda::SplitMerge params;
    params.dtype = dtype;
    params.out = static_cast<const float*>(out.data());
    params.lse = static_cast<const float*>(lse.data());
    params.sinks = with_sinks ? sinks.data() : nullptr;
    params.num_splits = num_splits;
    params.batch = kBatch;
    params.heads = kHeads;
    params.seqlen_q = kRows;
    params.dim_v = dim;
    params.merged_out = merged.view();
    params.merged_lse = static_cast<float*>(merged_lse.data());
    cuda::merge_splits("merge_splits", params);

    merged.expect_gaps_untouched();
    merged_lse.for_each([&](int64_t b, int64_t head, int64_t row, int64_t) {
      const int64_t map = b * kHeads + head;
      double sum = 0;
      for (int64_t s = 0; s < num_splits; ++s) sum += std::exp(lse.get(s, map, row, 0));
      expect_close(merged_lse.get(b, head, row, 0), std::log(sum), 16 * unit(DType::kFloat32),
                   "lse");
      const double denominator = sum + (with_sinks ? std::exp(sinks[head]) : 0);
      for (int64_t d = 0; d < dim; ++d) {
        double expected = 0;
        for (int64_t s = 0; s < num_splits; ++s) {
          const double weight = std::exp(lse.get(s, map, row, 0));
          if (weight > 0) expected += weight / denominator * out.get(s, map, row, d);
        }
        expect_close(merged.get(b, head, row, d), expected,
                     unit(dtype) * std::fabs(expected) + 32 * unit(DType::kFloat32), "out");
      }
    });
  });
}

TEST(merge_states, float32) { check_merge(DType::kFloat32, 3, 9, 64, false); }
TEST(merge_states, float64) { check_merge(DType::kFloat64, 2, 5, 33, false); }
TEST(merge_states, bfloat16) { check_merge(DType::kBFloat16, 4, 6, 128, false); }
TEST(merge_states, float16) { check_merge(DType::kFloat16, 2, 3, 72, true); }
TEST(merge_states, one_state_one_column) { check_merge(DType::kFloat32, 1, 3, 1, false); }
TEST(merge_states, more_states_than_lanes) { check_merge(DType::kBFloat16, 40, 3, 7, false); }
TEST(merge_states, splits) { check_splits(DType::kBFloat16, 4, 128, Layout::kRowsFirst, false); }
TEST(merge_states, splits_with_sinks) {
  check_splits(DType::kFloat16, 3, 64, Layout::kHeadsFirst, true);
}
TEST(merge_states, splits_into_odd_strides) {
  check_splits(DType::kBFloat16, 5, 40, Layout::kOdd, true);
}
TEST(merge_states, splits_with_odd_columns) {
  check_splits(DType::kFloat32, 2, 193, Layout::kRowsFirst, true);
}
TEST(merge_states, nothing) { check_merge(DType::kFloat32, 2, 0, 8, false); }

}  // namespace
}  // namespace longctx::simt_tests
