// The best scores of a row by one pass over it: whatever is not below a bound joins a short list,
// and a list that is full is cut to the best of it, which raises the bound. A sample sets the first
// bound, so that the list is rarely cut; where the sample misled, the pass is repeated without it.
// The result is exact for every row, and so does not depend on the sample, the cuts or the threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "key_cut.h"
#include "scratch.h"
#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

// One thread's, made anew for each op: it owns the thread's scratch while it lives. Bits holds the
// bits of a score.
template <class Bits>
class RowSelector {
 public:
  // For rows of up to `n` scores and up to `k` chosen ones.
  RowSelector(const TopKKernels& kernels, FloatFormat format, int64_t n, int64_t k)
      : kernels_(kernels), format_(format) {
    k = std::min(k, n);
    const int64_t capacity = list_capacity(k, n);
    const int64_t sample_size = std::min(n / 16, kLargestSample);
    const int64_t sample_capacity = list_capacity(kHighestRank, sample_size);
    ScratchPlan plan;
    const auto add_list = [&plan](int64_t size) {
      const size_t keys = plan.add<uint32_t>(size + kListSlack);
      plan.add<int32_t>(size + kListSlack);
      return keys;
    };
    const size_t list = add_list(capacity);
    const size_t sample_list = add_list(sample_capacity);
    const size_t spare = plan.add<uint32_t>(std::max(capacity, sample_capacity) + kListSlack);
    const size_t sampled = plan.add<Bits>(sample_size);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    const auto place = [base](size_t keys, int64_t size) {
      ScratchPlan before;  // of the indices, which follow the keys
      before.add<uint32_t>(size + kListSlack);
      return ScoreList{reinterpret_cast<uint32_t*>(base + keys),
                       reinterpret_cast<int32_t*>(base + keys + before.bytes()), size, 0};
    };
    list_ = place(list, capacity);
    sample_list_ = place(sample_list, sample_capacity);
    spare_ = reinterpret_cast<uint32_t*>(base + spare);
    sampled_ = reinterpret_cast<Bits*>(base + sampled);
  }

  // The `k` best of row[begin, end), k > 0, that have at least the key `floor`; fewer if there are
  // no more.
  const ScoreList& best(const Bits* row, int64_t begin, int64_t end, int64_t k, uint32_t floor) {
    const uint32_t bound = std::max(floor, sample_bound(row, begin, end, k));
    best_above(row, begin, end, k, bound, list_);
    if (list_.count < k && bound > floor) best_above(row, begin, end, k, floor, list_);
    return list_;
  }

