// block_sparse_attention: attention over the key blocks that a list names for each query block.
#pragma once
#include "checks.h"
#include "ops/attention.h"

namespace longctx {

// Checks everything about a block list but its values, which are clamped where they are read.
inline BlockList block_list(const Checker& check, const Tensor& q, const Tensor& k,
                            const Tensor& block_indptr, const Tensor& block_indices,
                            int64_t block_size_q, int64_t block_size_k, int64_t num_seqs,
                            bool packed) {
  BlockList blocks;
  const auto one_of = [&](const char* name, int64_t value, const char* rule,
                          std::initializer_list<int64_t> legal) {
    check.require(std::find(legal.begin(), legal.end(), value) != legal.end(), name, rule, value);
  };
  one_of("block_size_q", block_size_q, "be 16, 32, 64 or 128", {16, 32, 64, 128});
  one_of("block_size_k", block_size_k, "be 1, 8, 16, 32, 64 or 128", {1, 8, 16, 32, 64, 128});
  blocks.block_size_q = block_size_q;
  blocks.block_size_k = block_size_k;
  blocks.num_q_blocks = (q.size(2) + block_size_q - 1) / block_size_q + (packed ? num_seqs : 0);

  check.same_device("block_indptr", block_indptr, q);
  check.dtype("block_indptr", block_indptr, ScalarType::Long);
  check.shape("block_indptr", block_indptr,
              "[batch or 1, 1 or num_kv_heads or num_q_heads, num_q_blocks + 1]",
              {kAnySize, kAnySize, blocks.num_q_blocks + 1});
  blocks.pattern_batch = block_indptr.size(0);
  blocks.pattern_heads = block_indptr.size(1);
  check.require(blocks.pattern_batch == 1 || blocks.pattern_batch == q.size(0), "block_indptr",
                "have batch 1 or that of `q`", block_indptr.sizes());
  check.require(blocks.pattern_heads == 1 || blocks.pattern_heads == k.size(1) ||
                    blocks.pattern_heads == q.size(1),
                "block_indptr", "have 1, num_kv_heads or num_q_heads heads", block_indptr.sizes());
  check.contiguous("block_indptr", block_indptr);

  check.same_device("block_indices", block_indices, q);
  check.dtype("block_indices", block_indices, ScalarType::Int);
  check.shape("block_indices", block_indices, "[capacity]", {kAnySize});
  check.contiguous("block_indices", block_indices);
  blocks.block_indptr = block_indptr.const_data_ptr<int64_t>();
  blocks.block_indices = block_indices.const_data_ptr<int32_t>();
  blocks.capacity = block_indices.size(0);
  return blocks;
}

template <void (*run)(const BlockSparseAttentionParams&)>
std::tuple<Tensor, Tensor> block_sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_indptr,
    const Tensor& block_indices, int64_t block_size_q, int64_t block_size_k, bool causal,
    std::optional<double> softmax_scale, int64_t window_size_left, int64_t window_size_right,
    int64_t num_sink_tokens, double softcap, const OptionalTensor& sinks,
    const OptionalTensor& key_ranges, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
    const OptionalTensor& page_table) {
  const Checker check("block_sparse_attention");
  const AttentionOptions options{
      causal,  softmax_scale, window_size_left, window_size_right, num_sink_tokens,
      softcap, key_ranges,    cu_seqlens_q,     cu_seqlens_k,      seqused_k};
  BlockSparseAttentionParams params;
  fill_attention(check, q, k, options, params);
  params.blocks = block_list(check, q, k, block_indptr, block_indices, block_size_q, block_size_k,
                             params.seqs.num_seqs, cu_seqlens_q.has_value());
  const AttentionOutputs outputs = allocate_outputs(check, q, k, v, sinks, page_table, params);
  run(params);
  return {outputs.out, outputs.lse};
}

}  // namespace longctx
