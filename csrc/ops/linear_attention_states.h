// linear_attention_states: the states of linear_attention between its chunks.
#pragma once
#include "ops/linear_attention.h"

namespace longctx {

template <void (*run)(const LinearAttentionParams&)>
Tensor linear_attention_states(const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                               const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, bool normalize, bool reverse) {
  const Checker check("linear_attention_states");
  LinearAttentionParams params;
  params.dtype = check.floating("k", k);
  check.shape("k", k, "[batch, num_kv_heads, seqlen, head_dim]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(k.size(1) > 0, "k", "have at least one head", k.sizes());
  check.require(k.size(3) > 0, "k", "have a head_dim of at least 1", k.sizes());
  check.contiguous_last_dim("k", k);
  params.k = view_of(k);
  params.num_kv_heads = k.size(1);
  params.head_dim = k.size(3);
  fill_values(check, k, v, params);
  params.normalize = normalize;
  params.reverse = reverse;
  params.num_segments = 1;  // every chunk has a state to write, in one sweep
  // Decays and states belong to query heads: they tell how many there are.
  params.num_q_heads = k.size(1);
  const auto take_heads = [&](const char* name, const OptionalTensor& tensor, int64_t dim) {
    if (!tensor || tensor->dim() <= dim) return false;
    params.num_q_heads = tensor->size(dim);
    check.require(params.num_q_heads > 0 && params.num_q_heads % k.size(1) == 0, name,
                  "have a number of heads that is a multiple of that of `k`",
                  Beside{params.num_q_heads, k.size(1)});
    return true;
  };
  if (!take_heads("log_decay", log_decay, log_decay && log_decay->dim() == 3 ? 1 : 0)) {
    take_heads("initial_state", initial_state, 1);
  }
  params.log_decay = check_log_decay(check, log_decay, k, params.num_q_heads);
  params.seqs = sequences(check, "k", k, cu_seqlens);
  params.seqs.seqlen_q = params.seqs.seqlen_k = k.size(2);
  check_initial_state(check, initial_state, k, params);

  const OptionalTensor decay = contiguous(log_decay);
  params.log_decay.data = data_of(decay);
  const OptionalTensor initial = contiguous(initial_state);
  params.initial_state = data_of(initial);
  // Packed: every sequence may end with one partial chunk.
  params.num_chunks =
      (k.size(2) + kLinearChunk - 1) / kLinearChunk + (cu_seqlens ? params.seqs.num_seqs : 0);
  const Tensor states = new_tensor(
      k, {k.size(0), params.num_q_heads, params.num_chunks, params.head_dim, params.state_dim()},
      state_type(params.dtype));
  params.chunk_states = states.mutable_data_ptr();
  run(params);
  return states;
}

}  // namespace longctx
