// The arguments that gather_kv, compact_kv, truncate_kv and append_kv share, checked once.
#pragma once
#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "ops/attention_options.h"

namespace longctx {

// k and v of one layer, contiguous or in pages, and how many keys they have room for; `batch` is
// that of what comes with them.
inline void fill_kv_cache(const Checker& check, const char* k_name, const Tensor& k,
                          const char* v_name, const Tensor& v, int64_t batch,
                          const OptionalTensor& page_table, KVRowsParams& params) {
  const bool in_pages = page_table.has_value();
  params.dtype = check.floating(k_name, k);
  check.shape(k_name, k,
              in_pages ? "[num_pages, num_kv_heads, page_size, head_dim]"
                       : "[batch, num_kv_heads, seqlen_k, head_dim]",
              {in_pages ? kAnySize : batch, kAnySize, kAnySize, kAnySize});
  check.require(k.size(1) > 0, k_name, "have at least one head", k.sizes());
  check.contiguous_last_dim(k_name, k);
  check.same_device(v_name, v, k);
  check.dtype(v_name, v, k.scalar_type());
  check.shape(v_name, v,
              in_pages ? "[num_pages, num_kv_heads, page_size, head_dim_v]"
                       : "[batch, num_kv_heads, seqlen_k, head_dim_v]",
              {k.size(0), k.size(1), k.size(2), kAnySize});
  check.contiguous_last_dim(v_name, v);
  params.batch = batch;
  params.seqlen_k = k.size(2);
  params.num_kv_heads = k.size(1);
  params.head_dim = k.size(3);
  params.head_dim_v = v.size(3);
  if (in_pages) {
    check.same_device("page_table", *page_table, k);
    check.dtype("page_table", *page_table, ScalarType::Int);
    check.shape("page_table", *page_table, "[batch, max_pages]", {batch, kAnySize});
    check.contiguous("page_table", *page_table);
    check.require(k.size(2) > 0, k_name, "have a page_size of at least 1", k.sizes());
    params.pages = {page_table->const_data_ptr<int32_t>(), page_table->size(1), k.size(0),
                    k.size(2)};
    params.seqlen_k = params.pages.max_pages * params.pages.page_size;
  }
  check.require(params.seqlen_k <= std::numeric_limits<int32_t>::max(), k_name,
                "have keys whose indices fit int32", params.seqlen_k);
}

// The same, and how many of the keys exist.
inline void fill_kv_rows(const Checker& check, const char* k_name, const Tensor& k,
                         const char* v_name, const Tensor& v, int64_t batch,
                         const OptionalTensor& seqused_k, const OptionalTensor& page_table,
                         KVRowsParams& params) {
  fill_kv_cache(check, k_name, k, v_name, v, batch, page_table, params);
  check.require(seqused_k.has_value() || !page_table, "seqused_k", "be given with `page_table`",
                "None");
  if (!seqused_k) return;
  check.same_device("seqused_k", *seqused_k, k);
  check.dtype("seqused_k", *seqused_k, ScalarType::Int);
  check.shape("seqused_k", *seqused_k, "[batch]", {batch});
  check.contiguous("seqused_k", *seqused_k);
  params.seqused_k = seqused_k->const_data_ptr<int32_t>();
}

// `indices` [batch, heads, num_entries] and `counts` [batch, heads], for the heads of `k`.
inline void fill_key_lists(const Checker& check, const Tensor& k, const Tensor& indices,
                           const OptionalTensor& counts, KVRowsParams& params) {
  check.same_device("indices", indices, k);
  check.dtype("indices", indices, ScalarType::Int);
  const int64_t heads = indices.size(1);
  check.require(heads == 1 || heads == params.num_kv_heads, "indices",
                "have 1 or num_kv_heads heads", indices.sizes());
  check.contiguous_last_dim("indices", indices);
  params.indices = {indices.const_data_ptr<int32_t>(), indices.stride(0), indices.stride(1), 0};
  params.num_entries = indices.size(2);
  params.index_heads = heads;
  if (!counts) return;
  check.same_device("counts", *counts, k);
  check.dtype("counts", *counts, ScalarType::Int);
  check.shape("counts", *counts, "[batch, heads] of `indices`", {params.batch, heads});
  params.counts = {counts->const_data_ptr<int32_t>(), counts->stride(0), counts->stride(1), 0};
}

// Layers of one shape and dtype, whose views are put into `views`, those of k and then those of v.
inline void fill_layers(const Checker& check, const std::vector<Tensor>& k_cache,
                        const std::vector<Tensor>& v_cache, int64_t batch,
                        const OptionalTensor& seqused_k, const OptionalTensor& page_table,
                        std::vector<TensorView>& views, CompactKVParams& params) {
  const size_t layers = k_cache.size();
  check.require(layers > 0, "k_cache", "hold at least one layer", "none");
  check.require(v_cache.size() == layers, "v_cache", "have as many layers as `k_cache`",
                Beside{static_cast<int64_t>(v_cache.size()), static_cast<int64_t>(layers)});
  views.resize(2 * layers);
  for (size_t i = 0; i < layers; ++i) {
    const std::string number = layers == 1 ? "" : "[" + std::to_string(i) + "]";
    const std::string k_name = "k_cache" + number, v_name = "v_cache" + number;
    const Tensor &k = k_cache[i], &v = v_cache[i], &first = k_cache[0];
    check.same_device(k_name.c_str(), k, first);
    check.dtype(k_name.c_str(), k, first.scalar_type());
    fill_kv_rows(check, k_name.c_str(), k, v_name.c_str(), v, batch, seqused_k, page_table, params);
    const auto like_first = [&](const std::string& name, const Tensor& cache, const Tensor& other) {
      check.require(cache.sizes() == other.sizes(), name.c_str(),
                    "have the shape of the first layer", cache.sizes());
    };
    like_first(k_name, k, first);
    like_first(v_name, v, v_cache[0]);
    views[i] = view_of(k);
    views[layers + i] = view_of(v);
  }
  params.k_cache = views.data();
  params.v_cache = views.data() + layers;
  params.num_layers = static_cast<int64_t>(layers);
}

}  // namespace longctx
