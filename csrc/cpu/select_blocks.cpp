// Scores of key blocks -> the block list of each query block: one cut per row or per head, found by
// a radix descent over histograms (linear time, no sort), then count, scan and write.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "longctx/block_map.h"
#include "longctx/score_order.h"
#include "parallel.h"

namespace longctx::cpu {
namespace {

// One row of the map. Columns [0, first) and [last, num_visible) are forced, [first, last) compete.
struct Row {
  const float* scores = nullptr;  // [num_k_blocks]
  int64_t first = 0;
  int64_t last = 0;
  int64_t num_visible = 0;
  int64_t num_forced() const { return first + num_visible - last; }
};

// The rows that share a cut: one row, or all rows of a sequence.
struct Region {
  int64_t batch_index = 0;
  SequenceMap map;
  int64_t first_row = 0;  // counted from the sequence's first
  int64_t num_rows = 0;
};

// A competing block of one row.
struct Entry {
  uint32_t key;
  int32_t column;
};

class Selector {
 public:
  explicit Selector(const SelectBlocksParams& params) : p_(params) {}

  Row row(const Region& region, int64_t head, int64_t i) const {
    Row row;
    row.scores = p_.scores + region.batch_index * p_.scores_batch_stride +
                 head * p_.scores_head_stride +
                 (region.map.first_row + region.first_row + i) * p_.scores_row_stride;
    row.num_visible = region.map.num_visible(p_.map, region.first_row + i);
    row.first = std::min(p_.num_first, row.num_visible);
    row.last = std::max(row.first, row.num_visible - std::min(p_.num_local, row.num_visible));
    return row;
  }

  // What the method chooses among the competing entries of a region; entry (i, column) has index
  // i * num_k_blocks + column.
  ScoreCut cut(const Region& region, int64_t head, std::vector<Entry>& buffer) const {
    const float value = p_.head_values == nullptr ? p_.value : p_.head_values[head];
    const auto one = [](float) { return int64_t{1}; };
    switch (p_.method) {
      case SelectMethod::kTopK: {
        constexpr float kLargest = 9.0e18f;  // below 2^63
        const int64_t k = value > 0.0f ? static_cast<int64_t>(std::min(value, kLargest)) : 0;
        return reach(region, head, k, one, buffer);
      }
      case SelectMethod::kThreshold:
        return cut_at(value);
      case SelectMethod::kRelative:
        return cut_at(value * best(region, head));
      case SelectMethod::kCumulative:
        break;
    }
    const float top = best(region, head);
    if (!(top > 0.0f)) return {};
    const int shift = mass_shift(top, region.num_rows * region.map.num_columns);
    int64_t total = 0, forced = 0;
    for (int64_t i = 0; i < region.num_rows; ++i) {
      const Row r = row(region, head, i);
      for (int64_t j = 0; j < r.num_visible; ++j) {
        const int64_t mass = score_mass(r.scores[j], shift);
        total += mass;
        if (j < r.first || j >= r.last) forced += mass;
      }
    }
    return reach(
        region, head, mass_target(value, total) - forced,
        [shift](float score) { return score_mass(score, shift); }, buffer);
  }

  // The best `count` competing entries of one row.
  static ScoreCut best_of_row(const Row& row, int64_t count, std::vector<Entry>& buffer) {
    return reach_in_row(row, count, [](float) { return int64_t{1}; }, buffer);
  }

 private:
  float best(const Region& region, int64_t head) const {
    float result = -__builtin_huge_valf();
    for (int64_t i = 0; i < region.num_rows; ++i) {
      const Row r = row(region, head, i);
      for (int64_t j = 0; j < r.num_visible; ++j) {
        if (r.scores[j] > result) result = r.scores[j];
      }
    }
    return result;
  }

