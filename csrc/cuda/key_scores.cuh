// page_scores and token_scores: the products of query rows with keys, or with summaries of pages,
// and what heads and tokens make of them together.
//   scores    a block of threads has 64 keys and 8 of the query rows that share them; eight lanes
//             have a key, and four keys at a time. Extremes are a row of twice the length: the
//             negative part of the query meets the minima, the positive one the maxima.
//   softmax   the highest score and the sum of each query row
//   reduce    over heads, then over tokens. Where eight rows are all that is reduced, and there is
//             no softmax, the first launch does it.
#pragma once
#include "cuda/key_rows.cuh"
#include "cuda/softcap.cuh"

namespace longctx::cuda {

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * device::kWarpSize;
constexpr int kRowsAtOnce = 8;
constexpr int kKeyLanes = 8;
constexpr int kKeysOfLane = 4;
constexpr int kKeysOfWarp = device::kWarpSize / kKeyLanes * kKeysOfLane;
constexpr int kKeysOfBlock = kScoreWarps * kKeysOfWarp;
constexpr int kPart = kKeyLanes * kEight;  // elements of a row that its lanes have at a time

// What a score is that its token does not see, until the last step: a NaN that no product is.
constexpr uint32_t kHiddenBits = 0xffabcdefu;

struct KeyScores {
  SequenceParams seqs;  // seqlen_k: keys, or keys of all pages
  TensorView q;         // [batch, num_q_heads, seqlen_q, head_dim]
  TensorView rows;      // [batch, row_heads, num_rows, head_dim]; minmax: [.., 2, head_dim]
  PagesParams pages;
  RowsView<int32_t> candidates;  // [batch, candidate_heads, candidate_rows, num_scores]; null: all
  RowsView<int32_t> counts;      // [batch, row_heads, 1, num_rows]: 0: no such row; null: all exist
  bool minmax = false;
  bool aligned = false;
  int64_t num_rows = 0;
  int64_t row_keys = 1;  // keys that a row stands for; 0: every token sees every row
  int64_t num_q_heads = 0;
  int64_t row_heads = 0;
  int64_t list_heads = 0;  // whose query heads have the same rows: row_heads, or num_q_heads
  int64_t candidate_heads = 1;
  int64_t candidate_rows = 1;
  int64_t head_dim = 0;
  int64_t num_scores = 0;
  float scale = 1.0f;
  float softcap = 0.0f;
  bool softmax = false;
  HeadReduce head_reduce = HeadReduce::kNone;
  QueryReduce query_reduce = QueryReduce::kNone;
  bool fused = false;       // the first launch reduces
  float* each = nullptr;    // [batch, num_q_heads, seqlen_q, num_scores] before reductions
  float2* sums = nullptr;   // [batch, num_q_heads, seqlen_q]: highest score, sum; or null
  float* scores = nullptr;  // [batch, out heads, out rows, num_scores]

