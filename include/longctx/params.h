// What an op hands to a backend: plain structs of pointers, sizes and strides, no torch types.
// Strides count elements. Every offset is int64: a 32-bit product wraps on long contexts.
#pragma once
#include <cstdint>

#include "longctx/config.h"

namespace longctx {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A [batch, heads, seqlen, dim] tensor whose last dim is contiguous.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t seq_stride = 0;
};

// How the rows of q and k group into sequences: one per batch entry, or packed behind each other.
struct SequenceParams {
  int64_t batch = 0;                      // 1 when packed
  int64_t num_seqs = 0;                   // batch, or the number of packed sequences
  int64_t seqlen_q = 0;                   // length of the query axis
  int64_t seqlen_k = 0;                   // length of the key axis
  const int32_t* cu_seqlens_q = nullptr;  // [num_seqs + 1], packed only
  const int32_t* cu_seqlens_k = nullptr;  // [num_seqs + 1], packed only
  const int32_t* seqused_k = nullptr;     // [batch]: keys at or beyond it do not exist
};

// The predicate: a key is visible iff it is in `key_ranges` (if given) and passes `causal` and
// (is inside the window or is one of the first `num_sink_tokens` keys).
struct MaskParams {
  bool causal = false;
  int64_t window_size_left = -1;   // self and this many earlier keys; -1 is open
  int64_t window_size_right = -1;  // this many later keys; -1 is open
  int64_t num_sink_tokens = 0;
  const int32_t* key_ranges = nullptr;  // [batch, num_key_ranges, seqlen_q, 2], half-open
  int64_t num_key_ranges = 0;           // 0, 1 or 2
  int64_t key_ranges_batch_stride = 0;
  int64_t key_ranges_range_stride = 0;
  int64_t key_ranges_row_stride = 0;  // the pair itself is contiguous
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  SequenceParams seqs;
  MaskParams mask;
  TensorView q;                  // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView k;                  // [batch, num_kv_heads, seqlen_k, head_dim]
  TensorView v;                  // [batch, num_kv_heads, seqlen_k, head_dim_v]
  TensorView out;                // [batch, num_q_heads, seqlen_q, head_dim_v]
  void* lse = nullptr;           // [batch, num_q_heads, seqlen_q] float (double for float64)
  const float* sinks = nullptr;  // [num_q_heads]: one more logit per row, without a value
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  double softmax_scale = 1.0;
  double softcap = 0.0;  // > 0: the scaled score s becomes softcap * tanh(s / softcap)
};

// Which key blocks each query block visits, as CSR: row r lists
// block_indices[block_indptr[r] .. block_indptr[r + 1]), ascending, without duplicates.
struct BlockList {
  const int64_t* block_indptr = nullptr;   // [pattern_batch, pattern_heads, num_q_blocks + 1]
  const int32_t* block_indices = nullptr;  // [capacity]
  int64_t capacity = 0;
  int64_t pattern_batch = 1;  // 1 or batch
  int64_t pattern_heads = 1;  // 1, num_kv_heads or num_q_heads
  int64_t num_q_blocks = 0;
  int64_t block_size_q = 128;  // 16, 32, 64 or 128
  int64_t block_size_k = 128;  // 1, 8, 16, 32, 64 or 128
};

struct BlockSparseAttentionParams : AttentionParams {
  BlockList blocks;
};

