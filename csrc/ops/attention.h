// attention: softmax attention over the keys that the predicate lets a query see.
#pragma once
#include "checks.h"
#include "ops/attention_options.h"

namespace longctx {

struct AttentionOutputs {
  Tensor out;  // [batch, num_q_heads, seqlen_q, head_dim_v]
  Tensor lse;  // [batch, num_q_heads, seqlen_q]
};

// Checks v, sinks and page_table and allocates the outputs: the last step before the kernel.
template <class Params>
AttentionOutputs allocate_outputs(const Checker& check, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const OptionalTensor& sinks,
                                  const OptionalTensor& page_table, Params& params) {
  check.same_device("v", v, q);
  check.dtype("v", v, q.scalar_type());
  check.shape("v", v, "[batch, num_kv_heads, seqlen_k, head_dim_v]",
              {q.size(0), k.size(1), k.size(2), kAnySize});
  check.require(v.size(3) > 0, "v", "have a head_dim_v of at least 1", v.sizes());
  check.contiguous_last_dim("v", v);
  params.sinks = sinks_data(check, sinks, q);
  check.require(!page_table, "page_table", "be None: paged KV is not supported yet", "a tensor");

  const ScalarType lse_type =
      params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  AttentionOutputs outputs{new_tensor(q, {q.size(0), q.size(1), q.size(2), v.size(3)}),
                           new_tensor(q, {q.size(0), q.size(1), q.size(2)}, lse_type)};
  params.v = view_of(v);
  params.head_dim_v = v.size(3);
  params.out = view_of(outputs.out);
  params.lse = outputs.lse.mutable_data_ptr();
  return outputs;
}

template <void (*run)(const AttentionParams&)>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     std::optional<double> softmax_scale, int64_t window_size_left,
                                     int64_t window_size_right, int64_t num_sink_tokens,
                                     double softcap, const OptionalTensor& sinks,
                                     const OptionalTensor& key_ranges,
                                     const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k,
                                     const OptionalTensor& seqused_k,
                                     const OptionalTensor& page_table) {
  const Checker check("attention");
  const AttentionOptions options{
      causal,  softmax_scale, window_size_left, window_size_right, num_sink_tokens,
      softcap, key_ranges,    cu_seqlens_q,     cu_seqlens_k,      seqused_k};
  AttentionParams params;
  fill_attention(check, q, k, options, params);
  const AttentionOutputs outputs = allocate_outputs(check, q, k, v, sinks, page_table, params);
  run(params);
  return {outputs.out, outputs.lse};
}

}  // namespace longctx
