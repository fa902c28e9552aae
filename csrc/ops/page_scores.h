// page_scores: query tokens and summaries of pages -> a score for each page.
#pragma once
#include "ops/attention_options.h"
#include "ops/pages.h"
#include "ops/score_reduction.h"

namespace longctx {

template <void (*run)(const PageScoresParams&)>
Tensor page_scores(const Tensor& q, const Tensor& summary, const Name& method,
                   const Name& head_reduce, const Name& query_reduce, bool softmax,
                   const OptionalTensor& counts, std::optional<double> softmax_scale,
                   const OptionalTensor& seqused_k, std::optional<int64_t> page_size) {
  const Checker check("page_scores");
  static constexpr const char* kMethods[] = {"dot", "minmax"};
  PageScoresParams params;
  params.dtype = check.floating("q", q);
  check.shape("q", q, "[batch, num_q_heads, seqlen_q, head_dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(q.size(1) > 0, "q", "have at least one head", q.sizes());
  check.require(q.size(3) > 0, "q", "have a head_dim of at least 1", q.sizes());
  check.contiguous_last_dim("q", q);
  params.minmax = enum_named<bool>(check, "method", method, kMethods, "be 'minmax' or 'dot'");
  check.same_device("summary", summary, q);
  check.dtype("summary", summary, q.scalar_type());
  if (params.minmax) {
    check.shape("summary", summary, "[batch, heads, num_pages, 2, head_dim]",
                {q.size(0), kAnySize, kAnySize, 2, q.size(3)});
    check.require(summary.stride(3) == q.size(3), "summary", "be contiguous in its last two dims",
                  Strides{summary});
  } else {
    check.shape("summary", summary, "[batch, heads, num_pages, head_dim]",
                {q.size(0), kAnySize, kAnySize, q.size(3)});
  }
  check.contiguous_last_dim("summary", summary);
  check.require(summary.size(1) > 0 && q.size(1) % summary.size(1) == 0, "summary",
                "have a number of heads that divides the number of heads of `q`",
                Beside{summary.size(1), q.size(1)});
  params.batch = q.size(0);
  params.seqlen_q = q.size(2);
  params.q = view_of(q);
  params.summary = view_of(summary);
  params.num_pages = summary.size(2);
  params.num_q_heads = q.size(1);
  params.summary_heads = summary.size(1);
  params.head_dim = q.size(3);
  params.head_reduce = head_reduce_named(check, head_reduce);
  params.query_reduce = query_reduce_named(check, query_reduce);
  params.softmax = softmax;
  if (counts) {
    check.same_device("counts", *counts, q);
    check.dtype("counts", *counts, ScalarType::Int);
    check.shape("counts", *counts, "[batch, heads, num_pages] of `summary`",
                {q.size(0), summary.size(1), summary.size(2)});
    check.contiguous_last_dim("counts", *counts);
    params.counts = {counts->const_data_ptr<int32_t>(), counts->stride(0), counts->stride(1), 0};
  }
  params.softmax_scale =
      softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  check.require(page_size.has_value() == seqused_k.has_value(), "page_size",
                "be given with `seqused_k`, and only then",
                page_size ? std::to_string(*page_size) : "None");
  if (seqused_k) {
    check.same_device("seqused_k", *seqused_k, q);
    check.dtype("seqused_k", *seqused_k, ScalarType::Int);
    check.shape("seqused_k", *seqused_k, "[batch]", {q.size(0)});
    check.contiguous("seqused_k", *seqused_k);
    params.seqused_k = data_or_null(seqused_k);
    check.require(*page_size >= 1 && *page_size <= kMaxBlock, "page_size", "be in [1, 2^20]",
                  *page_size);
    params.page_size = *page_size;
  }

  const Tensor scores = new_scores(q, params.head_reduce, params.query_reduce, params.summary_heads,
                                   params.num_pages);
  params.scores = scores.mutable_data_ptr<float>();
  run(params);
  return scores;
}

}  // namespace longctx
