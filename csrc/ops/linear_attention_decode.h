// linear_attention_decode: a few tokens of linear_attention on a pool of states, in place.
#pragma once
#include "ops/linear_attention.h"

namespace longctx {

template <void (*run)(const LinearAttentionDecodeParams&)>
Tensor linear_attention_decode(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& log_decay, Tensor state,
                               const OptionalTensor& state_indices, const OptionalTensor& commit,
                               double scale, bool normalize, double eps) {
  const Checker check("linear_attention_decode");
  LinearAttentionDecodeParams params;
  fill_query_key(check, q, k, params);
  check.require(q.size(2) == k.size(2), "k", "be as long as `q` (a key for every token)",
                Beside{k.size(2), q.size(2)});
  fill_values(check, k, v, params);
  params.log_decay = check_log_decay(check, log_decay, k, params.num_q_heads);
  params.normalize = normalize;
  check.finite("scale", scale);
  params.scale = scale;
  check.finite("eps", eps);
  check.require(eps >= 0, "eps", "not be negative", eps);
  params.eps = eps;
  params.batch = q.size(0);
  params.num_tokens = q.size(2);
  check.same_device("state", state, q);
  check.dtype("state", state, state_type(params.dtype));
  check.shape("state", state,
              normalize ? "[num_slots, num_q_heads, head_dim, head_dim_v + 1]"
                        : "[num_slots, num_q_heads, head_dim, head_dim_v]",
              {state_indices ? kAnySize : q.size(0), q.size(1), q.size(3), params.state_dim()});
  check.contiguous_last_dim("state", state);
  params.num_slots = state.size(0);
  params.state = view_of(state);
  const auto per_entry = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check.same_device(name, *tensor, q);
    check.dtype(name, *tensor, ScalarType::Int);
    check.shape(name, *tensor, "[batch]", {q.size(0)});
    check.contiguous(name, *tensor);
  };
  per_entry("state_indices", state_indices);
  per_entry("commit", commit);
  params.state_indices = data_or_null(state_indices);
  params.commit = data_or_null(commit);

  const OptionalTensor decay = contiguous(log_decay);
  params.log_decay.data = data_of(decay);
  const Tensor out = new_tensor(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  params.out = view_of(out);
  run(params);
  return out;
}

}  // namespace longctx
