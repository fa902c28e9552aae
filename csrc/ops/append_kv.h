// append_kv: new keys and values behind those of a cache, and the pages of a summary that they fall
// into.
#pragma once
#include "ops/kv_rows.h"
#include "ops/summarize_pages.h"

namespace longctx {

// `summary` as an update of the pages of k_cache, all but its method and lengths.
inline void fill_summary(const Checker& check, const Tensor& k_cache, const Tensor& summary,
                         int64_t page_size, AppendKVParams& params) {
  SummarizePagesParams& pages = params.summary;
  pages.dtype = params.dtype;
  check.require(page_size >= 1 && page_size <= kMaxBlock, "summary_page_size",
                "be in [1, 2^20] with `summary`", page_size);
  check.require(params.head_dim > 0, "k_cache", "have a head_dim of at least 1", k_cache.sizes());
  pages.page_size = page_size;
  pages.k = params.k_cache;
  pages.pages = params.pages;
  pages.num_kv_heads = pages.heads = params.num_kv_heads;
  pages.head_dim = params.head_dim;
  pages.seqs.batch = params.batch;
  pages.seqs.seqlen_k = params.seqlen_k;
  pages.num_pages = (params.seqlen_k + page_size - 1) / page_size;
  pages.update = true;
  pages.start = params.start;
  pages.starts = params.starts;
  pages.summary = summary_view(check, summary, k_cache, pages);
}

template <void (*run)(const AppendKVParams&)>
Tensor append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 int64_t start, const OptionalTensor& starts, const OptionalTensor& page_table,
                 const OptionalTensor& summary, int64_t summary_page_size,
                 const Name& summary_method, const OptionalTensor& counts) {
  const Checker check("append_kv");
  AppendKVParams params;
  check.shape("k", k, "[batch, num_kv_heads, num_new, head_dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  fill_kv_cache(check, "k_cache", k_cache, "v_cache", v_cache, k.size(0), page_table, params);
  const auto new_rows = [&](const char* name, const Tensor& rows, const char* shape, int64_t dim) {
    check.same_device(name, rows, k_cache);
    check.dtype(name, rows, k_cache.scalar_type());
    check.shape(name, rows, shape, {params.batch, params.num_kv_heads, k.size(2), dim});
    check.contiguous_last_dim(name, rows);
    return view_of(rows);
  };
  params.k_cache = view_of(k_cache);
  params.v_cache = view_of(v_cache);
  params.k = new_rows("k", k, "[batch, num_kv_heads, num_new, head_dim]", params.head_dim);
  params.v = new_rows("v", v, "[batch, num_kv_heads, num_new, head_dim_v]", params.head_dim_v);
  params.num_entries = k.size(2);
  const auto of_batch = [&](const char* name, const Tensor& tensor) {
    check.same_device(name, tensor, k_cache);
    check.dtype(name, tensor, ScalarType::Int);
    check.shape(name, tensor, "[batch]", {params.batch});
  };
  if (counts) {
    of_batch("counts", *counts);
    params.counts = {counts->const_data_ptr<int32_t>(), counts->stride(0), 0, 0};
  }
  if (starts) {
    of_batch("start", *starts);
    check.contiguous("start", *starts);
    params.starts = data_or_null(starts);
  } else {
    const int64_t room = params.seqlen_k - (counts ? 0 : params.num_entries);
    check.require(start >= 0 && start <= room, "start",
                  "leave room for the new tokens in the rows of the caches",
                  Beside{start, params.seqlen_k});
    params.start = start;
  }
  static constexpr const char* kMethods[] = {"minmax", "mean"};
  params.summary.method = enum_named<SummaryMethod>(
      check, "summary_method", summary_method, kMethods,
      "be 'minmax' or 'mean' (update_pages takes what other methods need)");
  params.has_summary = summary.has_value();
  if (summary) {
    fill_summary(check, k_cache, *summary, summary_page_size, params);
  } else {
    check.require(summary_page_size == 0, "summary_page_size", "be given with `summary` only",
                  summary_page_size);
  }

  const Tensor lengths = new_tensor(k, {params.batch}, ScalarType::Int);
  params.lengths = lengths.mutable_data_ptr<int32_t>();
  params.summary.seqs.seqused_k = params.lengths;
  run(params);
  return lengths;
}

}  // namespace longctx
