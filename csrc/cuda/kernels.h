// Entry points of the CUDA backend, one per op. Params are already checked, outputs are allocated
// and the tensors' device is current.
#pragma once
#include "longctx/params.h"

namespace longctx::cuda {

void run_append_kv_cuda(const AppendKVParams& params);
void run_attention_mass_cuda(const AttentionMassParams& params);
void run_block_scores_cuda(const BlockScoresParams& params);
void run_attention_cuda(const AttentionParams& params);
void run_block_sparse_attention_cuda(const BlockSparseAttentionParams& params);
void run_compact_kv_cuda(const CompactKVParams& params);  // and truncate_kv
void run_gather_attention_cuda(const GatherAttentionParams& params);
void run_gather_kv_cuda(const GatherKVParams& params);
void run_kmeans_cuda(const KMeansParams& params);
void run_linear_attention_cuda(const LinearAttentionParams& params);
void run_linear_attention_decode_cuda(const LinearAttentionDecodeParams& params);
void run_merge_states_cuda(const MergeStatesParams& params);
void run_page_scores_cuda(const PageScoresParams& params);
void run_select_blocks_cuda(const SelectBlocksParams& params);
void run_summarize_pages_cuda(const SummarizePagesParams& params);
void run_threshold_select_cuda(const ThresholdSelectParams& params);
void run_token_scores_cuda(const TokenScoresParams& params);
void run_topk_select_cuda(const TopKSelectParams& params);

}  // namespace longctx::cuda
