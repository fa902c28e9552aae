#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/schedule.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

int magnitude(int64_t length) {
  int bits = 0;
  for (; length > 0; length /= 2) ++bits;
  return bits;
}

void check(int64_t batch, int64_t heads, int64_t rows, int64_t longest) {
  std::mt19937 rng(3);
  std::vector<int64_t> indptr;
  std::vector<int> magnitudes;
  int64_t next = 0;
  for (int64_t pattern = 0; pattern < batch * heads; ++pattern) {
    for (int64_t row = 0; row < rows; ++row) {
      indptr.push_back(next);
      const int64_t length = rng() % (rng() % 2 == 0 ? longest + 1 : longest / 8 + 1);
      magnitudes.push_back(magnitude(length));
      next += length;
    }
    indptr.push_back(next);
  }
  BlockList blocks;
  blocks.block_indptr = indptr.data();
  blocks.capacity = next;
  blocks.pattern_batch = batch;
  blocks.pattern_heads = heads;
  blocks.num_q_blocks = rows;

  std::vector<int32_t> expected;
  for (int64_t pattern = 0; pattern < batch * heads; ++pattern) {
    for (int64_t row = rows - 1; row >= 0; --row) expected.push_back(pattern * rows + row);
  }
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int32_t a, int32_t b) { return magnitudes[a] > magnitudes[b]; });
  in_every_mode([&] {
    std::vector<int32_t> order(expected.size(), -7);
    cuda::order_rows_longest_first("schedule", blocks, order.data());
    EXPECT_EQ(order, expected);
  });
}

TEST(schedule, one_row) { check(1, 1, 1, 5); }
TEST(schedule, one_warp) { check(1, 2, 11, 300); }
TEST(schedule, several_warps) { check(2, 3, 37, 1000); }
TEST(schedule, several_blocks) { check(1, 3, 301, 100000); }
TEST(schedule, several_steps_of_a_warp) {
  if (simt::tsan::active()) GTEST_SKIP() << "64 blocks of threads: a minute for ThreadSanitizer";
  check(1, 2, 8500, 3);
}
TEST(schedule, all_alike) { check(1, 2, 100, 0); }
TEST(schedule, nothing) { check(1, 2, 0, 0); }

// What an offset says beyond the list does not count.
TEST(schedule, bad_offsets) {
  const std::vector<int64_t> indptr = {0, 1000, -5, 2, INT64_MAX};
  BlockList blocks;
  blocks.block_indptr = indptr.data();
  blocks.capacity = 9;
  blocks.num_q_blocks = 4;
  in_every_mode([&] {
    std::vector<int32_t> order(4, -7);
    cuda::order_rows_longest_first("schedule", blocks, order.data());
    EXPECT_EQ(order, (std::vector<int32_t>{0, 3, 2, 1}));
  });
}

}  // namespace
}  // namespace longctx::simt_tests
