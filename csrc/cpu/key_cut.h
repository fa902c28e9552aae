// Where a list of keys ends when the best are taken until their weights reach a sum: a radix
// descent over histograms, linear in the number of keys. Internal linkage, as it calls code chosen
// by instruction set.
#pragma once
#include <algorithm>
#include <cstdint>

#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

// Everything above `key`, and the first `num_ties` entries at it.
struct KeyCut {
  uint32_t key = 0;
  int64_t num_ties = 0;
};

inline int bit_length(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// The shortest prefix of the order whose weights, none of them negative, sum to `wanted`, which is
// positive; everything if they fall short. Entries of equal keys weigh the same.
// `spare` is [count + kListSlack].
template <class Weight>
KeyCut find_cut(const TopKKernels& kernels, const uint32_t* keys, int64_t count, int64_t wanted,
                const Weight& weight, uint32_t* spare) {
  constexpr int kMaxDigitBits = 11;
  int64_t sums[1 << kMaxDigitBits];
  while (count > 0) {
    const KeyRange range = kernels.key_range(keys, count);
    if (range.low == range.high) {
      const int64_t each = weight(range.low);
      return {range.low, each > 0 ? (wanted + each - 1) / each : INT64_MAX};
    }
    const int digit_bits = std::clamp(bit_length(static_cast<uint64_t>(count)), 6, kMaxDigitBits);
    const int shift = std::max(0, bit_length(range.high - range.low) - digit_bits);
    int digit = static_cast<int>((range.high - range.low) >> shift);
    std::fill_n(sums, digit + 1, 0);
    for (int64_t i = 0; i < count; ++i) sums[(keys[i] - range.low) >> shift] += weight(keys[i]);
    for (; digit >= 0 && sums[digit] < wanted; --digit) wanted -= sums[digit];
    if (digit < 0) break;
    const uint32_t low = range.low + (static_cast<uint32_t>(digit) << shift);
    if (shift == 0) {
      const int64_t each = weight(low);  // positive: its digit reached the sum
      return {low, (wanted + each - 1) / each};
    }
    count = kernels.collect(keys, count, {low, low + ((1u << shift) - 1)}, spare);
    keys = spare;
  }
  return {0, INT64_MAX};
}

}  // namespace
}  // namespace longctx::cpu