// A tensor [batch, heads, seqlen_q, ...] whose last dim, if there is a fourth, is contiguous.
template <class T>
struct RowsView {
  const T* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  LONGCTX_HD const T* row(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// Key j of batch entry b is row j % page_size of page page_table[b][j / page_size]; k and v are
// then [num_pages, num_kv_heads, page_size, dim].
struct PagesParams {
  const int32_t* page_table = nullptr;  // [batch, max_pages], contiguous; null: not paged
  int64_t max_pages = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
};

// Rotary embedding at positions that a call chooses: dims d and d + rotary_dim / 2 of a row turn
// together, by angle d of its position.
struct RopeParams {
  const float* cos_sin = nullptr;  // [max_positions, 2, rotary_dim / 2], contiguous; null: none
  int64_t max_positions = 0;
  int64_t rotary_dim = 0;
  RowsView<int32_t> k_positions;  // like indices: of an entry's first key; null: its index
  int64_t k_position_step = 1;    // from key to key of an entry: 0 or 1
  RowsView<int32_t> q_positions;  // [batch, 1, seqlen_q]; null: the token's place among the keys
  // Null where the table has no such position.
  LONGCTX_HD const float* row(int64_t position) const {
    return position < 0 || position >= max_positions ? nullptr : cos_sin + position * rotary_dim;
  }
};

// Attention of each query token over its own set of keys: the listed ones and those that are
// forced. With rope, the first keys stand at their indices, the last ones as far before the token's
// position as before its place; with a tree, at the positions of their tokens, and those before the
// tree as far before the position of its first token.
struct GatherAttentionParams {
  DType dtype = DType::kFloat32;
  SequenceParams seqs;
  TensorView q;         // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView k;         // [batch, num_kv_heads, seqlen_k, head_dim]
  TensorView v;         // [batch, num_kv_heads, seqlen_k, head_dim_v]
  TensorView out;       // [batch, num_q_heads, seqlen_q, head_dim_v]
  void* lse = nullptr;  // [batch, num_q_heads, seqlen_q] float (double for float64)
  PagesParams pages;
  RowsView<int32_t> indices;  // [batch, index_heads, seqlen_q, num_entries]: blocks of keys; a
                              // row_stride of 0 where all tokens share a row
  RowsView<float> bias;       // like indices: added to the scores of an entry's keys; null: none
  RowsView<int32_t> counts;   // [batch, index_heads, seqlen_q]: entries that count; null: all
  RowsView<bool> tree_mask;   // [batch, 1, seqlen_q]: -> [seqlen_q] which of the last seqlen_q keys
                              // the token sees, if no later ones; null: all
  RopeParams rope;
  int64_t num_entries = 0;
  int64_t index_heads = 1;   // 1, num_kv_heads or num_q_heads
  int64_t index_tokens = 1;  // seqlen_q, or 1: shared by all
  int64_t block_size_k = 1;  // keys of an entry
  int64_t num_first = 0;     // the first and the last keys a token may see are in its set
  int64_t num_last = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  double softmax_scale = 1.0;
  double softcap = 0.0;
  // Probabilities of the keys of each entry and, last, of the forced keys, summed over the query
  // heads and tokens that share the entry: [batch, index_heads, index_tokens, num_entries + 1],
  // contiguous; null: not wanted.
  float* key_mass = nullptr;
  // Attention over each entry alone and, last, over the forced keys:
  // [num_entries + 1, batch, num_q_heads, seqlen_q, head_dim_v] and [.., seqlen_q], contiguous;
  // null: not wanted.
  void* block_out = nullptr;
  void* block_lse = nullptr;
  // [batch * num_q_heads * seqlen_q] zeros, which stay zeros, for a backend to count in: saves a
  // launch on CUDA; null: none.
  uint32_t* workspace = nullptr;
};

// Rows of k and v by lists of keys: those of `counts`, in [0, seqused_k) and on a page that exists.
struct KVRowsParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen_k = 0;                // keys that a batch entry has room for
  const int32_t* seqused_k = nullptr;  // [batch]; null: seqlen_k
  PagesParams pages;
  RowsView<int32_t> indices;  // [batch, index_heads, num_entries]
  RowsView<int32_t> counts;   // [batch, index_heads]: entries that count; null: all
  int64_t num_entries = 0;
  int64_t index_heads = 1;  // 1 or num_kv_heads
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
};

struct GatherKVParams : KVRowsParams {
  TensorView k;           // [batch, num_kv_heads, seqlen_k, head_dim]
  TensorView v;           // [batch, num_kv_heads, seqlen_k, head_dim_v]
  void* k_out = nullptr;  // [batch, num_kv_heads, num_entries, head_dim], contiguous
  void* v_out = nullptr;  // [batch, num_kv_heads, num_entries, head_dim_v]
};

// The listed keys, as long as they ascend, move to the front of what may change: to key 0, or
// behind the keys before a draft, from whose first token they then count.
struct CompactKVParams : KVRowsParams {
  const TensorView* k_cache = nullptr;  // [num_layers] of [batch, num_kv_heads, seqlen_k, head_dim]
  const TensorView* v_cache = nullptr;  // [num_layers] of [.., head_dim_v]
  int64_t num_layers = 0;
  bool of_draft = false;         // indices may then be null: entry i is token i of the draft
  int64_t num_draft_tokens = 0;  // the last of the seqused_k keys
  int32_t* lengths = nullptr;    // [batch, index_heads]
};

enum class SummaryMethod : int32_t { kMinMax, kMean, kRepresentative, kPooled };

// A summary of each page of page_size keys; an update touches only the pages that hold keys at or
// after `start`.
struct SummarizePagesParams {
  DType dtype = DType::kFloat32;
  SummaryMethod method = SummaryMethod::kMinMax;
  SequenceParams seqs;  // batch, seqlen_k, seqused_k
  TensorView k;         // [batch, num_kv_heads, seqlen_k, head_dim]
  PagesParams pages;
  TensorView summary;     // [batch, heads, num_pages, head_dim]; kMinMax: [.., 2, head_dim], the
                          // minima before the maxima, adjacent
  int64_t page_size = 0;  // keys of a page of the summary
  int64_t num_pages = 0;
  int64_t heads = 0;  // of the summary: a multiple of num_kv_heads
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  RowsView<float> key_scores;       // kRepresentative: [batch, heads, 1, seqlen_k]
  int64_t num_representative = 0;   // kRepresentative: the best keys of a page that are averaged
  TensorView queries;               // kPooled: [batch, heads, num_pages, head_dim]
  double softmax_scale = 1.0;       // kPooled
  bool update = false;              // else every page is written
  int64_t start = 0;                // used where starts is null
  const int32_t* starts = nullptr;  // [batch]
};

// The first `counts` of `num_entries` new tokens become keys `start` and on; `indices` is not used.
struct AppendKVParams : KVRowsParams {
  TensorView k_cache;               // [batch, num_kv_heads, seqlen_k, head_dim]
  TensorView v_cache;               // [batch, num_kv_heads, seqlen_k, head_dim_v]
  TensorView k;                     // [batch, num_kv_heads, num_entries, head_dim]
  TensorView v;                     // [batch, num_kv_heads, num_entries, head_dim_v]
  int64_t start = 0;                // used where starts is null
  const int32_t* starts = nullptr;  // [batch]
  int32_t* lengths = nullptr;       // [batch]: the keys that there are then
  bool has_summary = false;
  SummarizePagesParams summary;  // of k_cache: an update from `start`, with `lengths` as seqused_k
};

// How scores of query heads and of query tokens become one. Heads are reduced first.
enum class HeadReduce : int32_t { kNone, kGroupMean, kGroupMax, kGroupSum, kAllSum };
enum class QueryReduce : int32_t { kNone, kMean, kMax };

// q . k of each query token and key, or candidate.
struct TokenScoresParams {
  DType dtype = DType::kFloat32;
  SequenceParams seqs;
  TensorView q;  // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView k;  // [batch, num_kv_heads, seqlen_k, head_dim]
  PagesParams pages;
  RowsView<int32_t> candidates;  // [batch, candidate_heads, candidate_rows, num_scores]; null: all
  int64_t candidate_heads = 1;   // 1, num_kv_heads or num_q_heads
  int64_t candidate_rows = 1;    // 1 or seqlen_q
  HeadReduce head_reduce = HeadReduce::kNone;
  QueryReduce query_reduce = QueryReduce::kNone;
  float* scores = nullptr;  // [batch, out heads, out rows, num_scores], contiguous
  int64_t num_scores = 0;   // seqlen_k, or the number of candidates
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  double softmax_scale = 1.0;
  double softcap = 0.0;
};

// The score of each query token and page, from a summary.
struct PageScoresParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  TensorView q;        // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView summary;  // [batch, summary_heads, num_pages, head_dim], or as of kMinMax
  bool minmax = true;  // else the summary is a key
  int64_t num_pages = 0;
  int64_t num_q_heads = 0;
  int64_t summary_heads = 0;  // divides num_q_heads
  int64_t head_dim = 0;
  double softmax_scale = 1.0;
  bool softmax = false;
  RowsView<int32_t> counts;  // [batch, summary_heads, 1, num_pages]: keys of a page; null: unknown
  const int32_t* seqused_k = nullptr;  // [batch]: keys at or beyond it do not exist
  int64_t page_size = 0;               // given with seqused_k
  HeadReduce head_reduce = HeadReduce::kNone;
  QueryReduce query_reduce = QueryReduce::kNone;
  float* scores = nullptr;  // [batch, out heads, out rows, num_pages], contiguous
};

