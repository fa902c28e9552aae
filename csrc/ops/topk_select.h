// topk_select: scores -> the indices of the k best of each row.
#pragma once
#include "ops/score_rows.h"

namespace longctx {

template <void (*run)(const TopKSelectParams&)>
std::tuple<Tensor, Tensor> topk_select(const Tensor& scores, int64_t k,
                                       const OptionalTensor& lengths, int64_t num_first,
                                       int64_t num_last) {
  const Checker check("topk_select");
  TopKSelectParams params;
  params.scores = score_rows(check, scores, lengths);
  check_forced(check, "k", k, params.scores.n, num_first, num_last);
  params.k = k;
  params.num_first = num_first;
  params.num_last = num_last;

  const OptionalTensor row_lengths = contiguous_or_none(lengths);
  if (row_lengths) params.scores.lengths = row_lengths->const_data_ptr<int32_t>();
  const auto [indices, counts] = new_index_rows(scores, k);
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  run(params);
  return {indices, counts};
}

}  // namespace longctx