  template <class Visit>
  void for_each_entry(const Region& region, int64_t head, const Visit& visit) const {
    for (int64_t i = 0; i < region.num_rows; ++i) {
      const Row r = row(region, head, i);
      for (int64_t j = r.first; j < r.last; ++j) {
        const uint32_t key = score_key(r.scores[j]);
        if (key != 0) visit(key, r.scores[j], i * p_.map.num_k_blocks + j);
      }
    }
  }

  // The smallest prefix of the order whose weights sum to `wanted`; everything if they fall short.
  // Descends digit by digit to the key at which the sum is reached, then counts ties by index.
  template <class Weight>
  ScoreCut reach(const Region& region, int64_t head, int64_t wanted, const Weight& weight,
                 std::vector<Entry>& buffer) const {
    if (region.num_rows == 1) return reach_in_row(row(region, head, 0), wanted, weight, buffer);
    if (wanted <= 0) return {};
    uint32_t prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      int64_t sums[256] = {};
      for_each_entry(region, head, [&](uint32_t key, float score, int64_t) {
        if ((static_cast<uint64_t>(key) >> (shift + 8)) == prefix) {
          sums[(key >> shift) & 255] += weight(score);
        }
      });
      const int digit = digit_that_reaches(sums, &wanted);
      if (digit < 0) return {1, INT64_MAX};
      prefix = prefix << 8 | static_cast<uint32_t>(digit);
    }
    ScoreCut cut{prefix, -1};
    for_each_entry(region, head, [&](uint32_t key, float score, int64_t index) {
      if (key != prefix || wanted <= 0) return;
      cut.last_index = index;
      wanted -= weight(score);
    });
    return cut;
  }

  // The same for one row, whose entries fit a buffer: each pass starts at the first bit in which
  // they differ and keeps those at the digit of the cut.
  template <class Weight>
  static ScoreCut reach_in_row(const Row& row, int64_t wanted, const Weight& weight,
                               std::vector<Entry>& buffer) {
    if (wanted <= 0) return {};
    buffer.clear();
    for (int64_t j = row.first; j < row.last; ++j) {
      const uint32_t key = score_key(row.scores[j]);
      if (key != 0) buffer.push_back({key, static_cast<int32_t>(j)});
    }
    for (;;) {
      uint32_t differing = 0;
      for (const Entry& entry : buffer) differing |= entry.key ^ buffer.front().key;
      if (differing == 0) break;
      int shift = 0;
      while (differing >> shift > 255) ++shift;
      int64_t sums[256] = {};
      for (const Entry& entry : buffer) {
        sums[(entry.key >> shift) & 255] += weight(row.scores[entry.column]);
      }
      const int digit = digit_that_reaches(sums, &wanted);
      if (digit < 0) return {1, INT64_MAX};
      size_t kept = 0;
      for (const Entry& entry : buffer) {
        buffer[kept] = entry;
        kept += static_cast<int>((entry.key >> shift) & 255) == digit;
      }
      buffer.resize(kept);
    }
    for (const Entry& entry : buffer) {
      wanted -= weight(row.scores[entry.column]);
      if (wanted <= 0) return {entry.key, entry.column};
    }
    return {1, INT64_MAX};
  }

  // The highest digit down to which the sums reach `wanted`, which keeps what that digit must still
  // give; -1 if they fall short.
  static int digit_that_reaches(const int64_t (&sums)[256], int64_t* wanted) {
    int digit = 255;
    for (; digit >= 0 && sums[digit] < *wanted; --digit) *wanted -= sums[digit];
    return digit;
  }

