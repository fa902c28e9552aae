// truncate_kv: keeps the accepted tokens of the draft at the end of caches, in place.
#pragma once
#include "ops/kv_rows.h"

namespace longctx {

template <void (*run)(const CompactKVParams&)>
Tensor truncate_kv(std::vector<Tensor> k_cache, std::vector<Tensor> v_cache,
                   const Tensor& seqused_k, int64_t num_draft_tokens,
                   const OptionalTensor& accepted, const OptionalTensor& counts,
                   const OptionalTensor& page_table) {
  const Checker check("truncate_kv");
  CompactKVParams params;
  std::vector<TensorView> views;
  check.shape("seqused_k", seqused_k, "[batch]", {kAnySize});
  const int64_t batch = seqused_k.size(0);
  fill_layers(check, k_cache, v_cache, batch, seqused_k, page_table, views, params);
  check.require(num_draft_tokens >= 0 && num_draft_tokens <= params.seqlen_k, "num_draft_tokens",
                "be a number of keys that the caches have room for", num_draft_tokens);
  params.of_draft = true;
  params.num_draft_tokens = num_draft_tokens;
  const Tensor& first = k_cache[0];
  if (accepted) {
    check.same_device("accepted", *accepted, first);
    check.dtype("accepted", *accepted, ScalarType::Int);
    check.shape("accepted", *accepted, "[batch, num_entries]", {batch, kAnySize});
    check.contiguous_last_dim("accepted", *accepted);
    params.indices = {accepted->const_data_ptr<int32_t>(), accepted->stride(0), 0, 0};
    params.num_entries = accepted->size(1);
  } else if (counts) {
    params.num_entries = num_draft_tokens;
  }
  if (counts) {
    check.same_device("counts", *counts, first);
    check.dtype("counts", *counts, ScalarType::Int);
    check.shape("counts", *counts, "[batch]", {batch});
    params.counts = {counts->const_data_ptr<int32_t>(), counts->stride(0), 0, 0};
  }

  const Tensor lengths = new_tensor(seqused_k, {batch});
  params.lengths = lengths.mutable_data_ptr<int32_t>();
  run(params);
  return lengths;
}

}  // namespace longctx