  // Query rows with the same list of keys: those of a list head, or of one token of it.
  LONGCTX_HD bool token_lists() const { return candidate_rows > 1; }
  LONGCTX_HD int64_t group() const { return num_q_heads / list_heads; }
  LONGCTX_HD int64_t unit_tokens() const { return token_lists() ? 1 : seqs.seqlen_q; }
  LONGCTX_HD int64_t unit_rows() const { return group() * unit_tokens(); }
  LONGCTX_HD int64_t num_units() const {
    return seqs.batch * list_heads * (token_lists() ? seqs.seqlen_q : 1);
  }
  LONGCTX_HD int64_t padded_dim() const { return (head_dim + kPart - 1) / kPart * kPart; }
  LONGCTX_HD int64_t query_floats() const { return (minmax ? 2 : 1) * padded_dim(); }
  LONGCTX_HD int64_t out_heads() const {
    if (head_reduce == HeadReduce::kNone) return num_q_heads;
    return head_reduce == HeadReduce::kAllSum ? 1 : row_heads;
  }
  LONGCTX_HD int64_t out_rows() const {
    return query_reduce == QueryReduce::kNone ? seqs.seqlen_q : 1;
  }
  LONGCTX_HD int64_t out_index(int64_t batch, int64_t head, int64_t row, int64_t n) const {
    return ((batch * out_heads() + head) * out_rows() + row) * num_scores + n;
  }
};

LONGCTX_DEVICE float hidden_score() {
  const uint32_t bits = kHiddenBits;
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}
LONGCTX_DEVICE bool is_hidden(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  return bits == kHiddenBits;
}

// Over `num_heads` heads, then over `num_tokens` tokens that see the key; score(head, token).
template <class Score>
LONGCTX_DEVICE float reduce_scores(const KeyScores& p, int64_t num_heads, int64_t num_tokens,
                                   const Score& score) {
  float sum = 0.0f, highest = -INFINITY;
  int64_t num_seen = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    float head_sum = 0.0f, head_highest = -INFINITY;
    bool seen = true;
    for (int64_t head = 0; head < num_heads; ++head) {
      const float own = score(head, token);
      seen &= !is_hidden(own);
      head_sum += own;
      head_highest = own > head_highest ? own : head_highest;
    }
    if (!seen) continue;
    if (p.head_reduce == HeadReduce::kGroupMean) head_sum /= static_cast<float>(num_heads);
    const float of_heads = p.head_reduce == HeadReduce::kGroupMax ? head_highest : head_sum;
    ++num_seen;
    sum += of_heads;
    highest = of_heads > highest ? of_heads : highest;
  }
  if (num_seen == 0) return -INFINITY;
  if (p.query_reduce == QueryReduce::kMax) return highest;
  return p.query_reduce == QueryReduce::kMean ? sum / static_cast<float>(num_seen) : sum;
}

// Query rows that share their keys, and which of them a block of threads has.
struct ScoreUnit {
  int64_t batch, list_head, first_token, first_row;

  LONGCTX_DEVICE ScoreUnit(const KeyScores& p, int64_t index, int64_t row) : first_row(row) {
    const int64_t tokens = p.token_lists() ? p.seqs.seqlen_q : 1;
    first_token = index % tokens;
    list_head = index / tokens % p.list_heads;
    batch = index / tokens / p.list_heads;
  }
  LONGCTX_DEVICE int64_t head(const KeyScores& p, int row) const {
    return list_head * p.group() + (first_row + row) / p.unit_tokens();
  }
  LONGCTX_DEVICE int64_t token(const KeyScores& p, int row) const {
    return first_token + (first_row + row) % p.unit_tokens();
  }
};

// Key n of a unit; a null row does not exist.
template <class T>
struct ScoredRow {
  const T* row = nullptr;
  int64_t position = 0;  // of its first key

  LONGCTX_DEVICE ScoredRow(const KeyScores& p, const ScoreUnit& unit, int64_t k_len, int64_t n) {
    if (n >= p.num_scores) return;
    int64_t index = n;
    if (p.candidates.data != nullptr) {
      const int64_t head = unit.list_head * p.candidate_heads / p.list_heads;
      index = p.candidates.row(unit.batch, head, p.token_lists() ? unit.first_token : 0)[n];
    }
    position = index * p.row_keys;
    const int64_t head = unit.list_head * p.row_heads / p.list_heads;
    if (index < 0 || index >= p.num_rows || (p.row_keys > 0 && position >= k_len)) return;
    if (p.counts.data != nullptr && p.counts.row(unit.batch, head, 0)[index] <= 0) return;
    const T* found = key_row<T>(p.rows, p.pages, unit.batch, head, index);
    const bool empty = p.minmax && device::widen(found[0]) > device::widen(found[p.head_dim]);
    if (!empty) row = found;
  }
};