  const SelectBlocksParams& p_;
};

std::vector<Region> regions(const SelectBlocksParams& p) {
  std::vector<Region> result;
  int64_t first_row = 0;
  for (int64_t s = 0; s < p.map.seqs.num_seqs; ++s) {
    if (p.map.seqs.cu_seqlens_q == nullptr) first_row = 0;
    Region region;
    region.map = sequence_map(p.map, s, first_row);
    region.batch_index = region.map.seq.batch_index;
    first_row += region.map.num_rows;
    region.num_rows = p.per_row ? 1 : region.map.num_rows;
    if (region.num_rows == 0) continue;
    for (; region.first_row < region.map.num_rows; region.first_row += region.num_rows) {
      result.push_back(region);
    }
  }
  return result;
}

int64_t count_chosen(const Row& row, const ScoreCut& cut) {
  int64_t count = row.num_forced();
  for (int64_t j = row.first; j < row.last; ++j) {
    count += cut.chooses(score_key(row.scores[j]), j);
  }
  return count;
}

// Writes the `count` chosen columns in ascending order.
void write_chosen(const Row& row, const ScoreCut& cut, int64_t count, int32_t* next) {
  int32_t* const last = next + count - (row.num_visible - row.last);
  for (int64_t j = 0; j < row.first; ++j) *next++ = static_cast<int32_t>(j);
  for (int64_t j = row.first; j < row.last && next < last; ++j) {
    *next = static_cast<int32_t>(j);  // overwritten unless chosen
    next += cut.chooses(score_key(row.scores[j]), j);
  }
  for (int64_t j = row.last; j < row.num_visible; ++j) *next++ = static_cast<int32_t>(j);
}

}  // namespace

void run_select_blocks_cpu(const SelectBlocksParams& p) {
  const Selector selector(p);
  const std::vector<Region> all = regions(p);
  const int64_t rows = p.map.num_q_blocks;
  const int64_t num_items = static_cast<int64_t>(all.size()) * p.heads;
  std::vector<ScoreCut> cuts(static_cast<size_t>(p.map.seqs.batch * p.heads * rows));
  std::fill_n(p.block_indptr, p.map.seqs.batch * p.heads * (rows + 1), 0);

  // Later rows see more: hand them out first.
  const auto region_at = [&](int64_t item) -> const Region& {
    return all[all.size() - 1 - static_cast<size_t>(item / p.heads)];
  };
  const auto flat_row = [&](const Region& region, int64_t head, int64_t i) {
    return (region.batch_index * p.heads + head) * rows + region.map.first_row + region.first_row +
           i;
  };

  // cut, count
  const auto entries = [] { return std::vector<Entry>(); };
  for_each_item(num_items, entries, [&](int64_t item, std::vector<Entry>& buffer) {
    const Region& region = region_at(item);
    const int64_t head = item % p.heads;
    const ScoreCut shared = selector.cut(region, head, buffer);
    for (int64_t i = 0; i < region.num_rows; ++i) {
      const Row row = selector.row(region, head, i);
      ScoreCut cut = shared;
      if (cut.last_index != INT64_MAX) cut.last_index -= i * p.map.num_k_blocks;
      int64_t count = count_chosen(row, cut);
      if (count > p.max_blocks_per_row) {
        cut = Selector::best_of_row(row, p.max_blocks_per_row - row.num_forced(), buffer);
        count = std::max(p.max_blocks_per_row, row.num_forced());
      }
      const int64_t flat = flat_row(region, head, i);
      cuts[static_cast<size_t>(flat)] = cut;
      p.block_indptr[flat + flat / rows + 1] = count;
    }
  });

  // scan
  int64_t total = 0;
  for (int64_t i = 0; i < p.map.seqs.batch * p.heads * (rows + 1); ++i) {
    total += p.block_indptr[i];
    p.block_indptr[i] = total;
  }

  // write
  for_each_item(
      num_items, [] { return 0; },
      [&](int64_t item, int) {
        const Region& region = region_at(item);
        const int64_t head = item % p.heads;
        for (int64_t i = 0; i < region.num_rows; ++i) {
          const int64_t flat = flat_row(region, head, i);
          const int64_t* indptr = p.block_indptr + flat + flat / rows;
          write_chosen(selector.row(region, head, i), cuts[static_cast<size_t>(flat)],
                       indptr[1] - indptr[0], p.block_indices + indptr[0]);
        }
      });
  std::fill(p.block_indices + total, p.block_indices + p.capacity, -1);
}

}  // namespace longctx::cpu
