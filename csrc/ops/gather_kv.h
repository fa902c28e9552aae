// gather_kv: copies the rows of k and v at the listed keys.
#pragma once
#include "ops/kv_rows.h"

namespace longctx {

template <void (*run)(const GatherKVParams&)>
std::tuple<Tensor, Tensor> gather_kv(const Tensor& k, const Tensor& v, const Tensor& indices,
                                     const OptionalTensor& counts, const OptionalTensor& seqused_k,
                                     const OptionalTensor& page_table) {
  const Checker check("gather_kv");
  GatherKVParams params;
  check.shape("indices", indices, "[batch, heads, num_entries]", {kAnySize, kAnySize, kAnySize});
  fill_kv_rows(check, "k", k, "v", v, indices.size(0), seqused_k, page_table, params);
  fill_key_lists(check, k, indices, counts, params);
  params.k = view_of(k);
  params.v = view_of(v);

  const int64_t entries = params.num_entries, heads = params.num_kv_heads;
  const Tensor k_out = new_tensor(k, {params.batch, heads, entries, k.size(3)});
  const Tensor v_out = new_tensor(v, {params.batch, heads, entries, v.size(3)});
  params.k_out = k_out.mutable_data_ptr();
  params.v_out = v_out.mutable_data_ptr();
  run(params);
  return {k_out, v_out};
}

}  // namespace longctx
