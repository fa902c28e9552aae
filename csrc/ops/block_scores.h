// block_scores: an estimate of how much attention each query block pays to each key block.
#pragma once
#include "checks.h"
#include "ops/attention_options.h"
#include "ops/block_map.h"

namespace longctx {

template <void (*run)(const BlockScoresParams&)>
Tensor block_scores(const Tensor& q, const Tensor& k, int64_t block_size_q, int64_t block_size_k,
                    const Name& method, bool softmax, bool causal,
                    std::optional<double> softmax_scale, int64_t stride,
                    std::optional<int64_t> q_offset, const OptionalTensor& cu_seqlens_q,
                    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k) {
  const Checker check("block_scores");
  static constexpr const char* kMethods[] = {"mean", "max_mean", "antidiagonal"};
  const bool packed = cu_seqlens_q.has_value() || cu_seqlens_k.has_value();
  BlockScoresParams params;
  fill_query_key(check, q, k, params);
  params.map = block_map(check, block_size_q, block_size_k, causal, q_offset, packed);
  params.method = enum_named<BlockScoreMethod>(check, "method", method, kMethods,
                                               "be 'mean', 'max_mean' or 'antidiagonal'");
  params.softmax = softmax;
  if (params.method == BlockScoreMethod::kAntidiagonal) {
    check.require(stride > 0 && block_size_q % stride == 0 && block_size_k % stride == 0, "stride",
                  "divide both block sizes", stride);
    params.stride = stride;
  }
  params.softmax_scale =
      softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(params.head_dim)));
  check.finite("softmax_scale", params.softmax_scale);
  params.map.seqs = sequences(check, q, k, cu_seqlens_q, cu_seqlens_k, seqused_k);
  params.map.num_q_blocks =
      (q.size(2) + block_size_q - 1) / block_size_q + (packed ? params.map.seqs.num_seqs : 0);
  params.map.num_k_blocks = (k.size(2) + block_size_k - 1) / block_size_k;

  const Tensor scores =
      new_tensor(q, {q.size(0), q.size(1), params.map.num_q_blocks, params.map.num_k_blocks},
                 ScalarType::Float);
  params.scores = scores.mutable_data_ptr<float>();
  run(params);
  return scores;
}

}  // namespace longctx
