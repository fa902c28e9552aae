// summarize_pages: one or two rows that stand for the keys of a page; update_pages: the same for
// the pages that new keys fall into.
#pragma once
#include <algorithm>

#include "ops/attention_options.h"
#include "ops/block_map.h"
#include "ops/pages.h"

namespace longctx {

struct SummaryOptions {
  const Name& method;
  const OptionalTensor& key_scores;
  int64_t num_representative;
  const OptionalTensor& queries;
  std::optional<double> softmax_scale;
  const OptionalTensor& seqused_k;
  const OptionalTensor& page_table;
};

// Everything but the summary and its strides.
inline SummarizePagesParams summary_params(const Checker& check, const Tensor& k, int64_t page_size,
                                           const SummaryOptions& options) {
  static constexpr const char* kMethods[] = {"minmax", "mean", "representative", "pooled"};
  SummarizePagesParams params;
  const bool in_pages = options.page_table.has_value();
  params.dtype = check.floating("k", k);
  check.shape("k", k,
              in_pages ? "[num_pages, num_kv_heads, page_size, head_dim]"
                       : "[batch, num_kv_heads, seqlen_k, head_dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(k.size(1) > 0, "k", "have at least one head", k.sizes());
  check.require(k.size(3) > 0, "k", "have a head_dim of at least 1", k.sizes());
  check.contiguous_last_dim("k", k);
  params.method = enum_named<SummaryMethod>(check, "method", options.method, kMethods,
                                            "be 'minmax', 'mean', 'representative' or 'pooled'");
  check.require(page_size >= 1 && page_size <= kMaxBlock, "page_size", "be in [1, 2^20]",
                page_size);
  params.page_size = page_size;
  params.k = view_of(k);
  params.num_kv_heads = params.heads = k.size(1);
  params.head_dim = k.size(3);
  params.seqs.batch = k.size(0);
  params.seqs.seqlen_k = k.size(2);
  if (in_pages) {
    check.require(options.seqused_k.has_value(), "seqused_k", "be given with `page_table`", "None");
    params.seqs.seqlen_k = fill_pages(check, k, kAnySize, k, *options.page_table, params.pages);
    params.seqs.batch = options.page_table->size(0);
  }
  if (options.seqused_k) {
    check.same_device("seqused_k", *options.seqused_k, k);
    check.dtype("seqused_k", *options.seqused_k, ScalarType::Int);
    check.shape("seqused_k", *options.seqused_k, "[batch]", {params.seqs.batch});
    check.contiguous("seqused_k", *options.seqused_k);
    params.seqs.seqused_k = data_or_null(options.seqused_k);
  }
  params.num_pages = (params.seqs.seqlen_k + page_size - 1) / page_size;

  const bool by_score = params.method == SummaryMethod::kRepresentative;
  const bool pooled = params.method == SummaryMethod::kPooled;
  const auto heads_of = [&](const char* name, const Tensor& tensor) {
    check.require(tensor.size(1) > 0 && tensor.size(1) % k.size(1) == 0, name,
                  "have a number of heads that is a multiple of that of `k`",
                  Beside{tensor.size(1), k.size(1)});
    params.heads = tensor.size(1);
  };
  check.require(options.key_scores.has_value() == by_score, "key_scores",
                "be given with method 'representative', and only then",
                options.key_scores ? "a tensor" : "None");
  check.require(options.queries.has_value() == pooled, "queries",
                "be given with method 'pooled', and only then",
                options.queries ? "a tensor" : "None");
  if (by_score) {
    const Tensor& scores = *options.key_scores;
    check.same_device("key_scores", scores, k);
    check.dtype("key_scores", scores, ScalarType::Float);
    check.shape("key_scores", scores, "[batch, heads, seqlen_k]",
                {params.seqs.batch, kAnySize, params.seqs.seqlen_k});
    heads_of("key_scores", scores);
    check.contiguous_last_dim("key_scores", scores);
    params.key_scores = {scores.const_data_ptr<float>(), scores.stride(0), scores.stride(1), 0};
  }
  check.require(options.num_representative >= 1, "num_representative", "be at least 1",
                options.num_representative);
  params.num_representative = options.num_representative;
  if (pooled) {
    const Tensor& queries = *options.queries;
    check.same_device("queries", queries, k);
    check.dtype("queries", queries, k.scalar_type());
    check.shape("queries", queries, "[batch, heads, num_pages, head_dim]",
                {params.seqs.batch, kAnySize, params.num_pages, params.head_dim});
    heads_of("queries", queries);
    check.contiguous_last_dim("queries", queries);
    params.queries = view_of(queries);
  }
  params.softmax_scale =
      options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  return params;
}

template <void (*run)(const SummarizePagesParams&)>
Tensor summarize_pages(const Tensor& k, int64_t page_size, const Name& method,
                       const OptionalTensor& key_scores, int64_t num_representative,
                       const OptionalTensor& queries, std::optional<double> softmax_scale,
                       const OptionalTensor& seqused_k, const OptionalTensor& page_table) {
  const Checker check("summarize_pages");
  SummarizePagesParams params = summary_params(
      check, k, page_size,
      {method, key_scores, num_representative, queries, softmax_scale, seqused_k, page_table});
  const int64_t batch = params.seqs.batch;
  const Tensor summary =
      params.method == SummaryMethod::kMinMax
          ? new_tensor(k, {batch, params.heads, params.num_pages, 2, params.head_dim})
          : new_tensor(k, {batch, params.heads, params.num_pages, params.head_dim});
  params.summary = view_of(summary);
  run(params);
  return summary;
}

// A summary, of the pages of `params` and perhaps more, as an argument. The extremes of a page are
// adjacent.
inline TensorView summary_view(const Checker& check, const Tensor& summary, const Tensor& k,
                               const SummarizePagesParams& params) {
  check.same_device("summary", summary, k);
  check.dtype("summary", summary, k.scalar_type());
  if (params.method == SummaryMethod::kMinMax) {
    check.shape("summary", summary, "[batch, heads, num_pages, 2, head_dim]",
                {params.seqs.batch, params.heads, kAnySize, 2, params.head_dim});
    check.require(summary.stride(3) == params.head_dim, "summary",
                  "be contiguous in its last two dims", Strides{summary});
  } else {
    check.shape("summary", summary, "[batch, heads, num_pages, head_dim]",
                {params.seqs.batch, params.heads, kAnySize, params.head_dim});
  }
  check.contiguous_last_dim("summary", summary);
  check.require(
      summary.size(2) >= params.num_pages, "summary", "have a row for every page of `k`",
      std::to_string(summary.size(2)) + " rows for " + std::to_string(params.num_pages) + " pages");
  return view_of(summary);
}

template <void (*run)(const SummarizePagesParams&)>
void update_pages(const Tensor& summary, const Tensor& k, int64_t start,
                  const OptionalTensor& starts, int64_t page_size, const Name& method,
                  const OptionalTensor& key_scores, int64_t num_representative,
                  const OptionalTensor& queries, std::optional<double> softmax_scale,
                  const OptionalTensor& seqused_k, const OptionalTensor& page_table) {
  const Checker check("update_pages");
  SummarizePagesParams params = summary_params(
      check, k, page_size,
      {method, key_scores, num_representative, queries, softmax_scale, seqused_k, page_table});
  params.summary = summary_view(check, summary, k, params);
  check.require(start >= 0, "start", "not be negative", start);
  params.update = true;
  params.start = start;
  if (starts) {
    check.same_device("start", *starts, k);
    check.dtype("start", *starts, ScalarType::Int);
    check.shape("start", *starts, "[batch]", {params.seqs.batch});
    check.contiguous("start", *starts);
    params.starts = data_or_null(starts);
  }
  run(params);
}

}  // namespace longctx
