// compact_kv: keeps the listed keys of caches, moved to the front in place.
#pragma once
#include "ops/kv_rows.h"

namespace longctx {

template <void (*run)(const CompactKVParams&)>
Tensor compact_kv(std::vector<Tensor> k_cache, std::vector<Tensor> v_cache, const Tensor& indices,
                  const OptionalTensor& counts, const OptionalTensor& seqused_k,
                  const OptionalTensor& page_table) {
  const Checker check("compact_kv");
  CompactKVParams params;
  std::vector<TensorView> views;
  check.shape("indices", indices, "[batch, heads, num_entries]", {kAnySize, kAnySize, kAnySize});
  fill_layers(check, k_cache, v_cache, indices.size(0), seqused_k, page_table, views, params);
  fill_key_lists(check, k_cache[0], indices, counts, params);

  const Tensor lengths = new_tensor(indices, {params.batch, params.index_heads});
  params.lengths = lengths.mutable_data_ptr<int32_t>();
  run(params);
  return lengths;
}

}  // namespace longctx
