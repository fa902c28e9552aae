// select_blocks against sorted lists. Which blocks are chosen is exact: no tolerance.
#include <gtest/gtest.h>

#include <set>

#include "block_map_case.h"
#include "cuda/kernels.h"

namespace longctx::simt_tests {
namespace {

struct Select {
  MapCase map;
  int64_t heads = 2;
  SelectMethod method = SelectMethod::kTopK;
  bool per_row = true;
  float value = 3;
  std::vector<float> head_values;
  int64_t num_first = 0, num_local = 0;
  int64_t max_blocks_per_row = -1;  // -1: as many as there are
  bool few_scores = false;          // many ties
  bool special_scores = false;      // NaN, infinities, zeros of both signs, negative
};

struct Entry {
  int64_t row, column;
  float score;
  bool operator<(const Entry& other) const {  // better first
    if (score != other.score) return score > other.score;
    return row != other.row ? row < other.row : column < other.column;
  }
};

// floor(ldexp(score, shift)) with the shift of the region
int64_t mass_of(float score, int shift) {
  if (!(score > 0)) return 0;
  return static_cast<int64_t>(
      std::floor(std::ldexp(std::min<double>(score, std::numeric_limits<float>::max()), shift)));
}

// The competing entries that one cut keeps, `entries` and `forced` being all visible ones.
std::vector<Entry> choose(const Select& c, float value, std::vector<Entry> entries,
                          const std::vector<Entry>& forced, int64_t region_size) {
  float best = -std::numeric_limits<float>::infinity();
  for (const Entry& entry : entries) best = std::max(best, entry.score);
  for (const Entry& entry : forced) best = std::max(best, entry.score);
  std::sort(entries.begin(), entries.end());
  while (!entries.empty() && std::isinf(entries.back().score) && entries.back().score < 0) {
    entries.pop_back();
  }
  const auto keep_from = [&](float limit) {
    std::vector<Entry> kept;
    for (const Entry& entry : entries) {
      if (entry.score >= limit) kept.push_back(entry);
    }
    return kept;
  };
  switch (c.method) {
    case SelectMethod::kTopK:
      entries.resize(std::min(entries.size(), static_cast<size_t>(std::max(value, 0.0f))));
      return entries;
    case SelectMethod::kThreshold:
      return keep_from(value);
    case SelectMethod::kRelative:
      return keep_from(value * best);
    case SelectMethod::kCumulative:
      break;
  }
  if (!(best > 0)) return {};
  int entry_bits = 0;
  for (; (region_size >> entry_bits) != 0; ++entry_bits) {
  }
  int exponent;
  std::frexp(std::min(best, std::numeric_limits<float>::max()), &exponent);
  const int shift = std::min(40, 61 - entry_bits) - (exponent - 1);
  int64_t total = 0, reached = 0;
  for (const Entry& entry : entries) total += mass_of(entry.score, shift);
  for (const Entry& entry : forced) reached += mass_of(entry.score, shift);
  total += reached;
  const double share = std::min(std::max(value, 0.0f), 1.0f);
  const int64_t target =
      std::min(total, static_cast<int64_t>(std::ceil(share * static_cast<double>(total))));
  size_t kept = 0;
  for (; kept < entries.size() && reached < target; ++kept) {
    reached += mass_of(entries[kept].score, shift);
  }
  entries.resize(kept);
  return entries;
}

void check(const Select& c, unsigned seed = 1) {
  std::mt19937 rng(seed);
  const int64_t rows = c.map.num_q_blocks(), columns = c.map.num_k_blocks();
  Tensor scores(DType::kFloat32, c.map.batch, c.heads, rows, columns, Layout::kOdd);
  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, -1.0f, 1e-42f, 3e38f};
  std::uniform_real_distribution<double> uniform;
  scores.for_each([&](int64_t b, int64_t h, int64_t row, int64_t column) {
    double score = uniform(rng);
    if (c.few_scores) score = static_cast<double>(rng() % 4) / 4;
    if (c.special_scores && rng() % 3 == 0) score = special[rng() % 8];
    scores.set(b, h, row, column, score);
  });
  const int64_t limit = c.max_blocks_per_row < 0 ? columns : c.max_blocks_per_row;

