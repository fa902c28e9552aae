// linear_attention: out_t = scale q_t^T S_t with S_t = exp(log_decay) S_{t-1} + k_t v_t^T.
#pragma once
#include "checks.h"
#include "longctx/decay.h"
#include "ops/attention_options.h"

namespace longctx {

// k [batch, num_kv_heads, seqlen_k, head_dim] and v [batch, num_kv_heads, seqlen_k, head_dim_v].
template <class Params>
void fill_values(const Checker& check, const Tensor& k, const Tensor& v, Params& params) {
  check.same_device("v", v, k);
  check.dtype("v", v, k.scalar_type());
  check.shape("v", v, "[batch, num_kv_heads, seqlen_k, head_dim_v]",
              {k.size(0), k.size(1), k.size(2), kAnySize});
  check.require(v.size(3) > 0, "v", "have a head_dim_v of at least 1", v.sizes());
  check.contiguous_last_dim("v", v);
  params.v = view_of(v);
  params.head_dim_v = v.size(3);
}

// k tells device, batch and, with a decay per token, the seqlen. The data is set by the caller,
// from a contiguous tensor.
inline LogDecay check_log_decay(const Checker& check, const OptionalTensor& log_decay,
                                const Tensor& k, int64_t num_q_heads) {
  LogDecay decay;
  if (!log_decay) return decay;
  check.same_device("log_decay", *log_decay, k);
  decay.is_double =
      log_decay->scalar_type() == ScalarType::Double && k.scalar_type() == ScalarType::Double;
  if (!decay.is_double) check.dtype("log_decay", *log_decay, ScalarType::Float);
  constexpr const char* kShape = "[num_q_heads] or [batch, num_q_heads, seqlen]";
  decay.per_token = log_decay->dim() == 3;
  if (decay.per_token) {
    check.shape("log_decay", *log_decay, kShape, {k.size(0), num_q_heads, k.size(2)});
  } else {
    check.shape("log_decay", *log_decay, kShape, {num_q_heads});
  }
  return decay;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline const void* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline ScalarType state_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_initial_state(const Checker& check, const OptionalTensor& initial_state,
                                const Tensor& k, const LinearAttentionParams& params) {
  if (!initial_state) return;
  check.same_device("initial_state", *initial_state, k);
  check.dtype("initial_state", *initial_state, state_type(params.dtype));
  check.shape("initial_state", *initial_state,
              params.normalize ? "[num_seqs, num_q_heads, head_dim, head_dim_v + 1]"
                               : "[num_seqs, num_q_heads, head_dim, head_dim_v]",
              {params.seqs.num_seqs, params.num_q_heads, params.head_dim, params.state_dim()});
}

// [batch, num_q_heads, seqlen_q, dim], in the order of q in memory: rows of heads side by side stay
// so, and whoever joins the heads again copies nothing.
inline Tensor new_rows(const Tensor& q, int64_t dim, ScalarType dtype) {
  if (q.size(1) == 1 || q.stride(1) >= q.stride(2)) {
    return new_tensor(q, {q.size(0), q.size(1), q.size(2), dim}, dtype);
  }
  return torch::stable::transpose(new_tensor(q, {q.size(0), q.size(2), q.size(1), dim}, dtype), 1,
                                  2);
}

template <void (*run)(const LinearAttentionParams&)>
std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& log_decay,
                                            const OptionalTensor& initial_state,
                                            const OptionalTensor& cu_seqlens, double scale,
                                            bool causal, bool normalize, double eps,
                                            int64_t num_segments, bool reverse, bool wide_out) {
  const Checker check("linear_attention");
  LinearAttentionParams params;
  fill_query_key(check, q, k, params);
  fill_values(check, k, v, params);
  check.require(!causal || q.size(2) == k.size(2), "k",
                "be as long as `q` when `causal` (a key for every row)",
                Beside{k.size(2), q.size(2)});
  params.log_decay = check_log_decay(check, log_decay, k, params.num_q_heads);
  if (params.log_decay.per_token && q.size(2) != k.size(2)) {
    check.fail("log_decay", "be [num_q_heads] when `q` and `k` differ in length",
               log_decay->sizes());
  }
  check.require(!cu_seqlens || q.size(2) == k.size(2), "k",
                "be as long as `q` when sequences are packed", Beside{k.size(2), q.size(2)});
  params.seqs = sequences(check, "q", q, cu_seqlens);
  params.seqs.seqlen_q = q.size(2);
  params.seqs.seqlen_k = k.size(2);
  params.causal = causal;
  check.require(causal || !reverse, "reverse",
                "be False unless `causal`: all keys have no direction", "True");
  params.reverse = reverse;
  params.wide_out = wide_out;
  params.normalize = normalize;
  check.finite("scale", scale);
  params.scale = scale;
  check.finite("eps", eps);
  check.require(eps >= 0, "eps", "not be negative", eps);
  params.eps = eps;
  check.require(num_segments >= 0, "num_segments", "not be negative (0 means chosen)",
                num_segments);
  params.num_segments = num_segments;
  check_initial_state(check, initial_state, k, params);

  const OptionalTensor decay = contiguous(log_decay);
  params.log_decay.data = data_of(decay);
  const OptionalTensor initial = contiguous(initial_state);
  params.initial_state = data_of(initial);
  const Tensor out = new_rows(q, v.size(3), wide_out ? state_type(params.dtype) : q.scalar_type());
  const Tensor final_state =
      new_tensor(q, {params.seqs.num_seqs, params.num_q_heads, params.head_dim, params.state_dim()},
                 state_type(params.dtype));
  params.out = view_of(out);
  params.final_state = final_state.mutable_data_ptr();
  run(params);
  return {out, final_state};
}

}  // namespace longctx