// Grid: units * tiles of keys * chunks of rows, chunks running fastest.
template <class T>
LONGCTX_KERNEL(kScoreThreads, 2)
key_scores_kernel(const KeyScores p) {
  auto* const queries = reinterpret_cast<float*>(device::shared_memory());
  const int64_t num_chunks = (p.unit_rows() + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t num_tiles = (p.num_scores + kKeysOfBlock - 1) / kKeysOfBlock;
  const int64_t chunk = device::block_index() % num_chunks;
  const int64_t tile = device::block_index() / num_chunks % num_tiles;
  const ScoreUnit unit(p, device::block_index() / num_chunks / num_tiles, chunk * kRowsAtOnce);
  const int64_t rows_left = p.unit_rows() - unit.first_row;
  const int num_rows = rows_left < kRowsAtOnce ? static_cast<int>(rows_left) : kRowsAtOnce;
  const int dim = static_cast<int>(p.head_dim), padded = static_cast<int>(p.padded_dim());
  const int stride = static_cast<int>(p.query_floats());

  // load queries
  for (int i = device::thread_index(); i < kRowsAtOnce * padded; i += kScoreThreads) {
    const int row = i / padded, d = i % padded;
    float x = 0.0f;
    if (row < num_rows && d < dim) {
      x = p.scale *
          device::widen(static_cast<const T*>(
              p.q.data)[unit.batch * p.q.batch_stride + unit.head(p, row) * p.q.head_stride +
                        unit.token(p, row) * p.q.seq_stride + d]);
    }
    float* const to = queries + row * stride + d;
    to[0] = p.minmax && x > 0.0f ? 0.0f : x;
    if (p.minmax) to[padded] = x < 0.0f ? 0.0f : x;
  }
  device::sync_threads();

  // s = q k^T
  const int sub = device::lane_index() % kKeyLanes;
  const int64_t first_key = tile * kKeysOfBlock + device::warp_index() * kKeysOfWarp +
                            device::lane_index() / kKeyLanes * kKeysOfLane;
  const int64_t k_len = sequence_at(p.seqs, unit.batch).k_len;
  const T* rows[kKeysOfLane];
  int64_t positions[kKeysOfLane];
#pragma unroll
  for (int k = 0; k < kKeysOfLane; ++k) {
    const ScoredRow<T> scored(p, unit, k_len, first_key + k);
    rows[k] = scored.row;
    positions[k] = scored.position;
  }
  float acc[kRowsAtOnce][kKeysOfLane] = {};
  for (int half = 0; half < (p.minmax ? 2 : 1); ++half) {
    for (int first = sub * kEight; first < padded; first += kPart) {
      float keys[kKeysOfLane][kEight] = {};
#pragma unroll
      for (int k = 0; k < kKeysOfLane; ++k) {
        if (rows[k] != nullptr) load_eight(rows[k] + half * dim, first, dim, p.aligned, keys[k]);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (r >= num_rows) break;
        const float* from = queries + r * stride + half * padded + first;
        float x[kEight];
        load_eight(from, 0, kEight, true, x);
#pragma unroll
        for (int k = 0; k < kKeysOfLane; ++k) {
#pragma unroll
          for (int e = 0; e < kEight; ++e) acc[r][k] += x[e] * keys[k][e];
        }
      }
    }
  }

  // Lane `sub` gets the sums of row `sub`.
  float own[kKeysOfLane] = {};
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
    for (int k = 0; k < kKeysOfLane; ++k) {
      float sum = acc[r][k];
      for (int mask = 1; mask < kKeyLanes; mask *= 2) sum += device::shuffle_xor(sum, mask);
      own[k] = r == sub ? sum : own[k];
    }
  }
  // mask
  const int64_t token = unit.token(p, sub);
  const int64_t limit = sequence_at(p.seqs, unit.batch).diagonal() + token;
#pragma unroll
  for (int k = 0; k < kKeysOfLane; ++k) {
    if (p.softcap > 0.0f) own[k] = p.softcap * tanh_accurate(own[k] / p.softcap);
    const bool seen = rows[k] != nullptr && (p.row_keys == 0 || positions[k] <= limit);
    own[k] = seen ? own[k] : hidden_score();
  }

  if (!p.fused) {
    if (sub >= num_rows) return;
    const int64_t row = (unit.batch * p.num_q_heads + unit.head(p, sub)) * p.seqs.seqlen_q + token;
    for (int k = 0; k < kKeysOfLane; ++k) {
      if (first_key + k < p.num_scores) p.each[row * p.num_scores + first_key + k] = own[k];
    }
    return;
  }

  // reduce: all rows of the unit are here
  device::sync_threads();
  float* const tile_scores = queries;  // [kRowsAtOnce, kKeysOfBlock]
  for (int k = 0; k < kKeysOfLane; ++k) {
    tile_scores[sub * kKeysOfBlock + first_key - tile * kKeysOfBlock + k] = own[k];
  }
  device::sync_threads();
  const int tokens = static_cast<int>(p.unit_tokens()), group = static_cast<int>(p.group());
  const bool each_head = p.head_reduce == HeadReduce::kNone;
  const bool each_token = p.query_reduce == QueryReduce::kNone;
  const int out_heads = each_head ? group : 1, out_tokens = each_token ? tokens : 1;
  for (int i = device::thread_index(); i < out_heads * out_tokens * kKeysOfBlock;
       i += kScoreThreads) {
    const int key = i % kKeysOfBlock, row = i / kKeysOfBlock % out_tokens;
    const int head = i / kKeysOfBlock / out_tokens;
    const int64_t n = tile * kKeysOfBlock + key;
    if (n >= p.num_scores) continue;
    const float score =
        reduce_scores(p, each_head ? 1 : group, each_token ? 1 : tokens, [&](int64_t h, int64_t t) {
          return tile_scores[((head + h) * tokens + row + t) * kKeysOfBlock + key];
        });
    const int64_t out_head = each_head ? unit.list_head * group + head : unit.list_head;
    p.scores[p.out_index(unit.batch, out_head, unit.first_token + row, n)] = score;
  }
}

