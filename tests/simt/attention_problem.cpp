#include "attention_problem.h"

#include <algorithm>

namespace longctx::simt_tests {

Problem::Problem(const Case& c, unsigned seed)
    : c(c),
      scale(1.0 / std::sqrt(static_cast<double>(c.head_dim))),
      q(c.dtype, c.batch, c.num_q_heads, c.seqlen_q, c.head_dim, c.layout),
      k(c.dtype, c.batch, c.num_kv_heads, c.seqlen_k, c.head_dim, c.layout),
      v(c.dtype, c.batch, c.num_kv_heads, c.seqlen_k, c.head_dim_v, c.layout) {
  std::mt19937 rng(seed);
  make_sequences();
  // Rows and keys of no sequence stay NaN.
  std::normal_distribution<double> normal;
  const auto fill = [&](Tensor& tensor, int64_t batch_index, int64_t begin, int64_t length) {
    for (int64_t head = 0; head < tensor.size(1); ++head) {
      for (int64_t row = begin; row < begin + length; ++row) {
        for (int64_t d = 0; d < tensor.size(3); ++d) {
          tensor.set(batch_index, head, row, d, normal(rng));
        }
      }
    }
  };
  for (const Sequence& seq : sequences) {
    fill(q, seq.batch_index, seq.q_begin, seq.q_len);
    fill(k, seq.batch_index, seq.k_begin, seq.k_len);
    fill(v, seq.batch_index, seq.k_begin, seq.k_len);
  }
  for (int64_t head = 0; c.sinks && head < c.num_q_heads; ++head) {
    sinks.push_back(static_cast<float>(normal(rng)));
  }
  // Every third row sees nothing through its first range.
  const auto below = [&](int64_t bound) { return static_cast<int32_t>(rng() % bound); };
  for (int64_t i = 0; i < c.batch * c.num_key_ranges * c.seqlen_q; ++i) {
    const int32_t begin = below(c.seqlen_k + 1), length = below(c.seqlen_k / 2 + 1);
    key_ranges.push_back(begin);
    key_ranges.push_back(i % 3 == 2 ? begin - 1 : begin + length);
  }
  make_blocks(rng);
}

void Problem::make_sequences() {
  if (c.cu_seqlens_q.empty()) {
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t k_len = c.seqused_k.empty() ? c.seqlen_k : c.seqused_k[b];
      sequences.push_back({b, 0, c.seqlen_q, 0, k_len, 0});
    }
    if (c.block_size_q > 0) num_q_blocks = (c.seqlen_q + c.block_size_q - 1) / c.block_size_q;
    return;
  }
  for (size_t s = 0; s + 1 < c.cu_seqlens_q.size(); ++s) {
    const int32_t *at_q = &c.cu_seqlens_q[s], *at_k = &c.cu_seqlens_k[s];
    sequences.push_back({0, at_q[0], at_q[1] - at_q[0], at_k[0], at_k[1] - at_k[0], num_q_blocks});
    if (c.block_size_q == 0) continue;
    num_q_blocks += (sequences.back().q_len + c.block_size_q - 1) / c.block_size_q;
  }
}

void Problem::make_blocks(std::mt19937& rng) {
  if (c.block_size_q == 0) return;
  std::bernoulli_distribution chosen(c.density);
  const auto num_k_blocks =
      static_cast<int32_t>((c.seqlen_k + c.block_size_k - 1) / c.block_size_k);
  for (int64_t map = 0; map < c.pattern_batch * c.pattern_heads; ++map) {
    for (int64_t row = 0; row < num_q_blocks; ++row) {
      block_indptr.push_back(static_cast<int64_t>(block_indices.size()));
      for (int32_t block = 0; block < num_k_blocks; ++block) {
        if (c.bad_entries && rng() % 4 == 0) {
          const int32_t bad[] = {-1, block - 2, num_k_blocks, INT32_MAX, INT32_MIN};
          block_indices.push_back(bad[rng() % 5]);
        }
        if (row % 5 != 3 && chosen(rng)) block_indices.push_back(block);  // some rows are empty
      }
    }
    block_indptr.push_back(static_cast<int64_t>(block_indices.size()));
  }
  block_indices.insert(block_indices.end(), 3, -1);
}

