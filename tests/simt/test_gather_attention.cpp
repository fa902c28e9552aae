#include <gtest/gtest.h>

#include "gather_check.h"

namespace longctx::simt_tests {
namespace {

// Two tiles for some warps, one for others.
TEST(gather_attention, tokens) {
  GatherCase c;
  c.num_entries = 75;
  check_gather(c);
}

TEST(gather_attention, segments) {
  GatherCase c;
  c.dtype = DType::kFloat16;
  c.head_dim = c.head_dim_v = 64;
  c.seqlen_k = 400;
  c.num_entries = 300;
  c.num_last = 5;
  check_gather(c);
}

// More query heads than rows, of which the last tile has one; dims that no vector fits.
TEST(gather_attention, odd_rows_and_strides) {
  GatherCase c;
  c.num_q_heads = 17;
  c.head_dim = 70;
  c.head_dim_v = 5;
  c.layout = Layout::kOdd;
  check_gather(c);
}

TEST(gather_attention, every_option) {
  GatherCase c;
  c.dtype = DType::kFloat16;
  c.batch = 2;
  c.num_kv_heads = 2;
  c.seqlen_q = 2;
  c.seqlen_k = 96;
  c.head_dim = 40;
  c.head_dim_v = 64;
  c.num_entries = 9;
  c.index_heads = 4;
  c.block_size_k = 6;
  c.num_first = 3;
  c.num_last = 7;
  c.page_size = 16;
  c.softcap = 2;
  c.with_counts = c.with_bias = true;
  c.seqused_k = {91, 40};
  c.layout = Layout::kRowsFirst;
  check_gather(c);
}

// Positions of keys run past the table.
TEST(gather_attention, rotated) {
  GatherCase c;
  c.num_entries = 12;
  c.block_size_k = 4;
  c.num_first = 3;
  c.num_last = 6;
  c.rotary_dim = 96;
  check_gather(c);
}

TEST(gather_attention, float32) {
  GatherCase c;
  c.dtype = DType::kFloat32;
  c.num_q_heads = 9;
  c.num_entries = 75;
  c.with_bias = true;
  check_gather(c);
}

TEST(gather_attention, float32_every_option) {
  GatherCase c;
  c.dtype = DType::kFloat32;
  c.batch = 2;
  c.num_kv_heads = 2;
  c.seqlen_q = 2;
  c.head_dim = 33;
  c.head_dim_v = 60;
  c.index_heads = 2;
  c.num_entries = 30;
  c.block_size_k = 5;
  c.num_first = 2;
  c.num_last = 4;
  c.rotary_dim = 14;
  c.k_position_step = 0;
  c.softcap = 3;
  c.with_counts = true;
  c.seqused_k = {90, 51};
  check_gather(c);
}

// Tokens that are a tree and share their entries, and all that a call returns.
GatherCase tree() {
  GatherCase c;
  c.batch = 2;
  c.num_q_heads = 6;
  c.num_kv_heads = 2;
  c.seqlen_q = 3;
  c.num_entries = 5;
  c.index_heads = 2;
  c.block_size_k = 8;
  c.num_first = 2;
  c.num_last = 9;
  c.rotary_dim = 32;
  c.shared_tokens = c.with_tree = c.with_results = c.with_bias = c.with_counts = true;
  c.seqused_k = {90, 31};
  return c;
}
TEST(gather_attention, tree_and_results) { check_gather(tree()); }
TEST(gather_attention, float32_tree_and_results) {
  GatherCase c = tree();
  c.dtype = DType::kFloat32;
  c.index_heads = 1;
  check_gather(c);
}

// One pass for all tokens, of which each sees a few keys that the others do not. Rows of a token
// fall into two blocks.
TEST(gather_attention, tokens_share_a_pass) {
  GatherCase c = tree();
  c.num_q_heads = 12;
  c.seqlen_q = 5;
  c.rotary_dim = 0;
  c.with_results = c.with_tree = false;
  check_gather(c);
}
TEST(gather_attention, float32_tree_shares_a_pass) {
  GatherCase c = tree();
  c.dtype = DType::kFloat32;
  c.seqlen_q = 4;
  c.seqused_k = {90, 3};
  c.rotary_dim = 0;
  c.with_results = false;
  check_gather(c);
}

// At positions that follow each other, some of them past the table.
TEST(gather_attention, rotated_tokens_share_a_pass) {
  GatherCase c = tree();
  c.num_q_heads = 14;
  c.seqlen_q = 4;
  c.seqused_k = {66, 31};
  c.with_tree = c.with_q_positions = false;
  check_gather(c);
}

// The last of three blocks merges what all have left.
TEST(gather_attention, merged_in_the_launch) {
  GatherCase c;
  c.head_dim = c.head_dim_v = 64;
  c.dtype = DType::kFloat16;
  c.seqlen_k = 500;
  c.num_entries = 400;
  c.with_workspace = true;
  check_gather(c);
}

// The last of six, of two row tiles each; nothing is aligned.
TEST(gather_attention, float32_merged_in_the_launch) {
  GatherCase c = tree();
  c.dtype = DType::kFloat32;
  c.batch = c.num_kv_heads = c.index_heads = 1;
  c.num_q_heads = 4;
  c.seqused_k = {90};
  c.head_dim_v = 37;
  c.layout = Layout::kOdd;
  c.with_workspace = true;
  check_gather(c);
}

TEST(gather_attention, nothing_is_selected) {
  GatherCase c;
  c.batch = 2;
  c.seqlen_q = 3;
  c.num_entries = 0;
  c.num_last = 2;
  c.seqused_k = {0, 2};
  check_gather(c);
}

}  // namespace
}  // namespace longctx::simt_tests
