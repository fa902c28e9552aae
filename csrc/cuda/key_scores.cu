#include "cuda/kernels.h"
#include "cuda/key_scores.cuh"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

template <class T>
void score(const char* op, KeyScores p) {
  const int64_t outputs = p.seqs.batch * p.out_heads() * p.out_rows() * p.num_scores;
  if (outputs == 0) return;
  const int64_t rows = p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q;
  p.aligned = rows_aligned(p.rows, sizeof(T)) &&
              (!p.minmax || p.head_dim * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  p.fused = !p.softmax && p.head_reduce != HeadReduce::kAllSum && p.unit_rows() <= kRowsAtOnce &&
            (p.head_reduce == HeadReduce::kNone || p.list_heads == p.row_heads);
  const Workspace each(p.fused ? 0 : rows * p.num_scores * static_cast<int64_t>(sizeof(float)));
  const Workspace sums(p.softmax ? rows * static_cast<int64_t>(sizeof(float2)) : 0);
  p.each = each.as<float>();
  p.sums = sums.as<float2>();

  if (rows > 0) {
    const int64_t blocks =
        p.num_units() * ceil_div(p.num_scores, kKeysOfBlock) * ceil_div(p.unit_rows(), kRowsAtOnce);
    const int64_t floats =
        kRowsAtOnce * (p.query_floats() > kKeysOfBlock ? p.query_floats() : kKeysOfBlock);
    launch(op, &key_scores_kernel<T>, grid_of(blocks), kScoreThreads,
           floats * static_cast<int64_t>(sizeof(float)), p);
    if (p.fused) return;
  }
  if (p.softmax && rows > 0) {
    launch(op, &score_sums_kernel, grid_of(rows), kScoreThreads, sizeof(FloatSlots), p);
  }
  launch(op, &reduce_scores_kernel, grid_of(ceil_div(outputs, kScoreThreads)), kScoreThreads, 0, p);
}

void score(const char* op, DType dtype, const KeyScores& p) {
  switch (dtype) {
    case DType::kBFloat16:
      return score<__nv_bfloat16>(op, p);
    case DType::kFloat16:
      return score<__half>(op, p);
    default:
      return score<float>(op, p);
  }
}

}  // namespace

void run_page_scores_cuda(const PageScoresParams& params) {
  KeyScores p;
  p.seqs.batch = params.batch;
  p.seqs.seqlen_q = params.seqlen_q;
  p.seqs.seqlen_k = params.num_pages * params.page_size;
  p.seqs.seqused_k = params.seqused_k;
  require_supported("page_scores", params.dtype, params.head_dim, {});
  p.q = params.q;
  p.rows = params.summary;
  p.counts = params.counts;
  p.minmax = params.minmax;
  p.num_rows = p.num_scores = params.num_pages;
  p.row_keys = params.seqused_k == nullptr ? 0 : params.page_size;
  p.num_q_heads = params.num_q_heads;
  p.row_heads = p.list_heads = params.summary_heads;
  p.head_dim = params.head_dim;
  p.scale = static_cast<float>(params.softmax_scale);
  p.softmax = params.softmax;
  p.head_reduce = params.head_reduce;
  p.query_reduce = params.query_reduce;
  p.scores = params.scores;
  score("page_scores", params.dtype, p);
}

void run_token_scores_cuda(const TokenScoresParams& params) {
  require_supported("token_scores", params.dtype, params.head_dim, params.seqs);
  KeyScores p;
  p.seqs = params.seqs;
  p.q = params.q;
  p.rows = params.k;
  p.pages = params.pages;
  p.candidates = params.candidates;
  p.num_rows = params.seqs.seqlen_k;
  p.num_q_heads = params.num_q_heads;
  p.row_heads = p.list_heads = params.num_kv_heads;
  if (params.candidates.data != nullptr) {
    p.candidate_heads = params.candidate_heads;
    p.candidate_rows = params.candidate_rows;
    if (params.candidate_heads == params.num_q_heads) p.list_heads = params.num_q_heads;
  }
  p.head_dim = params.head_dim;
  p.num_scores = params.num_scores;
  p.scale = static_cast<float>(params.softmax_scale);
  p.softcap = static_cast<float>(params.softcap);
  p.head_reduce = params.head_reduce;
  p.query_reduce = params.query_reduce;
  p.scores = params.scores;
  score("token_scores", params.dtype, p);
}

}  // namespace longctx::cuda