// An entry counts if it is a block of the sequence and larger than those that have counted before.
bool Problem::listed(const Sequence& seq, int64_t head, int64_t row, int64_t key) const {
  if (c.block_size_q == 0) return true;
  const int64_t map = (c.pattern_batch == 1 ? 0 : seq.batch_index) * c.pattern_heads +
                      head * c.pattern_heads / c.num_q_heads;
  const int64_t* indptr =
      block_indptr.data() + map * (num_q_blocks + 1) + seq.first_block + row / c.block_size_q;
  int64_t last = -1;
  for (int64_t i = indptr[0]; i < indptr[1]; ++i) {
    const int64_t block = block_indices[i];
    if (block <= last || block * c.block_size_k >= seq.k_len) continue;
    if (block == key / c.block_size_k) return true;
    last = block;
  }
  return false;
}

bool Problem::sees(const Sequence& seq, int64_t head, int64_t row, int64_t key) const {
  const int64_t position = row + seq.k_len - seq.q_len;
  if (c.causal && key > position) return false;
  const bool in_window = (c.window_size_left < 0 || key >= position - c.window_size_left) &&
                         (c.window_size_right < 0 || key <= position + c.window_size_right);
  if (!in_window && key >= c.num_sink_tokens) return false;
  bool in_ranges = c.num_key_ranges == 0;
  for (int64_t r = 0; r < c.num_key_ranges; ++r) {
    const int32_t* range =
        &key_ranges[((seq.batch_index * c.num_key_ranges + r) * c.seqlen_q + seq.q_begin + row) *
                    2];
    in_ranges |= range[0] <= seq.k_begin + key && seq.k_begin + key < range[1];
  }
  return in_ranges && listed(seq, head, row, key);
}

double Problem::score(const Sequence& seq, int64_t head, int64_t row, int64_t key) const {
  const int64_t kv_head = head * c.num_kv_heads / c.num_q_heads;
  double dot = 0;
  for (int64_t d = 0; d < c.head_dim; ++d) {
    dot += q.get(seq.batch_index, head, seq.q_begin + row, d) *
           k.get(seq.batch_index, kv_head, seq.k_begin + key, d);
  }
  return c.softcap > 0 ? c.softcap * std::tanh(scale * dot / c.softcap) : scale * dot;
}

double Problem::lse(const Sequence& seq, int64_t head, int64_t row) const {
  double sum = 0;
  for (int64_t key = 0; key < seq.k_len; ++key) {
    if (sees(seq, head, row, key)) sum += std::exp(score(seq, head, row, key));
  }
  return std::log(sum);
}

SequenceParams Problem::sequence_params() const {
  SequenceParams params;
  params.batch = c.batch;
  params.num_seqs = static_cast<int64_t>(sequences.size());
  params.seqlen_q = c.seqlen_q;
  params.seqlen_k = c.seqlen_k;
  params.cu_seqlens_q = data_or_null(c.cu_seqlens_q);
  params.cu_seqlens_k = data_or_null(c.cu_seqlens_k);
  params.seqused_k = data_or_null(c.seqused_k);
  return params;
}

MaskParams Problem::mask_params() const {
  MaskParams mask;
  mask.causal = c.causal;
  mask.window_size_left = c.window_size_left;
  mask.window_size_right = c.window_size_right;
  mask.num_sink_tokens = c.num_sink_tokens;
  mask.key_ranges = data_or_null(key_ranges);
  mask.num_key_ranges = c.num_key_ranges;
  mask.key_ranges_batch_stride = c.num_key_ranges * c.seqlen_q * 2;
  mask.key_ranges_range_stride = c.seqlen_q * 2;
  mask.key_ranges_row_stride = 2;
  return mask;
}

BlockList Problem::block_list() const {
  return {block_indptr.data(), block_indices.data(), static_cast<int64_t>(block_indices.size()),
          c.pattern_batch,     c.pattern_heads,      num_q_blocks,
          c.block_size_q,      c.block_size_k};
}

AttentionParams Problem::attention_params(Tensor& out, Tensor& lse_out) {
  AttentionParams params;
  params.dtype = c.dtype;
  params.seqs = sequence_params();
  params.mask = mask_params();
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = out.view();
  params.lse = lse_out.data();
  params.sinks = data_or_null(sinks);
  params.num_q_heads = c.num_q_heads;
  params.num_kv_heads = c.num_kv_heads;
  params.head_dim = c.head_dim;
  params.head_dim_v = c.head_dim_v;
  params.softmax_scale = scale;
  params.softcap = c.softcap;
  return params;
}

}  // namespace longctx::simt_tests
