// Every op of longctx: the public contract on one screen.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// The Python functions take options by keyword only. The schemas cannot say so: torch's autograd
// registration refuses keyword-only tensors.
// Options of every attention op; see include/longctx/params.h for their meaning.
const std::string kMaskOptions =
    "bool causal=True, float? softmax_scale=None, int window_size_left=-1, "
    "int window_size_right=-1, int num_sink_tokens=0, float softcap=0.0, ";
const std::string kSequenceOptions =
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None";
const std::string kAttentionOptions = kMaskOptions +
                                      "Tensor? sinks=None, Tensor? key_ranges=None, " +
                                      kSequenceOptions + ", Tensor? page_table=None";
const std::string kSummaryOptions =
    "str method=\"minmax\", Tensor? key_scores=None, int num_representative=4, "
    "Tensor? queries=None, float? softmax_scale=None, Tensor? seqused_k=None, "
    "Tensor? page_table=None";

void define(torch::stable::detail::StableLibrary& library, const std::string& schema) {
  library.def(schema.c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(longctx, m) {
  define(m, "_cuda_attention_path(Tensor q, Tensor k, Tensor v) -> str");
  define(m, "_force_cuda_path(str path) -> ()");
  define(m, "_force_isa(str isa) -> ()");
  define(m,
         "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, int start, "
         "Tensor? starts=None, Tensor? page_table=None, Tensor(c!)? summary=None, "
         "int summary_page_size=0, str summary_method=\"minmax\", Tensor? counts=None) "
         "-> Tensor");
  define(m,
         "attention(Tensor q, Tensor k, Tensor v, " + kAttentionOptions + ") -> (Tensor, Tensor)");
  define(m,
         "attention_mass(Tensor q, Tensor k, Tensor lse, Tensor? segment_offsets=None, "
         "str reduce=\"key\", " +
             kAttentionOptions + ") -> (Tensor, Tensor)");
  define(m,
         "block_scores(Tensor q, Tensor k, int block_size_q=128, int block_size_k=128, "
         "str method=\"mean\", bool softmax=True, bool causal=True, float? softmax_scale=None, "
         "int stride=16, int? q_offset=None, " +
             kSequenceOptions + ") -> Tensor");
  define(m,
         "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_indptr, "
         "Tensor block_indices, int block_size_q, int block_size_k, " +
             kAttentionOptions + ") -> (Tensor, Tensor)");
  define(m, "build_info() -> str");
  define(m,
         "compact_kv(Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, Tensor indices, "
         "Tensor? counts=None, Tensor? seqused_k=None, Tensor? page_table=None) -> Tensor");
  define(m, "cuda_build_info() -> str");
  define(m,
         "gather_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? counts=None, "
         "int block_size_k=1, int num_first=0, int num_last=0, Tensor? bias=None, "
         "Tensor? tree_mask=None, Tensor? k_positions=None, int k_position_step=1, "
         "Tensor? q_positions=None, Tensor? rope_cos_sin=None, Tensor? seqused_k=None, "
         "Tensor? page_table=None, float? softmax_scale=None, float softcap=0.0, "
         "bool return_key_mass=False, bool return_block_states=False, Tensor? workspace=None) "
         "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  define(m,
         "gather_kv(Tensor k, Tensor v, Tensor indices, Tensor? counts=None, "
         "Tensor? seqused_k=None, Tensor? page_table=None) -> (Tensor, Tensor)");
  define(m,
         "kmeans(Tensor keys, int num_clusters, int num_iters=10, int seed=0, "
         "str metric=\"cosine\", Tensor? counts=None, Tensor? lengths=None) -> (Tensor, Tensor, "
         "Tensor)");
  define(m,
         "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, "
         "Tensor? initial_state=None, Tensor? cu_seqlens=None, float scale=1.0, bool causal=True, "
         "bool normalize=False, float eps=1e-6, int num_segments=0, bool reverse=False, "
         "bool wide_out=False) -> (Tensor, Tensor)");
  define(m,
         "linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
         "Tensor(a!) state, Tensor? state_indices=None, Tensor? commit=None, float scale=1.0, "
         "bool normalize=False, float eps=1e-6) -> Tensor");
  define(m,
         "linear_attention_states(Tensor k, Tensor v, Tensor? log_decay=None, "
         "Tensor? initial_state=None, Tensor? cu_seqlens=None, bool normalize=False, "
         "bool reverse=False) -> Tensor");
  define(m, "merge_states(Tensor out, Tensor lse, Tensor? lse_override=None) -> (Tensor, Tensor)");
  define(m,
         "page_scores(Tensor q, Tensor summary, str method=\"minmax\", str head_reduce=\"none\", "
         "str query_reduce=\"none\", bool softmax=False, Tensor? counts=None, "
         "float? softmax_scale=None, Tensor? seqused_k=None, int? page_size=None) -> Tensor");
  define(m,
         "select_blocks(Tensor scores, str method=\"top_k\", float value=0.0, "
         "Tensor? head_values=None, str scope=\"row\", int num_first=0, int num_local=0, "
         "bool causal=True, int block_size_q=128, int block_size_k=128, int q_offset=0, "
         "int? max_blocks_per_row=None, " +
             kSequenceOptions + ") -> (Tensor, Tensor)");
  define(m, "summarize_pages(Tensor k, int page_size, " + kSummaryOptions + ") -> Tensor");
  define(m,
         "threshold_select(Tensor scores, float value, int max_k, str method=\"threshold\", "
         "Tensor? lengths=None, int num_first=0, int num_last=0) -> (Tensor, Tensor)");
  define(m,
         "token_scores(Tensor q, Tensor k, str head_reduce=\"none\", str query_reduce=\"none\", "
         "Tensor? candidates=None, float? softmax_scale=None, float softcap=0.0, "
         "Tensor? seqused_k=None, Tensor? page_table=None) -> Tensor");
  define(m,
         "topk_select(Tensor scores, int k, Tensor? lengths=None, int num_first=0, "
         "int num_last=0) -> (Tensor, Tensor)");
  define(m,
         "truncate_kv(Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, Tensor seqused_k, "
         "int num_draft_tokens, Tensor? accepted=None, Tensor? counts=None, "
         "Tensor? page_table=None) -> Tensor");
  define(m,
         "update_pages(Tensor(a!) summary, Tensor k, int start, Tensor? starts, int page_size, " +
             kSummaryOptions + ") -> ()");
}
