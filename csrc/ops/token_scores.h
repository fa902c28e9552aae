// token_scores: q . k of each query token and key, or candidate among the keys.
#pragma once
#include "ops/attention_options.h"
#include "ops/pages.h"
#include "ops/score_reduction.h"

namespace longctx {

template <void (*run)(const TokenScoresParams&)>
Tensor token_scores(const Tensor& q, const Tensor& k, const Name& head_reduce,
                    const Name& query_reduce, const OptionalTensor& candidates,
                    std::optional<double> softmax_scale, double softcap,
                    const OptionalTensor& seqused_k, const OptionalTensor& page_table) {
  const Checker check("token_scores");
  TokenScoresParams params;
  const bool in_pages = page_table.has_value();
  fill_query_key(check, q, k, params, in_pages);
  params.seqs = sequences(check, q, k, std::nullopt, std::nullopt, seqused_k);
  if (in_pages) {
    check.require(seqused_k.has_value(), "seqused_k", "be given with `page_table`", "None");
    params.seqs.seqlen_k = fill_pages(check, q, q.size(0), k, *page_table, params.pages);
  }
  params.head_reduce = head_reduce_named(check, head_reduce);
  params.query_reduce = query_reduce_named(check, query_reduce);
  params.num_scores = params.seqs.seqlen_k;
  if (candidates) {
    check.same_device("candidates", *candidates, q);
    check.dtype("candidates", *candidates, ScalarType::Int);
    check.shape("candidates", *candidates, "[batch, heads, seqlen_q or 1, num_candidates]",
                {q.size(0), kAnySize, kAnySize, kAnySize});
    const int64_t heads = candidates->size(1), rows = candidates->size(2);
    check.require(heads == 1 || heads == k.size(1) || heads == q.size(1), "candidates",
                  "have 1, num_kv_heads or num_q_heads heads", candidates->sizes());
    check.require(rows == 1 || rows == q.size(2), "candidates", "have 1 or seqlen_q rows",
                  candidates->sizes());
    check.contiguous_last_dim("candidates", *candidates);
    // What is reduced must be scores of the same keys.
    check.require(params.query_reduce == QueryReduce::kNone || rows == 1, "candidates",
                  "have one row where `query_reduce` joins tokens", candidates->sizes());
    check.require(params.head_reduce != HeadReduce::kAllSum || heads == 1, "candidates",
                  "have one head where `head_reduce` is 'all_sum'", candidates->sizes());
    check.require(params.head_reduce == HeadReduce::kNone || heads <= k.size(1), "candidates",
                  "have 1 or num_kv_heads heads where `head_reduce` joins the heads of a group",
                  candidates->sizes());
    params.candidates = rows_of<int32_t>(*candidates);
    params.candidate_heads = heads;
    params.candidate_rows = rows;
    params.num_scores = candidates->size(3);
  }
  params.softmax_scale =
      softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  check.finite("softcap", softcap);
  check.require(softcap >= 0, "softcap", "not be negative (0 means none)", softcap);
  params.softcap = softcap;

  const Tensor scores = new_scores(q, params.head_reduce, params.query_reduce, params.num_kv_heads,
                                   params.num_scores);
  params.scores = scores.mutable_data_ptr<float>();
  run(params);
  return scores;
}

}  // namespace longctx