// Lloyd's k-means of the keys of each (batch entry, head).
struct KMeansParams {
  DType dtype = DType::kFloat32;
  TensorView keys;            // [batch, heads, n, dim]
  RowsView<int32_t> counts;   // [batch, heads, n]: keys that a row stands for; null: 1
  RowsView<int32_t> lengths;  // [batch, heads]: rows at or beyond it do not exist; null: n
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t n = 0;
  int64_t dim = 0;
  int64_t num_clusters = 0;
  int64_t num_iters = 0;
  uint64_t seed = 0;
  bool cosine = false;                // rows are scaled to length 1, centroids given as they are
  void* centroids = nullptr;          // [batch, heads, num_clusters, dim], contiguous
  int32_t* labels = nullptr;          // [batch, heads, n]
  int32_t* cluster_counts = nullptr;  // [batch, heads, num_clusters]
};

struct MergeStatesParams {
  DType dtype = DType::kFloat32;
  const void* out = nullptr;           // [num_states, rows, dim], contiguous
  const void* lse = nullptr;           // [num_states, rows] float (double for float64)
  const void* lse_override = nullptr;  // like lse, or null: the weights used instead of lse
  void* merged_out = nullptr;          // [rows, dim]
  void* merged_lse = nullptr;          // [rows]
  int64_t num_states = 0;
  int64_t rows = 0;
  int64_t dim = 0;
};

