#include <gtest/gtest.h>

#include "attention_problem.h"
#include "cuda/kernels.h"

namespace longctx::simt_tests {
namespace {

struct Mass {
  std::vector<double> by_key;       // [batch, num_q_heads, seqlen_k]
  std::vector<double> by_diagonal;  // [batch, num_q_heads, seqlen_q + seqlen_k - 1]
};

// The probabilities exp(score - lse), summed over the query rows. Diagonals count from the last row
// backwards.
Mass expected_mass(const Problem& problem) {
  const Case& c = problem.c;
  const int64_t diagonals = std::max<int64_t>(c.seqlen_q + c.seqlen_k - 1, 0);
  Mass mass;
  mass.by_key.resize(static_cast<size_t>(c.batch * c.num_q_heads * c.seqlen_k));
  mass.by_diagonal.resize(static_cast<size_t>(c.batch * c.num_q_heads * diagonals));
  problem.for_each_row([&](const Sequence& seq, int64_t head, int64_t row) {
    const int64_t map = seq.batch_index * c.num_q_heads + head;
    const double total = std::exp(problem.lse(seq, head, row)) + std::exp(problem.sink(head));
    for (int64_t key = 0; key < seq.k_len; ++key) {
      if (!problem.sees(seq, head, row, key)) continue;
      const double p = std::exp(problem.score(seq, head, row, key)) / total;
      mass.by_key[map * c.seqlen_k + seq.k_begin + key] += p;
      mass.by_diagonal[map * diagonals + seq.q_begin + seq.k_begin + key - row + seq.q_len - 1] +=
          p;
    }
  });
  return mass;
}

// `segments`: offsets into the key axis, or empty.
void check(const Case& c, bool by_key = true, bool by_diagonal = true,
           const std::vector<int32_t>& segments = {}) {
  Problem problem(c);
  Tensor lse(DType::kFloat32, c.batch, c.num_q_heads, c.seqlen_q, 1);
  problem.for_each_row([&](const Sequence& seq, int64_t head, int64_t row) {
    lse.set(seq.batch_index, head, seq.q_begin + row, 0, problem.lse(seq, head, row));
  });
  Mass expected = expected_mass(problem);
  const int64_t maps = c.batch * c.num_q_heads;
  if (!segments.empty()) {
    std::vector<double> sums;
    for (int64_t map = 0; map < maps; ++map) {
      for (size_t s = 0; s + 1 < segments.size(); ++s) {
        sums.push_back(0);
        for (int64_t key = segments[s]; key < segments[s + 1]; ++key) {
          sums.back() += expected.by_key[map * c.seqlen_k + key];
        }
      }
    }
    expected.by_key = sums;
  }
  in_every_mode([&] {
    constexpr float kUnwritten = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> keys(by_key ? expected.by_key.size() : 0, kUnwritten);
    std::vector<float> diagonals(by_diagonal ? expected.by_diagonal.size() : 0, kUnwritten);
    AttentionMassParams params;
    params.dtype = c.dtype;
    params.seqs = problem.sequence_params();
    params.mask = problem.mask_params();
    params.q = problem.q.view();
    params.k = problem.k.view();
    params.lse = lse.data();
    params.sinks = data_or_null(problem.sinks);
    params.segment_offsets = data_or_null(segments);
    params.num_segments = segments.empty() ? 0 : static_cast<int64_t>(segments.size()) - 1;
    params.key_mass = by_key ? keys.data() : nullptr;
    params.diagonal_mass = by_diagonal ? diagonals.data() : nullptr;
    params.num_diagonals = std::max<int64_t>(c.seqlen_q + c.seqlen_k - 1, 0);
    params.num_q_heads = c.num_q_heads;
    params.num_kv_heads = c.num_kv_heads;
    params.head_dim = c.head_dim;
    params.softmax_scale = problem.scale;
    params.softcap = c.softcap;
    cuda::run_attention_mass_cuda(params);
    for (size_t i = 0; i < keys.size(); ++i) {
      expect_close(keys[i], expected.by_key[i], 1e-4 * (1 + expected.by_key[i]),
                   "key " + std::to_string(i));
    }
    for (size_t i = 0; i < diagonals.size(); ++i) {
      expect_close(diagonals[i], expected.by_diagonal[i], 1e-4 * (1 + expected.by_diagonal[i]),
                   "diagonal " + std::to_string(i));
    }
  });
}

Case sized(DType dtype, int64_t seqlen_q, int64_t seqlen_k) {
  Case c;
  c.dtype = dtype;
  c.head_dim = dtype == DType::kBFloat16 ? 128 : 64;
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  return c;
}

TEST(attention_mass, bfloat16) { check(sized(DType::kBFloat16, 70, 150)); }
TEST(attention_mass, float16_rows_first) {
  Case c = sized(DType::kFloat16, 140, 140);
  c.layout = Layout::kRowsFirst;
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  check(c);
}
TEST(attention_mass, float32_all_keys) {
  Case c = sized(DType::kFloat32, 33, 65);
  c.causal = false;
  check(c);
}
TEST(attention_mass, keys_alone) { check(sized(DType::kFloat16, 40, 90), true, false); }
TEST(attention_mass, diagonals_alone) { check(sized(DType::kFloat16, 40, 90), false, true); }
TEST(attention_mass, segments) {
  check(sized(DType::kFloat16, 40, 200), true, false, {0, 7, 7, 130, 200});
}
TEST(attention_mass, one_query) { check(sized(DType::kBFloat16, 1, 300)); }
TEST(attention_mass, more_queries_than_keys) { check(sized(DType::kFloat16, 80, 20)); }
TEST(attention_mass, no_key) { check(sized(DType::kFloat16, 5, 0)); }
TEST(attention_mass, no_query) { check(sized(DType::kFloat16, 0, 5)); }
TEST(attention_mass, unaligned_rows) {
  Case c = sized(DType::kFloat16, 35, 70);
  c.layout = Layout::kOdd;
  c.head_dim = 33;
  check(c);
}
TEST(attention_mass, window_softcap_sinks) {
  Case c = sized(DType::kFloat16, 90, 90);
  c.window_size_left = 30;
  c.num_sink_tokens = 2;
  c.softcap = 5;
  c.sinks = true;
  check(c);
}
TEST(attention_mass, key_ranges) {
  Case c = sized(DType::kFloat16, 50, 90);
  c.num_key_ranges = 2;
  check(c);
}
TEST(attention_mass, seqused_k) {
  Case c = sized(DType::kFloat16, 30, 130);
  c.batch = 3;
  c.seqused_k = {130, 0, 77};
  check(c);
}
TEST(attention_mass, packed) {
  Case c = sized(DType::kFloat16, 100, 120);
  c.cu_seqlens_q = {0, 0, 33, 33, 34, 100};
  c.cu_seqlens_k = {0, 5, 40, 40, 60, 120};
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