  // expected lists
  std::vector<std::set<int64_t>> lists(static_cast<size_t>(c.map.batch * c.heads * rows));
  for (const MapSequence& seq : map_sequences(c.map)) {
    const int64_t seq_rows = MapCase::blocks(seq.q_len, c.map.block_size_q);
    const int64_t seq_columns = MapCase::blocks(seq.k_len, c.map.block_size_k);
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t step = c.per_row ? 1 : std::max<int64_t>(seq_rows, 1);
      for (int64_t first = 0; first < seq_rows; first += step) {
        std::vector<Entry> competing, forced;
        const auto list_of = [&](int64_t row) -> std::set<int64_t>& {
          return lists[(seq.batch_index * c.heads + head) * rows + seq.first_row + row];
        };
        for (int64_t row = first; row < first + step; ++row) {
          const int64_t last_position = seq.first_position + (row + 1) * c.map.block_size_q - 1;
          int64_t visible = seq_columns;
          if (c.map.causal) {
            visible =
                last_position < 0 ? 0 : std::min(visible, last_position / c.map.block_size_k + 1);
          }
          for (int64_t column = 0; column < visible; ++column) {
            const bool is_forced = column < c.num_first || column >= visible - c.num_local;
            auto score =
                static_cast<float>(scores.get(seq.batch_index, head, seq.first_row + row, column));
            if (std::isnan(score)) score = -INFINITY;
            (is_forced ? forced : competing).push_back({row, column, score});
            if (is_forced) list_of(row).insert(column);
          }
        }
        const float value = c.head_values.empty() ? c.value : c.head_values[head];
        for (const Entry& e : choose(c, value, competing, forced, step * seq_columns)) {
          std::set<int64_t>& list = list_of(e.row);
          if (static_cast<int64_t>(list.size()) < limit) list.insert(e.column);
        }
      }
    }
  }

  SelectBlocksParams params;
  params.map = c.map.params();
  // As the op says: it does not know q and k, axes are as long as the map.
  params.map.seqs.seqlen_q = rows * c.map.block_size_q;
  params.map.seqs.seqlen_k = columns * c.map.block_size_k;
  const TensorView view = scores.view();
  params.scores = static_cast<const float*>(view.data);
  params.scores_batch_stride = view.batch_stride;
  params.scores_head_stride = view.head_stride;
  params.scores_row_stride = view.seq_stride;
  params.heads = c.heads;
  params.method = c.method;
  params.per_row = c.per_row;
  params.value = c.value;
  params.head_values = data_or_null(c.head_values);
  params.num_first = std::min(c.num_first, columns);
  params.num_local = std::min(c.num_local, columns);
  params.max_blocks_per_row = limit;
  params.capacity = c.map.batch * c.heads * rows * limit;
  in_every_mode([&] {
    std::vector<int64_t> indptr(static_cast<size_t>(c.map.batch * c.heads * (rows + 1)), -7);
    std::vector<int32_t> indices(static_cast<size_t>(params.capacity), -7);
    params.block_indptr = indptr.data();
    params.block_indices = indices.data();
    cuda::run_select_blocks_cuda(params);

    int64_t next = 0;
    for (int64_t map = 0; map < c.map.batch * c.heads; ++map) {
      for (int64_t row = 0; row < rows; ++row) {
        ASSERT_EQ(indptr[map * (rows + 1) + row], next) << "map " << map << ", row " << row;
        for (const int64_t column : lists[map * rows + row]) {
          ASSERT_EQ(indices[next++], column) << "map " << map << ", row " << row;
        }
      }
      ASSERT_EQ(indptr[map * (rows + 1) + rows], next) << "end of map " << map;
    }
    for (; next < params.capacity; ++next) ASSERT_EQ(indices[next], -1) << "tail " << next;
  });
}

Select with(SelectMethod method, float value) {
  Select c;
  c.method = method;
  c.value = value;
  c.map.has_q_offset = true;  // the op knows no q to align with
  return c;
}

