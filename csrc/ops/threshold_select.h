// threshold_select: scores -> the indices of those above a threshold, or of the fewest that hold a
// share of the softmax; at most max_k of each row.
#pragma once
#include "ops/block_map.h"
#include "ops/score_rows.h"

namespace longctx {

template <void (*run)(const ThresholdSelectParams&)>
std::tuple<Tensor, Tensor> threshold_select(const Tensor& scores, double value, int64_t max_k,
                                            const Name& method, const OptionalTensor& lengths,
                                            int64_t num_first, int64_t num_last) {
  const Checker check("threshold_select");
  static constexpr const char* kMethods[] = {"threshold", "cumulative"};
  ThresholdSelectParams params;
  params.scores = score_rows(check, scores, lengths);
  params.cumulative =
      enum_named<bool>(check, "method", method, kMethods, "be 'threshold' or 'cumulative'");
  check.require(!std::isnan(value), "value", "not be NaN", value);
  params.value = static_cast<float>(value);
  check_forced(check, "max_k", max_k, params.scores.n, num_first, num_last);
  params.k = max_k;
  params.num_first = num_first;
  params.num_last = num_last;

  const OptionalTensor row_lengths = contiguous_or_none(lengths);
  if (row_lengths) params.scores.lengths = row_lengths->const_data_ptr<int32_t>();
  const auto [indices, counts] = new_index_rows(scores, max_k);
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  run(params);
  return {indices, counts};
}

}  // namespace longctx
