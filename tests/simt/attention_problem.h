// An attention problem with random inputs, and what it must give: loops over rows and keys in
// float64, written from the definition of the ops and sharing nothing with include/longctx but the
// params.
#pragma once
#include <vector>

#include "tensors.h"

namespace longctx::simt_tests {

struct Case {
  DType dtype = DType::kFloat16;
  int64_t batch = 1, num_q_heads = 2, num_kv_heads = 1, seqlen_q = 70, seqlen_k = 70;
  int64_t head_dim = 64, head_dim_v = 64;
  Layout layout = Layout::kHeadsFirst;
  bool causal = true;
  int64_t window_size_left = -1, window_size_right = -1, num_sink_tokens = 0;
  double softcap = 0.0;
  bool sinks = false;
  int64_t num_key_ranges = 0;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, seqused_k;

  // Block list; 0: none.
  int64_t block_size_q = 0, block_size_k = 64;
  int64_t pattern_batch = 1, pattern_heads = 1;
  double density = 0.5;
  bool bad_entries = false;  // of other sizes, in no order: to be skipped
};

struct Sequence {
  int64_t batch_index, q_begin, q_len, k_begin, k_len;
  int64_t first_block;  // its first row of the block list
};

class Problem {
 public:
  explicit Problem(const Case& c, unsigned seed = 1);

  // softcap * tanh(scale * q . k / softcap)
  double score(const Sequence& seq, int64_t head, int64_t row, int64_t key) const;
  // By the mask and the block list; row and key count from the sequence's first.
  bool sees(const Sequence& seq, int64_t head, int64_t row, int64_t key) const;
  // log of the sum of exp(score) over what is seen
  double lse(const Sequence& seq, int64_t head, int64_t row) const;
  double sink(int64_t head) const { return sinks.empty() ? -kInf : sinks[head]; }

  template <class Visit>
  void for_each_row(const Visit& visit) const {  // visit(seq, head, row)
    for (const Sequence& seq : sequences) {
      for (int64_t head = 0; head < c.num_q_heads; ++head) {
        for (int64_t row = 0; row < seq.q_len; ++row) visit(seq, head, row);
      }
    }
  }

  SequenceParams sequence_params() const;
  MaskParams mask_params() const;
  BlockList block_list() const;
  AttentionParams attention_params(Tensor& out, Tensor& lse_out);

  const Case c;
  const double scale;
  std::vector<Sequence> sequences;
  Tensor q, k, v;
  std::vector<float> sinks;
  std::vector<int32_t> key_ranges;  // [batch, num_key_ranges, seqlen_q, 2]
  std::vector<int64_t> block_indptr;
  std::vector<int32_t> block_indices;
  int64_t num_q_blocks = 0;

 private:
  void make_sequences();
  void make_blocks(std::mt19937& rng);
  bool listed(const Sequence& seq, int64_t head, int64_t row, int64_t key) const;
};

}  // namespace longctx::simt_tests