TEST(select_blocks, top_k) { check(with(SelectMethod::kTopK, 3)); }
TEST(select_blocks, top_k_of_ties) {
  Select c = with(SelectMethod::kTopK, 4);
  c.few_scores = true;
  c.num_first = c.num_local = 1;
  check(c);
}
TEST(select_blocks, top_k_special_scores) {
  Select c = with(SelectMethod::kTopK, 5);
  c.special_scores = true;
  check(c);
}
TEST(select_blocks, top_none) { check(with(SelectMethod::kTopK, 0)); }
TEST(select_blocks, top_of_a_head) {
  Select c = with(SelectMethod::kTopK, 20);
  c.per_row = false;
  c.few_scores = true;
  check(c);
}
TEST(select_blocks, threshold) { check(with(SelectMethod::kThreshold, 0.6f)); }
TEST(select_blocks, relative) {
  Select c = with(SelectMethod::kRelative, 0.5f);
  c.map.causal = false;
  check(c);
}
TEST(select_blocks, relative_in_a_head) {
  Select c = with(SelectMethod::kRelative, 0.9f);
  c.per_row = false;
  check(c);
}
TEST(select_blocks, cumulative) {
  Select c = with(SelectMethod::kCumulative, 0.7f);
  c.num_local = 2;
  check(c);
}
TEST(select_blocks, cumulative_special_scores) {
  Select c = with(SelectMethod::kCumulative, 0.9f);
  c.special_scores = true;
  check(c);
}
TEST(select_blocks, cumulative_in_a_head) {
  Select c = with(SelectMethod::kCumulative, 0.5f);
  c.per_row = false;
  c.head_values = {0.2f, 0.95f};
  check(c);
}
// Several blocks of threads share a map, and the ties at the cut end in one of its middle rows.
TEST(select_blocks, ties_of_many_rows_of_a_head) {
  Select c = with(SelectMethod::kTopK, 150);
  c.heads = 1;
  c.per_row = false;
  c.few_scores = true;
  c.num_first = 1;
  c.map.seqlen_q = 600;
  c.map.seqlen_k = 600;
  check(c);
}
TEST(select_blocks, overflow_in_a_head) {
  Select c = with(SelectMethod::kCumulative, 0.9f);
  c.per_row = false;
  c.special_scores = true;
  c.max_blocks_per_row = 3;
  check(c);
}
TEST(select_blocks, packed_heads) {
  Select c = with(SelectMethod::kCumulative, 0.6f);
  c.heads = 1;
  c.per_row = false;
  c.num_local = 1;
  c.map.has_q_offset = false;
  c.map.seqlen_q = 300;
  c.map.seqlen_k = 320;
  c.map.cu_seqlens_q = {0, 0, 133, 133, 134, 300};
  c.map.cu_seqlens_k = {0, 5, 140, 140, 160, 320};
  check(c);
}
// More sequences than lanes.
Select many_sequences(SelectMethod method, float value) {
  Select c = with(method, value);
  c.heads = 1;
  c.map.has_q_offset = false;
  c.map.seqlen_q = c.map.seqlen_k = 120;
  for (int32_t s = 0; s <= 40; ++s) {
    c.map.cu_seqlens_q.push_back(3 * s);
    c.map.cu_seqlens_k.push_back(3 * s);
  }
  return c;
}
TEST(select_blocks, packed_many) { check(many_sequences(SelectMethod::kTopK, 1)); }
TEST(select_blocks, packed_many_heads) {
  Select c = many_sequences(SelectMethod::kRelative, 0.9f);
  c.per_row = false;
  check(c);
}
TEST(select_blocks, overflow_keeps_the_best) {
  Select c = with(SelectMethod::kThreshold, 0.1f);
  c.num_first = 1;
  c.max_blocks_per_row = 4;
  check(c);
}
TEST(select_blocks, many_columns) {
  Select c = with(SelectMethod::kCumulative, 0.8f);
  c.heads = 1;
  c.map.seqlen_q = 64;
  c.map.seqlen_k = 700;
  c.map.block_size_k = 1;
  check(c);
}
// Too many for a row's keys to stay in shared memory.
TEST(select_blocks, very_many_columns) {
  Select c = with(SelectMethod::kCumulative, 0.8f);
  c.heads = 1;
  c.map.seqlen_q = 20;
  c.map.seqlen_k = 16500;
  c.map.block_size_k = 1;
  c.map.causal = false;
  c.num_local = 5;
  c.special_scores = true;
  check(c);
}
TEST(select_blocks, packed) {
  Select c = with(SelectMethod::kTopK, 2);
  c.num_first = 1;
  c.map.has_q_offset = false;
  c.map.seqlen_q = 100;
  c.map.seqlen_k = 120;
  c.map.cu_seqlens_q = {0, 0, 33, 33, 34, 100};
  c.map.cu_seqlens_k = {0, 5, 40, 40, 60, 120};
  check(c);
}
TEST(select_blocks, seqused_k_and_q_offset) {
  Select c = with(SelectMethod::kTopK, 2);
  c.map.batch = 3;
  c.map.seqlen_q = 64;
  c.map.q_offset = -64;
  c.map.seqused_k = {200, 0, 90};
  check(c);
}
TEST(select_blocks, nothing) {
  Select c = with(SelectMethod::kTopK, 2);
  c.map.seqlen_k = 0;
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