// Softmax probability that the given query rows put on each key, segment of keys and diagonal.
struct AttentionMassParams {
  DType dtype = DType::kFloat32;
  SequenceParams seqs;
  MaskParams mask;
  TensorView q;                              // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView k;                              // [batch, num_kv_heads, seqlen_k, head_dim]
  const void* lse = nullptr;                 // [batch, num_q_heads, seqlen_q], contiguous
  const float* sinks = nullptr;              // [num_q_heads]: a logit that lse does not hold
  const int32_t* segment_offsets = nullptr;  // [num_segments + 1] or null
  int64_t num_segments = 0;
  float* key_mass = nullptr;       // [batch, num_q_heads, seqlen_k or num_segments], or null
  float* diagonal_mass = nullptr;  // [batch, num_q_heads, num_diagonals], or null
  int64_t num_diagonals = 0;       // seqlen_q + seqlen_k - 1
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  double softmax_scale = 1.0;
  double softcap = 0.0;
};

// The shape of a map from query blocks (rows) to key blocks (columns); see block_map.h.
struct BlockMapParams {
  SequenceParams seqs;
  int64_t num_q_blocks = 0;
  int64_t num_k_blocks = 0;
  int64_t block_size_q = 128;
  int64_t block_size_k = 128;
  bool causal = true;
  bool has_q_offset = false;  // else rows align bottom-right
  int64_t q_offset = 0;       // key position of the first query row, from seqused_k if given
};

enum class BlockScoreMethod : int32_t { kMean, kMaxMean, kAntidiagonal };

struct BlockScoresParams {
  DType dtype = DType::kFloat32;
  BlockMapParams map;
  TensorView q;  // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView k;  // [batch, num_kv_heads, seqlen_k, head_dim]
  BlockScoreMethod method = BlockScoreMethod::kMean;
  bool softmax = true;
  int64_t stride = 16;      // kAntidiagonal: rows per group; divides both block sizes
  float* scores = nullptr;  // [batch, num_q_heads, num_q_blocks, num_k_blocks], contiguous
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  double softmax_scale = 1.0;
};

enum class SelectMethod : int32_t { kTopK, kCumulative, kThreshold, kRelative };

struct SelectBlocksParams {
  BlockMapParams map;
  const float* scores = nullptr;  // [batch, heads, num_q_blocks, num_k_blocks], last dim contiguous
  int64_t scores_batch_stride = 0;
  int64_t scores_head_stride = 0;
  int64_t scores_row_stride = 0;
  int64_t heads = 0;
  SelectMethod method = SelectMethod::kTopK;
  bool per_row = true;                 // else one cut for the whole map of a head and sequence
  float value = 0.0f;                  // used where head_values is null
  const float* head_values = nullptr;  // [heads]
  int64_t num_first = 0;
  int64_t num_local = 0;
  int64_t max_blocks_per_row = 0;
  int64_t* block_indptr = nullptr;   // [batch, heads, num_q_blocks + 1]
  int32_t* block_indices = nullptr;  // [capacity]
  int64_t capacity = 0;              // batch * heads * num_q_blocks * max_blocks_per_row
};

constexpr int kMaxRowDims = 8;

