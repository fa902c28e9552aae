#include "attention_check.h"

#include <gtest/gtest.h>

#include "cuda/kernels.h"
#include "cuda/sm90/attention.h"

namespace longctx::simt_tests {
namespace {

// Softmax of the seen scores times v; [batch, num_q_heads, seqlen_q, head_dim_v] and the lse. A row
// that sees nothing, or belongs to no sequence, gives 0 and -inf.
void expected_attention(const Problem& problem, Tensor& out, Tensor& lse) {
  const Case& c = problem.c;
  out = Tensor(DType::kFloat64, c.batch, c.num_q_heads, c.seqlen_q, c.head_dim_v);
  lse = Tensor(DType::kFloat64, c.batch, c.num_q_heads, c.seqlen_q, 1);
  out.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) { out.set(b, h, row, d, 0); });
  lse.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) { lse.set(b, h, row, d, -kInf); });
  problem.for_each_row([&](const Sequence& seq, int64_t head, int64_t row) {
    const int64_t kv_head = head * c.num_kv_heads / c.num_q_heads;
    const double row_lse = problem.lse(seq, head, row);
    lse.set(seq.batch_index, head, seq.q_begin + row, 0, row_lse);
    if (row_lse == -kInf) return;
    const double denominator = std::exp(row_lse) + std::exp(problem.sink(head));
    std::vector<double> sum(static_cast<size_t>(c.head_dim_v));
    for (int64_t key = 0; key < seq.k_len; ++key) {
      if (!problem.sees(seq, head, row, key)) continue;
      const double weight = std::exp(problem.score(seq, head, row, key)) / denominator;
      for (int64_t d = 0; d < c.head_dim_v; ++d) {
        sum[d] += weight * problem.v.get(seq.batch_index, kv_head, seq.k_begin + key, d);
      }
    }
    for (int64_t d = 0; d < c.head_dim_v; ++d) {
      out.set(seq.batch_index, head, seq.q_begin + row, d, sum[d]);
    }
  });
}

}  // namespace

void check_attention(const Case& c, bool hopper) {
  Problem problem(c);
  Tensor expected_out, expected_lse;
  expected_attention(problem, expected_out, expected_lse);
  double largest = 0;
  expected_out.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
    largest = std::fmax(largest, std::fabs(expected_out.get(b, h, row, d)));
  });
  // Weights and results are rounded to the type; float32 has the error of the exponential.
  const double tolerance = 3 * std::fmax(unit(c.dtype), 0x1p-20) * largest;
  in_every_mode([&] {
    simt::mode.hopper = hopper;
    Tensor out(c.dtype, c.batch, c.num_q_heads, c.seqlen_q, c.head_dim_v, c.layout);
    Tensor lse(DType::kFloat32, c.batch, c.num_q_heads, c.seqlen_q, 1);
    const AttentionParams params = problem.attention_params(out, lse);
    const BlockList list = problem.block_list();
    const char* why_not = "";
    if (hopper) {
      ASSERT_TRUE(cuda::sm90::supports(params, c.block_size_q == 0 ? nullptr : &list,
                                       cuda::device_limits(), &why_not))
          << why_not;
    }
    if (c.block_size_q == 0) {
      cuda::run_attention_cuda(params);
    } else {
      cuda::run_block_sparse_attention_cuda({params, list});
    }
    out.expect_gaps_untouched();
    lse.for_each([&](int64_t b, int64_t h, int64_t row, int64_t) {
      const std::string where = " of head " + std::to_string(h) + ", row " + std::to_string(row) +
                                " of " + std::to_string(b);
      expect_close(lse.get(b, h, row, 0), expected_lse.get(b, h, row, 0), 1e-4, "lse" + where);
      for (int64_t d = 0; d < c.head_dim_v; ++d) {
        expect_close(out.get(b, h, row, d), expected_out.get(b, h, row, d), tolerance,
                     "out" + where);
      }
    });
  });
}

}  // namespace longctx::simt_tests