  // A key that probably a little more than `k` of row[begin, end) reach; 0 for a short row.
  uint32_t sample_bound(const Bits* row, int64_t begin, int64_t end, int64_t k) {
    const Sample sample = sample_of(end - begin, k);
    if (sample.size == 0) return 0;
    const int64_t lines = (end - begin) / kLine;
    const int64_t groups = sample.size / kLine;
    // Spread evenly, but not periodically.
    uint32_t random = 1;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = g * lines / groups, width = (g + 1) * lines / groups - from;
      random = random * 1664525u + 1013904223u;
      const int64_t line = from + static_cast<int64_t>(random >> 8) % width;
      std::memcpy(sampled_ + g * kLine, row + begin + line * kLine, kLine * sizeof(Bits));
    }
    sample_list_.capacity = list_capacity(sample.rank, sample.size);
    best_above(sampled_, 0, sample.size, sample.rank, 0, sample_list_);
    return kernels_.key_range(sample_list_.keys, sample_list_.count).low;
  }

  // The `k` best of row[begin, end) among those with at least the key `bound`.
  const ScoreList& best_above(const Bits* row, int64_t begin, int64_t end, int64_t k,
                              uint32_t bound) {
    best_above(row, begin, end, k, bound, list_);
    return list_;
  }

  // Of what was chosen last, the shortest prefix of the order whose weights sum to `wanted`.
  template <class Weight>
  const ScoreList& reach(int64_t wanted, const Weight& weight) {
    const KeyCut cut = find_cut(kernels_, list_.keys, list_.count, wanted, weight, spare_);
    kernels_.keep(cut.key, cut.num_ties, list_);
    return list_;
  }

  const ScoreList& none() {
    list_.count = 0;
    return list_;
  }

  // The `k` best of lists that follow one another in a row: start, append each, finish.
  void start() { list_.count = 0; }
  void append(const uint32_t* keys, const int32_t* indices, int64_t count, int64_t k) {
    while (count > 0) {
      if (list_.count == list_.capacity) cut(k, list_);
      const int64_t part = std::min(count, list_.capacity - list_.count);
      std::copy_n(keys, part, list_.keys + list_.count);
      std::copy_n(indices, part, list_.indices + list_.count);
      list_.count += part;
      keys += part;
      indices += part;
      count -= part;
    }
  }
  const ScoreList& finish(int64_t k) {
    if (list_.count > k) cut(k, list_);
    return list_;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Bits);  // scores of a cache line
  static constexpr int64_t kLargestSample = 1 << 14;
  static constexpr int64_t kHighestRank =
      2048;  // at most a 16th of a row that is sampled is wanted

  // The row is read where it is sampled a cache line at a time.
  struct Sample {
    int64_t size = 0;  // 0: none
    int64_t rank = 0;  // of the score in the sample that is the bound
  };

  // A cut costs in proportion to the list and comes after capacity - k further entries.
  static int64_t list_capacity(int64_t k, int64_t n) {
    return std::min(std::min(4 * k, 2 * k + 8192) + 1024, n + kListSlack);
  }

  // The neighbours of a score tell little new: the margin is four standard deviations as if a line
  // held one score, many times.
  static Sample sample_of(int64_t n, int64_t k) {
    if (n < 8 * list_capacity(k, n)) return {};
    const int64_t size = std::min(n / 16, kLargestSample) / kLine * kLine;
    const double expected =
        static_cast<double>(k) * static_cast<double>(size) / static_cast<double>(n);
    const double margin = 16.0 * std::sqrt(expected) + 16.0;
    return {size, std::min(size, static_cast<int64_t>(expected + margin))};  // <= kHighestRank
  }

  int64_t scan(const uint32_t* row, int64_t begin, int64_t end, BitRange range, ScoreList& list) {
    return kernels_.scan32(row, begin, end, range, list);
  }
  int64_t scan(const uint16_t* row, int64_t begin, int64_t end, BitRange range, ScoreList& list) {
    return kernels_.scan16(row, begin, end, range, list);
  }

  void best_above(const Bits* row, int64_t begin, int64_t end, int64_t k, uint32_t bound,
                  ScoreList& list) {
    int64_t ordered = 0;  // entries at the front that hold keys, not bits
    list.count = 0;
    while (begin < end && bound <= infinity_key(format_)) {
      begin = scan(row, begin, end, bits_from_key(bound, format_), list);
      kernels_.order_keys(format_, list.count - ordered, list.keys + ordered);
      if (begin < end) bound = std::max(bound, cut(k, list) + 1);
      ordered = list.count;
    }
    if (list.count > k) cut(k, list);
  }

  // Cuts a list of at least k entries to its best k and returns the lowest key of these.
  uint32_t cut(int64_t k, ScoreList& list) {
    const auto one = [](uint32_t) { return int64_t{1}; };
    const KeyCut cut = find_cut(kernels_, list.keys, list.count, k, one, spare_);
    kernels_.keep(cut.key, cut.num_ties, list);
    return cut.key;
  }

  const TopKKernels& kernels_;
  FloatFormat format_;
  ScoreList list_;
  ScoreList sample_list_;
  uint32_t* spare_ = nullptr;
  Bits* sampled_ = nullptr;
};

}  // namespace
}  // namespace longctx::cpu