// Rows of scores: a [..., n] tensor whose last dim is contiguous; the other dims make the rows.
struct ScoreRows {
  DType dtype = DType::kFloat32;  // not float64
  const void* data = nullptr;
  int64_t n = 0;
  int64_t num_rows = 0;
  int num_dims = 0;  // without the last
  int64_t sizes[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};
  const int32_t* lengths = nullptr;  // [num_rows]: scores at or beyond it do not exist; null: n
};

struct TopKSelectParams {
  ScoreRows scores;
  int64_t k = 0;  // entries of a row of indices, forced ones included
  int64_t num_first = 0;
  int64_t num_last = 0;
  int32_t* indices = nullptr;  // [num_rows, k], contiguous
  int32_t* counts = nullptr;   // [num_rows]
};

// Fewer than k where the rule chooses fewer: scores of at least `value`, or the fewest that hold
// the share `value` of the row's softmax.
struct ThresholdSelectParams : TopKSelectParams {
  bool cumulative = false;
  float value = 0.0f;
};

// Log decays, <= 0, of linear attention: [num_q_heads], or per_token [batch, num_q_heads, seqlen].
struct LogDecay {
  const void* data = nullptr;  // contiguous; null: no decay
  bool is_double = false;      // else float
  bool per_token = false;
};

// State S_t = exp(log_decay) S_{t-1} + k_t v_t^T of every (sequence, query head), float (double for
// float64). With `normalize` v has one more column, of ones: state_dim is head_dim_v + 1.
struct LinearAttentionParams {
  DType dtype = DType::kFloat32;
  SequenceParams seqs;  // packed: the same offsets for q and k
  TensorView q;         // [batch, num_q_heads, seqlen_q, head_dim]; null data: states only
  TensorView k;         // [batch, num_kv_heads, seqlen_k, head_dim]
  TensorView v;         // [batch, num_kv_heads, seqlen_k, head_dim_v]
  TensorView out;       // [batch, num_q_heads, seqlen_q, head_dim_v]; null data: states only
  LogDecay log_decay;
  const void* initial_state = nullptr;  // [num_seqs, num_q_heads, head_dim, state_dim]; null: zero
  void* final_state = nullptr;          // like initial_state; null: not wanted
  // [batch, num_q_heads, num_chunks, head_dim, state_dim]: the state after every chunk (reverse:
  // before it), or null.
  // Packed: a sequence owns the next ceil(length / kLinearChunk) chunks; the rest is zero.
  void* chunk_states = nullptr;
  int64_t num_chunks = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  bool causal = true;  // else every row sees every key, with weight exp(log_decay |i - j|)
  // Causal from the other end: from the last token to the first S_t = R_{t+1} + k_t v_t^T and
  // R_t = exp(log_decay_t) S_t; initial_state stands behind the last token, and R_t is the state
  // before token t, the final one and those of chunks.
  bool reverse = false;
  bool normalize = false;
  bool wide_out = false;  // out is float (double for float64): accumulated rows, not rounded
  double scale = 1.0;
  double eps = 1e-6;
  // Per sequence; 0: chosen from shape and thread count. The CPU cuts causal sequences alone.
  int64_t num_segments = 0;
  LONGCTX_HD int64_t state_dim() const { return head_dim_v + (normalize ? 1 : 0); }
};

// A few tokens at a time on a pool of states that is updated in place.
struct LinearAttentionDecodeParams {
  DType dtype = DType::kFloat32;
  TensorView q;                            // [batch, num_q_heads, num_tokens, head_dim]
  TensorView k;                            // [batch, num_kv_heads, num_tokens, head_dim]
  TensorView v;                            // [batch, num_kv_heads, num_tokens, head_dim_v]
  TensorView out;                          // [batch, num_q_heads, num_tokens, head_dim_v]
  LogDecay log_decay;                      // per_token: [batch, num_q_heads, num_tokens]
  TensorView state;                        // [num_slots, num_q_heads, head_dim, state_dim]
  const int32_t* state_indices = nullptr;  // [batch]; outside [0, num_slots): skipped; null: b
  const int32_t* commit = nullptr;         // [batch]: tokens that the state keeps; null: all
  int64_t batch = 0;
  int64_t num_slots = 0;
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  bool normalize = false;
  double scale = 1.0;
  double eps = 1e-6;
  LONGCTX_HD int64_t state_dim() const { return head_dim_v + (normalize ? 1 : 0); }
};

}  // namespace longctx
