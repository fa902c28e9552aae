// attention and block_sparse_attention by the Hopper kernel.
#include <gtest/gtest.h>

#include "attention_check.h"

namespace longctx::simt_tests {
namespace {

void check(const Case& c) { check_attention(c, true); }

Case bfloat16(int64_t seqlen_q, int64_t seqlen_k) {
  Case c;
  c.dtype = DType::kBFloat16;
  c.head_dim = c.head_dim_v = 128;
  c.num_q_heads = 1;
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  return c;
}
Case float16(int64_t seqlen_q, int64_t seqlen_k) {
  Case c = bfloat16(seqlen_q, seqlen_k);
  c.dtype = DType::kFloat16;
  c.head_dim = c.head_dim_v = 64;
  return c;
}
Case sparse(Case c, int64_t block_size_q, int64_t block_size_k) {
  c.block_size_q = block_size_q;
  c.block_size_k = block_size_k;
  return c;
}

TEST(sm90_attention, causal) { check(bfloat16(150, 150)); }
TEST(sm90_attention, more_tiles_than_stages) {
  Case c = bfloat16(40, 700);
  c.num_q_heads = 4;  // an item each: no splits
  c.num_kv_heads = 4;
  c.layout = Layout::kRowsFirst;
  check(c);
}
TEST(sm90_attention, splits) { check(bfloat16(20, 600)); }
TEST(sm90_attention, splits_with_sinks) {
  Case c = float16(1, 800);
  c.sinks = true;
  check(c);
}
TEST(sm90_attention, more_queries_than_keys) { check(float16(150, 60)); }
TEST(sm90_attention, group_of_six) {
  Case c = float16(50, 150);
  c.num_q_heads = 6;
  check(c);
}
TEST(sm90_attention, odd_head_dims) {
  Case c = bfloat16(20, 140);
  c.head_dim = 72;
  c.head_dim_v = 24;
  check(c);
}
TEST(sm90_attention, head_dim_below_that_of_values) {
  Case c = bfloat16(20, 140);
  c.head_dim = 40;
  c.head_dim_v = 104;
  check(c);
}
TEST(sm90_attention, window_softcap_sinks) {
  Case c = float16(100, 400);
  c.window_size_left = 90;
  c.num_sink_tokens = 3;
  c.softcap = 2;
  c.sinks = true;
  check(c);
}
TEST(sm90_attention, two_sided_window) {
  Case c = float16(60, 300);
  c.causal = false;
  c.window_size_left = 9;
  c.window_size_right = 140;
  check(c);
}
TEST(sm90_attention, key_ranges) {
  Case c = float16(70, 300);
  c.num_key_ranges = 2;
  check(c);
}
TEST(sm90_attention, seqused_k) {
  Case c = float16(9, 300);
  c.batch = 3;
  c.seqused_k = {130, 0, 300};
  check(c);
}
TEST(sm90_attention, packed) {
  Case c = float16(200, 330);
  c.num_q_heads = 2;
  c.cu_seqlens_q = {0, 70, 70, 90, 195};
  c.cu_seqlens_k = {0, 130, 150, 150, 320};
  check(c);
}
TEST(sm90_attention, blocks_of_64) {
  Case c = sparse(float16(200, 500), 64, 64);
  c.bad_entries = true;
  check(c);
}
TEST(sm90_attention, blocks_of_128) {
  Case c = sparse(bfloat16(100, 600), 32, 128);
  c.num_q_heads = 4;
  c.num_kv_heads = c.pattern_heads = 2;
  check(c);
}
TEST(sm90_attention, packed_blocks) {
  Case c = sparse(float16(200, 400), 128, 64);
  c.cu_seqlens_q = {0, 70, 70, 200};
  c.cu_seqlens_k = {0, 130, 150, 400};
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
