#include <gtest/gtest.h>

#include "linear_check.h"

namespace longctx::simt_tests {
namespace {

LinearCase narrow() {
  LinearCase c;
  c.dtype = DType::kFloat16;
  c.head_dim = c.head_dim_v = 64;
  return c;
}

TEST(linear_attention, bfloat16) { check_linear({}); }
TEST(linear_attention, bfloat16_few_columns) {
  LinearCase c;
  c.head_dim_v = 40;
  c.layout = Layout::kRowsFirst;
  check_linear(c);
}
TEST(linear_attention, bfloat16_long_rows) {
  LinearCase c;
  c.head_dim = 200;
  c.head_dim_v = 72;
  c.num_q_heads = 1;
  check_linear(c);
}
TEST(linear_attention, float16_per_token) {
  LinearCase c = narrow();
  c.decay = Decay::kPerToken;
  c.batch = 2;
  check_linear(c);
}
TEST(linear_attention, no_decay_no_state) {
  LinearCase c = narrow();
  c.decay = Decay::kNone;
  c.initial_state = false;
  check_linear(c);
}
TEST(linear_attention, unaligned_rows_and_two_slices) {
  LinearCase c = narrow();
  c.layout = Layout::kOdd;
  c.head_dim = 33;
  c.head_dim_v = 71;
  check_linear(c);
}
TEST(linear_attention, normalize) {
  LinearCase c;
  c.normalize = true;
  c.decay = Decay::kPerToken;
  check_linear(c);
}
TEST(linear_attention, reverse) {
  LinearCase c;
  c.reverse = true;
  c.wide_out = true;
  check_linear(c);
}
TEST(linear_attention, reverse_per_token_segments) {
  LinearCase c = narrow();
  c.reverse = true;
  c.decay = Decay::kPerToken;
  c.seqlen_q = c.seqlen_k = 260;
  c.num_segments = 3;
  check_linear(c);
}
TEST(linear_attention, segments) {
  LinearCase c;
  c.seqlen_q = c.seqlen_k = 260;
  c.num_q_heads = 1;
  c.num_segments = 2;
  c.normalize = true;
  check_linear(c);
}
TEST(linear_attention, more_segments_than_chunks) {
  LinearCase c = narrow();
  c.num_segments = 100;
  c.decay = Decay::kPerToken;
  c.initial_state = false;
  check_linear(c);
}
TEST(linear_attention, packed) {
  LinearCase c = narrow();
  c.decay = Decay::kPerToken;
  c.cu_seqlens = {0, 0, 17, 81, 81, 140};
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, all_keys) {
  LinearCase c = narrow();
  c.causal = false;
  c.normalize = true;
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, all_keys_per_token_wide) {
  LinearCase c;
  c.causal = false;
  c.decay = Decay::kPerToken;
  c.wide_out = true;
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, all_keys_without_decay) {
  LinearCase c;
  c.causal = false;
  c.decay = Decay::kNone;
  c.normalize = true;
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, more_queries_than_keys) {
  LinearCase c = narrow();
  c.causal = false;
  c.seqlen_k = 70;
  c.normalize = true;
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, more_keys_than_queries) {
  LinearCase c = narrow();
  c.causal = false;
  c.seqlen_q = 20;
  check_linear(c);
}
TEST(linear_attention, no_key) {
  LinearCase c = narrow();
  c.causal = false;
  c.seqlen_k = 0;
  check_linear(c);
}
TEST(linear_attention, no_token) {
  LinearCase c = narrow();
  c.seqlen_q = c.seqlen_k = 0;
  check_linear(c);
}
TEST(linear_attention, float16_beyond_its_range) {
  // Scores and states exceed the largest float16.
  LinearCase c = narrow();
  c.size = 100;
  c.wide_out = true;
  check_linear(c);
}
TEST(linear_attention, float16_weights_below_its_range) {
  LinearCase c = narrow();
  c.reverse = c.normalize = true;
  c.decay_size = 40;
  c.initial_state = false;
  check_linear(c);
}
TEST(linear_attention_states, per_token) {
  LinearCase c;
  c.rows = false;
  c.decay = Decay::kPerToken;
  check_linear(c);
}
TEST(linear_attention_states, reverse_normalize) {
  LinearCase c = narrow();
  c.rows = false;
  c.reverse = c.normalize = true;
  c.batch = 2;
  check_linear(c);
}
TEST(linear_attention_states, packed) {
  LinearCase c = narrow();
  c.rows = false;
  c.cu_seqlens = {0, 70, 70, 140};
  c.num_segments = 2;
  check_linear(c);
}
TEST(linear_attention, resumes_bitwise) {
  LinearCase c = narrow();
  c.decay = Decay::kPerToken;
  c.num_q_heads = 1;
  check_linear_resumes(c);
}

}  // namespace
}  // namespace longctx::simt_tests
