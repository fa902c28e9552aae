// select_blocks: scores of key blocks -> which of them each query block visits, as a block list.
#pragma once
#include <limits>

#include "checks.h"
#include "ops/attention_options.h"
#include "ops/block_map.h"

namespace longctx {

// The sequences of a map whose tensors q and k are not at hand: axes are as long as the map is.
inline SequenceParams map_sequences(const Checker& check, const Tensor& scores,
                                    const BlockMapParams& map, const OptionalTensor& cu_seqlens_q,
                                    const OptionalTensor& cu_seqlens_k,
                                    const OptionalTensor& seqused_k) {
  SequenceParams seqs = sequences(check, "scores", scores, cu_seqlens_q, cu_seqlens_k, seqused_k);
  seqs.seqlen_q = map.num_q_blocks * map.block_size_q;
  seqs.seqlen_k = map.num_k_blocks * map.block_size_k;
  return seqs;
}

template <void (*run)(const SelectBlocksParams&)>
std::tuple<Tensor, Tensor> select_blocks(
    const Tensor& scores, const Name& method, double value, const OptionalTensor& head_values,
    const Name& scope, int64_t num_first, int64_t num_local, bool causal, int64_t block_size_q,
    int64_t block_size_k, int64_t q_offset, std::optional<int64_t> max_blocks_per_row,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& seqused_k) {
  const Checker check("select_blocks");
  static constexpr const char* kMethods[] = {"top_k", "cumulative", "threshold", "relative"};
  static constexpr const char* kScopes[] = {"head", "row"};
  check.dtype("scores", scores, ScalarType::Float);
  check.shape("scores", scores, "[batch, heads, num_q_blocks, num_k_blocks]",
              {kAnySize, kAnySize, kAnySize, kAnySize});
  check.require(scores.size(3) <= std::numeric_limits<int32_t>::max(), "scores",
                "have block numbers that fit int32", scores.sizes());
  check.contiguous_last_dim("scores", scores);

  SelectBlocksParams params;
  params.method = enum_named<SelectMethod>(check, "method", method, kMethods,
                                           "be 'top_k', 'cumulative', 'threshold' or 'relative'");
  params.per_row = enum_named<bool>(check, "scope", scope, kScopes, "be 'row' or 'head'");
  params.map = block_map(check, block_size_q, block_size_k, causal, q_offset,
                         cu_seqlens_q.has_value() || cu_seqlens_k.has_value());
  params.map.num_q_blocks = scores.size(2);
  params.map.num_k_blocks = scores.size(3);
  params.map.seqs = map_sequences(check, scores, params.map, cu_seqlens_q, cu_seqlens_k, seqused_k);
  check.require(!std::isnan(value), "value", "not be NaN", value);
  params.value = static_cast<float>(value);
  if (head_values) {
    check.same_device("value", *head_values, scores);
    check.dtype("value", *head_values, ScalarType::Float);
    check.shape("value", *head_values, "[heads]", {scores.size(1)});
    check.contiguous("value", *head_values);
    params.head_values = head_values->const_data_ptr<float>();
  }
  check.require(num_first >= 0, "num_first", "not be negative", num_first);
  check.require(num_local >= 0, "num_local", "not be negative", num_local);
  params.num_first = std::min(num_first, scores.size(3));
  params.num_local = std::min(num_local, scores.size(3));
  const int64_t limit = max_blocks_per_row.value_or(scores.size(3));
  check.require(!max_blocks_per_row || limit > 0, "max_blocks_per_row", "be at least 1", limit);
  params.max_blocks_per_row = std::min(limit, scores.size(3));
  check.require(
      params.max_blocks_per_row >= std::min(params.num_first + params.num_local, scores.size(3)),
      "max_blocks_per_row", "leave room for `num_first` and `num_local`", limit);

  params.scores = scores.const_data_ptr<float>();
  params.scores_batch_stride = scores.stride(0);
  params.scores_head_stride = scores.stride(1);
  params.scores_row_stride = scores.stride(2);
  params.heads = scores.size(1);
  params.capacity = scores.size(0) * scores.size(1) * scores.size(2) * params.max_blocks_per_row;
  const Tensor indptr =
      new_tensor(scores, {scores.size(0), scores.size(1), scores.size(2) + 1}, ScalarType::Long);
  const Tensor indices = new_tensor(scores, {params.capacity}, ScalarType::Int);
  params.block_indptr = indptr.mutable_data_ptr<int64_t>();
  params.block_indices = indices.mutable_data_ptr<int32_t>();
  run(params);
  return {indptr, indices};
}

}  // namespace longctx
