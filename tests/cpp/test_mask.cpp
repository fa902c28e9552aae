// The shared predicate, sequences and block lists, and the CPU driver's way through them, against
// brute force over every (row, key) pair.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "cpu/strip_mask.h"
#include "cpu/visit.h"
#include "longctx/block_list.h"
#include "longctx/mask.h"
#include "longctx/sequence.h"

namespace longctx {
namespace {

constexpr int64_t kMaxKeys = 700;

// A random mask over one sequence; owns the key ranges it points to.
struct Case {
  explicit Case(std::mt19937& rng) {
    const auto pick = [&rng](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(rng);
    };
    seq.q_len = pick(1, 80);
    seq.k_len = pick(0, kMaxKeys);
    seq.q_begin = pick(0, 3);
    seq.k_begin = pick(0, 3);
    mask.causal = pick(0, 1) != 0;
    if (pick(0, 1) != 0) mask.window_size_left = pick(0, 100);
    if (pick(0, 2) == 0) mask.window_size_right = pick(0, 50);
    if (pick(0, 1) != 0) mask.num_sink_tokens = pick(0, 40);
    mask.num_key_ranges = pick(0, 2);
    if (mask.num_key_ranges == 0) return;
    const int64_t rows = seq.q_begin + seq.q_len;
    for (int64_t i = 0; i < mask.num_key_ranges * rows * 2; ++i) {
      ranges.push_back(static_cast<int32_t>(pick(-5, kMaxKeys + 5)));
    }
    mask.key_ranges = ranges.data();
    mask.key_ranges_range_stride = rows * 2;
    mask.key_ranges_row_stride = 2;
  }

  // Written from the contract, not from mask.h.
  bool visible(int64_t row, int64_t key) const {
    if (key < 0 || key >= seq.k_len) return false;
    const int64_t distance = row + seq.k_len - seq.q_len - key;  // > 0: the key lies before
    if (mask.causal && distance < 0) return false;
    const bool left = mask.window_size_left < 0 || distance <= mask.window_size_left;
    const bool right = mask.window_size_right < 0 || -distance <= mask.window_size_right;
    if (!(left && right) && key >= mask.num_sink_tokens) return false;
    if (mask.num_key_ranges == 0) return true;
    for (int64_t r = 0; r < mask.num_key_ranges; ++r) {
      const int32_t* pair = mask.key_ranges + r * mask.key_ranges_range_stride +
                            (seq.q_begin + row) * mask.key_ranges_row_stride;
      if (key + seq.k_begin >= pair[0] && key + seq.k_begin < pair[1]) return true;
    }
    return false;
  }

