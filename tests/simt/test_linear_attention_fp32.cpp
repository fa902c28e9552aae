#include <gtest/gtest.h>

#include "linear_check.h"

namespace longctx::simt_tests {
namespace {

LinearCase wide() {
  LinearCase c;
  c.dtype = DType::kFloat32;
  return c;
}
LinearCase narrow() {
  LinearCase c = wide();
  c.head_dim = c.head_dim_v = 64;
  return c;
}

TEST(linear_attention_fp32, two_slices_of_head_dim) { check_linear(wide()); }
TEST(linear_attention_fp32, unaligned_rows) {
  LinearCase c = wide();
  c.layout = Layout::kOdd;
  c.head_dim = 77;
  c.head_dim_v = 71;
  c.decay = Decay::kPerToken;
  check_linear(c);
}
TEST(linear_attention_fp32, normalize_per_token) {
  LinearCase c = wide();
  c.layout = Layout::kRowsFirst;
  c.normalize = true;
  c.decay = Decay::kPerToken;
  c.batch = 2;
  check_linear(c);
}
TEST(linear_attention_fp32, no_decay_no_state) {
  LinearCase c = narrow();
  c.decay = Decay::kNone;
  c.initial_state = false;
  check_linear(c);
}
TEST(linear_attention_fp32, reverse_segments) {
  LinearCase c = narrow();
  c.reverse = true;
  c.decay = Decay::kPerToken;
  c.seqlen_q = c.seqlen_k = 260;
  c.num_segments = 3;
  check_linear(c);
}
TEST(linear_attention_fp32, segments) {
  LinearCase c = wide();
  c.seqlen_q = c.seqlen_k = 260;
  c.num_q_heads = 1;
  c.num_segments = 2;
  c.normalize = true;
  check_linear(c);
}
TEST(linear_attention_fp32, packed) {
  LinearCase c = narrow();
  c.cu_seqlens = {0, 0, 17, 81, 81, 140};
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention_fp32, all_keys) {
  LinearCase c = wide();
  c.causal = false;
  c.normalize = true;
  c.decay = Decay::kPerToken;
  check_linear(c);
}
TEST(linear_attention_fp32, all_keys_without_decay) {
  LinearCase c = narrow();
  c.causal = false;
  c.decay = Decay::kNone;
  check_linear(c);
}
TEST(linear_attention_fp32, more_queries_than_keys) {
  LinearCase c = narrow();
  c.causal = false;
  c.seqlen_k = 70;
  c.normalize = true;
  check_linear(c);
}
TEST(linear_attention_fp32, no_key) {
  LinearCase c = narrow();
  c.causal = false;
  c.seqlen_k = 0;
  check_linear(c);
}
TEST(linear_attention_fp32, states) {
  LinearCase c = wide();
  c.rows = false;
  c.normalize = true;
  check_linear(c);
}
TEST(linear_attention_fp32, states_reverse_packed) {
  LinearCase c = narrow();
  c.rows = false;
  c.reverse = true;
  c.cu_seqlens = {0, 70, 70, 140};
  check_linear(c);
}
TEST(linear_attention_fp32, resumes_bitwise) {
  LinearCase c = narrow();
  c.decay = Decay::kPerToken;
  c.num_q_heads = 1;
  check_linear_resumes(c);
}

}  // namespace
}  // namespace longctx::simt_tests
