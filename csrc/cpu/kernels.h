// Entry points of the CPU backend, one per op. Params are already checked; outputs are allocated.
#pragma once
#include "longctx/params.h"

namespace longctx::cpu {

void run_merge_states_cpu(const MergeStatesParams& params);
void run_attention_cpu(const AttentionParams& params);
void run_block_sparse_attention_cpu(const BlockSparseAttentionParams& params);
void run_attention_mass_cpu(const AttentionMassParams& params);
void run_gather_attention_cpu(const GatherAttentionParams& params);
void run_append_kv_cpu(const AppendKVParams& params);
void run_gather_kv_cpu(const GatherKVParams& params);
void run_compact_kv_cpu(const CompactKVParams& params);  // and truncate_kv
void run_summarize_pages_cpu(const SummarizePagesParams& params);
void run_page_scores_cpu(const PageScoresParams& params);
void run_token_scores_cpu(const TokenScoresParams& params);
void run_kmeans_cpu(const KMeansParams& params);
void run_block_scores_cpu(const BlockScoresParams& params);
void run_select_blocks_cpu(const SelectBlocksParams& params);
void run_topk_select_cpu(const TopKSelectParams& params);
void run_threshold_select_cpu(const ThresholdSelectParams& params);
void run_linear_attention_cpu(const LinearAttentionParams& params);  // and its states alone
void run_linear_attention_decode_cpu(const LinearAttentionDecodeParams& params);

}  // namespace longctx::cpu