  std::vector<int32_t> ranges;
  Sequence seq;
  MaskParams mask;
};

TEST(RowMask, SeesTheKeysOfTheContract) {
  std::mt19937 rng(1);
  for (int i = 0; i < 300; ++i) {
    const Case c(rng);
    for (int64_t row = 0; row < c.seq.q_len; row += 7) {
      const RowMask mask = row_mask(c.mask, c.seq, row);
      for (int64_t key = -3; key < c.seq.k_len + 3; ++key) {
        ASSERT_EQ(mask.visible(key), c.visible(row, key)) << "case " << i << " row " << row;
      }
    }
  }
}

TEST(RowMask, VisibilityOfAnIntervalIsNeverWrong) {
  std::mt19937 rng(2);
  int64_t decided = 0;
  for (int i = 0; i < 300; ++i) {
    const Case c(rng);
    const int64_t row = c.seq.q_len / 2;
    const RowMask mask = row_mask(c.mask, c.seq, row);
    for (int64_t lo = 0; lo < c.seq.k_len; lo += 16) {
      const int64_t hi = std::min(lo + 16, c.seq.k_len);
      int64_t seen = 0;
      for (int64_t key = lo; key < hi; ++key) seen += c.visible(row, key);
      const Visibility result = mask.visibility(lo, hi);
      if (result == Visibility::kFull) {
        ASSERT_EQ(seen, hi - lo);
      } else if (result == Visibility::kNone) {
        ASSERT_EQ(seen, 0);
      }
      decided += result != Visibility::kPartial;
    }
  }
  EXPECT_GT(decided, 1000);
}

TEST(Sequence, OffsetsAreClampedToTheAxes) {
  const int32_t cu_q[] = {-7, 3, 2, 2000000000, std::numeric_limits<int32_t>::min()};
  const int32_t cu_k[] = {0, 4, 9, 5, 12};
  SequenceParams params;
  params.batch = 1;
  params.num_seqs = 4;
  params.seqlen_q = 10;
  params.seqlen_k = 8;
  params.cu_seqlens_q = cu_q;
  params.cu_seqlens_k = cu_k;
  for (int64_t s = 0; s < params.num_seqs; ++s) {
    const Sequence seq = sequence_at(params, s);
    EXPECT_GE(seq.q_begin, 0);
    EXPECT_GE(seq.q_len, 0);
    EXPECT_LE(seq.q_begin + seq.q_len, params.seqlen_q);
    EXPECT_GE(seq.k_begin, 0);
    EXPECT_GE(seq.k_len, 0);
    EXPECT_LE(seq.k_begin + seq.k_len, params.seqlen_k);
  }
  EXPECT_EQ(sequence_at(params, 0).q_len, 3);
  EXPECT_EQ(sequence_at(params, 1).q_len, 0);
}

TEST(Sequence, SequsedReplacesTheKeyLength) {
  const int32_t used[] = {5, -1, 99};
  SequenceParams params;
  params.batch = params.num_seqs = 3;
  params.seqlen_q = 4;
  params.seqlen_k = 8;
  params.seqused_k = used;
  EXPECT_EQ(sequence_at(params, 0).k_len, 5);
  EXPECT_EQ(sequence_at(params, 0).diagonal(), 1);
  EXPECT_EQ(sequence_at(params, 1).k_len, 0);
  EXPECT_EQ(sequence_at(params, 2).k_len, 8);
}

TEST(BlockList, RowsStayInsideTheIndices) {
  const int64_t indptr[] = {0, 2, -5, 100, 3};
  const int32_t indices[] = {0, 1, 2, 3};
  BlockList blocks;
  blocks.block_indptr = indptr;
  blocks.block_indices = indices;
  blocks.capacity = 4;
  blocks.num_q_blocks = 4;
  for (int64_t row = -1; row < 6; ++row) {
    const BlockRow found = block_row(blocks, 0, 0, row);
    if (found.begin == found.end) continue;
    EXPECT_GE(found.begin, indices);
    EXPECT_LE(found.end, indices + 4);
    EXPECT_LT(found.begin, found.end);
  }
  EXPECT_EQ(block_row(blocks, 0, 0, 0).end, indices + 2);
}

TEST(BlockList, PatternHeadOfAQueryHead) {
  BlockList blocks;
  const int64_t expected[3][8] = {
      {0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 1, 1, 1, 1}, {0, 1, 2, 3, 4, 5, 6, 7}};
  const int64_t pattern_heads[] = {1, 2, 8};
  for (int i = 0; i < 3; ++i) {
    blocks.pattern_heads = pattern_heads[i];
    for (int64_t head = 0; head < 8; ++head) {
      EXPECT_EQ(pattern_head(blocks, head, 8), expected[i][head]);
    }
  }
}

}  // namespace

namespace cpu {
namespace {

// Ascending and valid, but for a few entries that must be skipped.
std::vector<int32_t> random_blocks(std::mt19937& rng, int64_t num_blocks,
                                   std::set<int64_t>& accepted) {
  std::vector<int32_t> entries;
  std::bernoulli_distribution keep(0.3), spoil(0.1);
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (!keep(rng)) continue;
    entries.push_back(static_cast<int32_t>(block));
    accepted.insert(block);
    if (!spoil(rng)) continue;
    entries.push_back(static_cast<int32_t>(block));  // a duplicate
    entries.push_back(-3);
    entries.push_back(std::numeric_limits<int32_t>::max());
    entries.push_back(static_cast<int32_t>(block / 2));  // a step back
  }
  return entries;
}

// Chunks must hold the wanted keys once, in order, and every strip mask must equal the predicate.
void check_chunks(const Case& c, const std::vector<Interval>& visible, const KeyRuns& runs,
                  const std::set<int64_t>& wanted) {
  // Rows are addresses that tell the position: element_size 1, stride 1.
  const std::vector<char> memory(kMaxKeys);
  ChunkSource source(runs, {memory.data(), memory.data(), 1, 1, 1});
  const auto chunk = std::make_unique<KeyChunk>();
  const auto bits = std::make_unique<ChunkMask>();
  std::vector<int64_t> found;
  while (source.next(chunk.get())) {
    for (int64_t slot = 0; slot < chunk->num_slots(); ++slot) {
      const int64_t position = chunk->positions[slot];
      ASSERT_EQ(chunk->k_rows[slot], memory.data() + position);
      if (slot < chunk->num_keys) found.push_back(position);
    }
    for (int t = 0; t < kChunkKeys / 16; ++t) {
      if ((chunk->contiguous16 >> t & 1) == 0) continue;
      ASSERT_LE(16 * (t + 1), chunk->num_keys);
      for (int i = 1; i < 16; ++i) {
        ASSERT_EQ(chunk->positions[16 * t + i], chunk->positions[16 * t] + i);
      }
    }
    for (int64_t first = 0; first < c.seq.q_len; first += kStripRows) {
      int64_t rows[kStripRows];
      const int num_rows = static_cast<int>(std::min<int64_t>(kStripRows, c.seq.q_len - first));
      for (int i = 0; i < num_rows; ++i) rows[i] = first + i;
      StripMask mask;
      mask.init(c.mask, c.seq, rows, num_rows);
      const bool any = mask.apply(*chunk, bits.get());
      bool expect_any = false;
      for (int64_t slot = 0; slot < chunk->num_slots(); ++slot) {
        const auto tile = static_cast<Visibility>(bits->tiles[slot / kKeyTile]);
        for (int i = 0; i < num_rows; ++i) {
          const bool expected =
              slot < chunk->num_keys && c.visible(rows[i], chunk->positions[slot]);
          const bool actual = tile == Visibility::kFull ||
                              (tile == Visibility::kPartial && (bits->visible[slot] >> i & 1) != 0);
          ASSERT_EQ(actual, expected) << "row " << rows[i] << " slot " << slot;
          expect_any |= expected;
        }
      }
      ASSERT_EQ(any, expect_any);
    }
  }
  ASSERT_EQ(found, std::vector<int64_t>(wanted.begin(), wanted.end()));
  for (size_t i = 1; i < visible.size(); ++i) ASSERT_LT(visible[i - 1].end, visible[i].begin);
}

TEST(Visit, EveryVisibleKeyOnceAndNoOther) {
  std::mt19937 rng(3);
  std::vector<Interval> visible;
  for (int i = 0; i < 300; ++i) {
    const Case c(rng);
    visible_union(c.mask, c.seq, 0, c.seq.q_len, visible);
    std::set<int64_t> wanted;
    for (int64_t key = 0; key < c.seq.k_len; ++key) {
      for (int64_t row = 0; row < c.seq.q_len; ++row) {
        if (c.visible(row, key)) wanted.insert(key);
      }
    }
    check_chunks(c, visible, KeyRuns(visible, c.seq.k_len), wanted);
    if (HasFatalFailure()) FAIL() << "case " << i;
  }
}

TEST(Visit, OnlyListedBlocks) {
  std::mt19937 rng(4);
  std::vector<Interval> visible;
  const int64_t sizes[] = {1, 8, 16, 32, 64, 128};
  for (int i = 0; i < 300; ++i) {
    const Case c(rng);
    const int64_t size = sizes[i % 6];
    std::set<int64_t> accepted;
    const std::vector<int32_t> entries =
        random_blocks(rng, (c.seq.k_len + size - 1) / size, accepted);
    visible_union(c.mask, c.seq, 0, c.seq.q_len, visible);
    std::set<int64_t> wanted;
    for (int64_t key = 0; key < c.seq.k_len; ++key) {
      if (accepted.count(key / size) == 0) continue;
      for (int64_t row = 0; row < c.seq.q_len; ++row) {
        if (c.visible(row, key)) wanted.insert(key);
      }
    }
    const BlockRow row{entries.data(), entries.data() + entries.size()};
    check_chunks(c, visible, KeyRuns(visible, c.seq.k_len, row, size), wanted);
    if (HasFatalFailure()) FAIL() << "case " << i;
  }
}

}  // namespace
}  // namespace cpu
}  // namespace longctx
