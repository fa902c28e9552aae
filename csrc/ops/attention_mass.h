// attention_mass: the softmax probability that the query rows put on each key and diagonal.
#pragma once
#include "checks.h"
#include "ops/attention_options.h"

namespace longctx {

template <void (*run)(const AttentionMassParams&)>
std::tuple<Tensor, Tensor> attention_mass(
    const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& segment_offsets,
    const Name& reduce, bool causal, std::optional<double> softmax_scale, int64_t window_size_left,
    int64_t window_size_right, int64_t num_sink_tokens, double softcap, const OptionalTensor& sinks,
    const OptionalTensor& key_ranges, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
    const OptionalTensor& page_table) {
  const Checker check("attention_mass");
  const AttentionOptions options{
      causal,  softmax_scale, window_size_left, window_size_right, num_sink_tokens,
      softcap, key_ranges,    cu_seqlens_q,     cu_seqlens_k,      seqused_k};
  AttentionMassParams params;
  fill_attention(check, q, k, options, params);
  check.same_device("lse", lse, q);
  check.dtype("lse", lse, params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  check.shape("lse", lse, "[batch, num_q_heads, seqlen_q]", {q.size(0), q.size(1), q.size(2)});
  params.sinks = sinks_data(check, sinks, q);
  const bool both = reduce.text == "both";
  const bool by_key = both || reduce.text == "key";
  const bool by_diagonal = both || reduce.text == "diagonal";
  check.require(by_key || by_diagonal, "reduce", "be 'key', 'diagonal' or 'both'",
                "'" + reduce.text + "'");
  int64_t num_keys = k.size(2);
  if (segment_offsets) {
    check.require(by_key, "segment_offsets", "be None when `reduce` is 'diagonal'", "a tensor");
    check.same_device("segment_offsets", *segment_offsets, q);
    check.dtype("segment_offsets", *segment_offsets, ScalarType::Int);
    check.shape("segment_offsets", *segment_offsets, "[num_segments + 1]", {kAnySize});
    check.require(segment_offsets->size(0) > 0, "segment_offsets", "hold at least one offset",
                  "none");
    check.contiguous("segment_offsets", *segment_offsets);
    params.segment_offsets = segment_offsets->const_data_ptr<int32_t>();
    params.num_segments = num_keys = segment_offsets->size(0) - 1;
  }
  check.require(!page_table, "page_table", "be None: paged KV is not supported yet", "a tensor");

  const Tensor lse_rows = torch::stable::contiguous(lse);
  params.lse = lse_rows.const_data_ptr();
  params.num_diagonals = std::max<int64_t>(q.size(2) + k.size(2) - 1, 0);
  const Tensor key_mass =
      new_tensor(q, {q.size(0), q.size(1), by_key ? num_keys : 0}, ScalarType::Float);
  const Tensor diagonal_mass = new_tensor(
      q, {q.size(0), q.size(1), by_diagonal ? params.num_diagonals : 0}, ScalarType::Float);
  if (by_key) params.key_mass = key_mass.mutable_data_ptr<float>();
  if (by_diagonal) params.diagonal_mass = diagonal_mass.mutable_data_ptr<float>();
  run(params);
  return {key_mass, diagonal_mass};
}

}  // namespace longctx
