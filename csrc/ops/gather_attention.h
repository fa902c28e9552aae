// gather_attention: softmax attention of a few query tokens over keys that were selected for them.
#pragma once
#include <algorithm>
#include <limits>

#include "checks.h"
#include "ops/attention_options.h"
#include "ops/pages.h"

namespace longctx {

inline RopeParams rope_params(const Checker& check, const Tensor& q, const Tensor& indices,
                              const OptionalTensor& k_positions, int64_t k_position_step,
                              const OptionalTensor& q_positions,
                              const OptionalTensor& rope_cos_sin) {
  RopeParams rope;
  if (!rope_cos_sin) {
    check.require(!k_positions && !q_positions, "rope_cos_sin", "be given with positions", "None");
  } else {
    check.same_device("rope_cos_sin", *rope_cos_sin, q);
    check.dtype("rope_cos_sin", *rope_cos_sin, ScalarType::Float);
    check.shape("rope_cos_sin", *rope_cos_sin, "[max_positions, 2, rotary_dim / 2]",
                {kAnySize, 2, kAnySize});
    check.contiguous("rope_cos_sin", *rope_cos_sin);
    rope.cos_sin = rope_cos_sin->const_data_ptr<float>();
    rope.max_positions = rope_cos_sin->size(0);
    rope.rotary_dim = 2 * rope_cos_sin->size(2);
    check.require(rope.rotary_dim >= 2 && rope.rotary_dim <= q.size(3), "rope_cos_sin",
                  "have a rotary_dim from 2 to head_dim", rope.rotary_dim);
  }
  if (k_positions) {
    check.same_device("k_positions", *k_positions, q);
    check.dtype("k_positions", *k_positions, ScalarType::Int);
    check.shape("k_positions", *k_positions,
                "[batch, heads, seqlen_q or 1, num_entries] of `indices`",
                {indices.size(0), indices.size(1), indices.size(2), indices.size(3)});
    check.contiguous_last_dim("k_positions", *k_positions);
    rope.k_positions = rows_of<int32_t>(*k_positions);
  }
  check.require(k_position_step == 0 || k_position_step == 1, "k_position_step", "be 0 or 1",
                k_position_step);
  rope.k_position_step = k_position_step;
  if (q_positions) {
    check.same_device("q_positions", *q_positions, q);
    check.dtype("q_positions", *q_positions, ScalarType::Int);
    check.shape("q_positions", *q_positions, "[batch, seqlen_q]", {q.size(0), q.size(2)});
    rope.q_positions = {q_positions->const_data_ptr<int32_t>(), q_positions->stride(0), 0,
                        q_positions->stride(1)};
  }
  return rope;
}

inline RowsView<bool> tree_view(const Checker& check, const Tensor& q, const Tensor& tree_mask) {
  check.same_device("tree_mask", tree_mask, q);
  check.dtype("tree_mask", tree_mask, ScalarType::Bool);
  check.shape("tree_mask", tree_mask, "[batch or 1, seqlen_q, seqlen_q]",
              {kAnySize, q.size(2), q.size(2)});
  const bool one = tree_mask.size(0) == 1;
  check.require(one || tree_mask.size(0) == q.size(0), "tree_mask", "have batch or 1 entries",
                tree_mask.sizes());
  check.contiguous_last_dim("tree_mask", tree_mask);
  return {tree_mask.const_data_ptr<bool>(), one ? 0 : tree_mask.stride(0), 0, tree_mask.stride(1)};
}

inline uint32_t* workspace_data(const Checker& check, const Tensor& q, const Tensor& workspace) {
  check.same_device("workspace", workspace, q);
  check.dtype("workspace", workspace, ScalarType::Int);
  check.shape("workspace", workspace, "[at least batch * num_q_heads * seqlen_q]", {kAnySize});
  check.contiguous("workspace", workspace);
  const int64_t size = q.size(0) * q.size(1) * q.size(2);
  if (workspace.size(0) < size) {
    check.fail(
        "workspace",
        "have at least batch * num_q_heads * seqlen_q = " + std::to_string(size) + " elements",
        workspace.size(0));
  }
  return static_cast<uint32_t*>(workspace.mutable_data_ptr());
}

template <void (*run)(const GatherAttentionParams&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gather_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
    const OptionalTensor& counts, int64_t block_size_k, int64_t num_first, int64_t num_last,
    const OptionalTensor& bias, const OptionalTensor& tree_mask, const OptionalTensor& k_positions,
    int64_t k_position_step, const OptionalTensor& q_positions, const OptionalTensor& rope_cos_sin,
    const OptionalTensor& seqused_k, const OptionalTensor& page_table,
    std::optional<double> softmax_scale, double softcap, bool return_key_mass,
    bool return_block_states, const OptionalTensor& workspace) {
  const Checker check("gather_attention");
  GatherAttentionParams params;
  const bool in_pages = page_table.has_value();
  fill_query_key(check, q, k, params, in_pages);
  params.seqs = sequences(check, q, k, std::nullopt, std::nullopt, seqused_k);
  check.same_device("v", v, q);
  check.dtype("v", v, q.scalar_type());
  check.shape("v", v,
              in_pages ? "[num_pages, num_kv_heads, page_size, head_dim_v]"
                       : "[batch, num_kv_heads, seqlen_k, head_dim_v]",
              {k.size(0), k.size(1), k.size(2), kAnySize});
  check.require(v.size(3) > 0, "v", "have a head_dim_v of at least 1", v.sizes());
  check.contiguous_last_dim("v", v);
  if (in_pages) {
    check.require(seqused_k.has_value(), "seqused_k", "be given with `page_table`", "None");
    params.seqs.seqlen_k = fill_pages(check, q, q.size(0), k, *page_table, params.pages);
  }

  check.same_device("indices", indices, q);
  check.dtype("indices", indices, ScalarType::Int);
  check.shape("indices", indices, "[batch, heads, seqlen_q or 1, num_entries]",
              {q.size(0), kAnySize, kAnySize, kAnySize});
  const int64_t heads = indices.size(1), tokens = indices.size(2), num_entries = indices.size(3);
  check.require(tokens == 1 || tokens == q.size(2), "indices", "have seqlen_q or 1 tokens",
                indices.sizes());
  check.require(heads == 1 || heads == k.size(1) || heads == q.size(1), "indices",
                "have 1, num_kv_heads or num_q_heads heads", indices.sizes());
  check.contiguous_last_dim("indices", indices);
  params.indices = rows_of<int32_t>(indices);
  params.num_entries = num_entries;
  params.index_heads = heads;
  params.index_tokens = tokens;
  if (counts) {
    check.same_device("counts", *counts, q);
    check.dtype("counts", *counts, ScalarType::Int);
    check.shape("counts", *counts, "[batch, heads, seqlen_q or 1] of `indices`",
                {q.size(0), heads, tokens});
    params.counts = rows_of<int32_t>(*counts);
  }
  if (bias) {
    check.same_device("bias", *bias, q);
    check.dtype("bias", *bias, ScalarType::Float);
    check.shape("bias", *bias, "[batch, heads, seqlen_q or 1, num_entries] of `indices`",
                {q.size(0), heads, tokens, num_entries});
    check.contiguous_last_dim("bias", *bias);
    params.bias = rows_of<float>(*bias);
  }
  if (tree_mask) params.tree_mask = tree_view(check, q, *tree_mask);
  params.rope =
      rope_params(check, q, indices, k_positions, k_position_step, q_positions, rope_cos_sin);
  check.require(block_size_k >= 1 && block_size_k <= kMaxBlock, "block_size_k", "be in [1, 2^20]",
                block_size_k);
  params.block_size_k = block_size_k;
  check.require(num_first >= 0, "num_first", "not be negative", num_first);
  check.require(num_last >= 0, "num_last", "not be negative", num_last);
  params.num_first = std::min(num_first, params.seqs.seqlen_k);
  params.num_last = std::min(num_last, params.seqs.seqlen_k);
  params.softmax_scale =
      softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  check.finite("softcap", softcap);
  check.require(softcap >= 0, "softcap", "not be negative (0 means none)", softcap);
  params.softcap = softcap;
  if (workspace) params.workspace = workspace_data(check, q, *workspace);

  const ScalarType lse_type =
      params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor out = new_tensor(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  const Tensor lse = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, lse_type);
  params.v = view_of(v);
  params.head_dim_v = v.size(3);
  params.out = view_of(out);
  params.lse = lse.mutable_data_ptr();
  const int64_t mass_batch = return_key_mass ? q.size(0) : 0;
  const Tensor key_mass =
      new_tensor(q, {mass_batch, heads, tokens, num_entries + 1}, ScalarType::Float);
  if (return_key_mass) params.key_mass = key_mass.mutable_data_ptr<float>();
  const int64_t num_states = return_block_states ? num_entries + 1 : 0;
  const Tensor block_out = new_tensor(q, {num_states, q.size(0), q.size(1), q.size(2), v.size(3)});
  const Tensor block_lse = new_tensor(q, {num_states, q.size(0), q.size(1), q.size(2)}, lse_type);
  if (return_block_states) {
    params.block_out = block_out.mutable_data_ptr();
    params.block_lse = block_lse.mutable_data_ptr();
  }
  run(params);
  return {out, lse, key_mass, block_out, block_lse};
}

}  // namespace longctx