struct FloatSlots {
  float of_warp[kScoreWarps];
};

template <class Combine>
LONGCTX_DEVICE float combine_block(float value, const Combine& combine, FloatSlots& slots) {
  for (int mask = 1; mask < device::kWarpSize; mask *= 2) {
    value = combine(value, device::shuffle_xor(value, mask));
  }
  if (device::lane_index() == 0) slots.of_warp[device::thread_index() / device::kWarpSize] = value;
  device::sync_threads();
  value = slots.of_warp[0];
  for (int w = 1; w < kScoreWarps; ++w) value = combine(value, slots.of_warp[w]);
  device::sync_threads();
  return value;
}

// Grid: batch * num_q_heads * seqlen_q.
LONGCTX_KERNEL(kScoreThreads, 1) score_sums_kernel(const KeyScores p) {
  auto& slots = *reinterpret_cast<FloatSlots*>(device::shared_memory());
  const int64_t row = device::block_index();
  const int64_t head = row / p.seqs.seqlen_q % p.num_q_heads * p.row_heads / p.num_q_heads;
  const int64_t batch = row / p.seqs.seqlen_q / p.num_q_heads;
  const int32_t* counts = p.counts.data == nullptr ? nullptr : p.counts.row(batch, head, 0);
  const float* scores = p.each + row * p.num_scores;
  float top = -INFINITY;
  for (int64_t n = device::thread_index(); n < p.num_scores; n += kScoreThreads) {
    if (!is_hidden(scores[n])) top = fmaxf(top, scores[n]);
  }
  top = combine_block(top, [](float a, float b) { return fmaxf(a, b); }, slots);
  float sum = 0.0f;
  for (int64_t n = device::thread_index(); n < p.num_scores; n += kScoreThreads) {
    if (is_hidden(scores[n])) continue;
    sum += expf(scores[n] - top) * (counts == nullptr ? 1.0f : static_cast<float>(counts[n]));
  }
  sum = combine_block(sum, [](float a, float b) { return a + b; }, slots);
  if (device::thread_index() == 0) p.sums[row] = float2{top, sum};
}

// A thread an output.
LONGCTX_KERNEL(kScoreThreads, 1) reduce_scores_kernel(const KeyScores p) {
  const int64_t index = device::block_index() * kScoreThreads + device::thread_index();
  const int64_t n = index % p.num_scores;
  const int64_t out_row = index / p.num_scores % p.out_rows();
  const int64_t out_head = index / p.num_scores / p.out_rows() % p.out_heads();
  const int64_t batch = index / p.num_scores / p.out_rows() / p.out_heads();
  if (batch >= p.seqs.batch) return;
  const int64_t num_heads = p.num_q_heads / p.out_heads();
  const int64_t num_tokens = p.query_reduce == QueryReduce::kNone ? 1 : p.seqs.seqlen_q;
  p.scores[index] = reduce_scores(p, num_heads, num_tokens, [&](int64_t h, int64_t t) {
    const int64_t row =
        (batch * p.num_q_heads + out_head * num_heads + h) * p.seqs.seqlen_q + out_row + t;
    const float score = p.each[row * p.num_scores + n];
    if (!p.softmax || is_hidden(score)) return score;
    const float2 sums = p.sums[row];
    return expf(score - sums.x) / sums.y;
  });
}

}  // namespace longctx::cuda
