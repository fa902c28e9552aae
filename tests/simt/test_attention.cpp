// attention and block_sparse_attention.
#include <gtest/gtest.h>

#include "attention_check.h"

namespace longctx::simt_tests {
namespace {

void check(const Case& c) { check_attention(c, false); }

Case bfloat16(int64_t seqlen_q, int64_t seqlen_k) {
  Case c;
  c.dtype = DType::kBFloat16;
  c.head_dim = c.head_dim_v = 128;
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  return c;
}
Case float16(int64_t seqlen_q, int64_t seqlen_k) {
  Case c;
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  return c;
}
Case float32(int64_t seqlen_q, int64_t seqlen_k) {
  Case c = float16(seqlen_q, seqlen_k);
  c.dtype = DType::kFloat32;
  return c;
}

TEST(attention, bfloat16_causal) { check(bfloat16(130, 130)); }
TEST(attention, float16_all_keys) {
  Case c = float16(65, 129);
  c.causal = false;
  check(c);
}
TEST(attention, float32_causal) { check(float32(37, 70)); }
TEST(attention, one_query_many_keys) {  // the keys of a row are split over blocks
  Case c = bfloat16(1, 600);
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  check(c);
}
TEST(attention, one_query_with_sinks) {
  Case c = float16(1, 300);
  c.sinks = true;
  check(c);
}
TEST(attention, more_queries_than_keys) { check(float16(90, 33)); }  // rows that see nothing
TEST(attention, no_key) { check(float16(5, 0)); }
TEST(attention, no_query) { check(float16(0, 5)); }
TEST(attention, group_of_six) {
  Case c = float16(50, 50);
  c.num_q_heads = 6;
  c.batch = 2;
  check(c);
}
TEST(attention, rows_first) {
  Case c = bfloat16(40, 65);
  c.layout = Layout::kRowsFirst;
  c.num_kv_heads = 2;
  check(c);
}
TEST(attention, unaligned_rows) {
  Case c = float16(35, 70);
  c.layout = Layout::kOdd;
  check(c);
}
TEST(attention, float32_unaligned_rows) {
  Case c = float32(20, 45);
  c.layout = Layout::kOdd;
  check(c);
}
TEST(attention, odd_head_dims) {
  Case c = float16(33, 66);
  c.head_dim = 33;
  c.head_dim_v = 17;
  check(c);
}
TEST(attention, head_dim_beside_smaller_values) {
  Case c = bfloat16(20, 80);
  c.head_dim = 104;
  c.head_dim_v = 72;
  check(c);
}
TEST(attention, window_with_sink_tokens) {
  Case c = float16(140, 140);
  c.window_size_left = 20;
  c.num_sink_tokens = 3;
  check(c);
}
TEST(attention, two_sided_window) {
  Case c = float32(60, 80);
  c.causal = false;
  c.window_size_left = 9;
  c.window_size_right = 4;
  check(c);
}
TEST(attention, softcap_and_sinks) {
  Case c = bfloat16(70, 70);
  c.softcap = 5;
  c.sinks = true;
  check(c);
}
TEST(attention, key_ranges) {
  Case c = float16(70, 90);
  c.num_key_ranges = 2;
  c.batch = 2;
  check(c);
}
TEST(attention, one_key_range) {
  Case c = float16(40, 100);
  c.causal = false;
  c.num_key_ranges = 1;
  check(c);
}
TEST(attention, seqused_k) {
  Case c = float16(33, 130);
  c.batch = 4;
  c.num_q_heads = 1;
  c.seqused_k = {130, 0, 1, 65};
  check(c);
}
TEST(attention, packed) {
  Case c = float16(100, 120);
  c.cu_seqlens_q = {0, 0, 33, 33, 34, 100};
  c.cu_seqlens_k = {0, 5, 40, 40, 60, 120};
  check(c);
}
TEST(attention, packed_with_rows_of_no_sequence) {
  Case c = bfloat16(70, 70);
  c.cu_seqlens_q = {3, 40, 66};
  c.cu_seqlens_k = {1, 30, 69};
  check(c);
}
TEST(attention, packed_key_ranges) {
  Case c = float16(60, 60);
  c.cu_seqlens_q = {0, 25, 60};
  c.cu_seqlens_k = {0, 25, 60};
  c.num_key_ranges = 1;
  check(c);
}

class block_sparse_sizes : public testing::TestWithParam<int64_t> {};

TEST_P(block_sparse_sizes, bfloat16) {
  Case c = bfloat16(150, 200);
  c.block_size_q = 64;
  c.block_size_k = GetParam();
  c.pattern_heads = 2;
  check(c);
}
TEST_P(block_sparse_sizes, float16_bad_entries) {
  Case c = float16(70, 150);
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.pattern_heads = 2;
  c.block_size_q = 32;
  c.block_size_k = GetParam();
  c.bad_entries = true;
  c.density = 0.3;
  check(c);
}
TEST_P(block_sparse_sizes, float32_all_keys) {
  Case c = float32(40, 140);
  c.causal = false;
  c.block_size_q = 16;
  c.block_size_k = GetParam();
  check(c);
}
INSTANTIATE_TEST_SUITE_P(block_size_k, block_sparse_sizes, testing::Values(1, 8, 16, 32, 64, 128));

Case sparse(Case c, int64_t block_size_q, int64_t block_size_k) {
  c.block_size_q = block_size_q;
  c.block_size_k = block_size_k;
  return c;
}
TEST(block_sparse_attention, packed) {
  Case c = sparse(float16(100, 120), 16, 16);
  c.cu_seqlens_q = {0, 0, 33, 33, 34, 100};
  c.cu_seqlens_k = {0, 5, 40, 40, 60, 120};
  check(c);
}
TEST(block_sparse_attention, nothing_listed) {
  Case c = sparse(float16(40, 60), 32, 32);
  c.density = 0;
  check(c);
}
TEST(block_sparse_attention, everything_listed) {
  Case c = sparse(bfloat16(140, 260), 128, 128);
  c.density = 1;
  check(c);
}
TEST(block_sparse_attention, one_query_row) {
  Case c = sparse(float16(1, 500), 16, 8);
  c.num_q_heads = 4;
  check(c);
}
TEST(block_sparse_attention, masks) {
  Case c = sparse(float16(90, 130), 64, 8);
  c.window_size_left = 50;
  c.num_sink_tokens = 2;
  c.num_key_ranges = 2;
  c.softcap = 4;
  c.sinks = true;
  check(c);
}
TEST(block_sparse_attention, seqused_k_and_pattern_per_batch) {
  Case c = sparse(float16(40, 130), 32, 16);
  c.batch = c.pattern_batch = 3;
  c.seqused_k = {130, 0, 51};
  check(c);
}
TEST(block_sparse_attention, unaligned_rows) {
  Case c = sparse(float16(35, 90), 32, 1);
  c.layout = Layout::kOdd;
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
