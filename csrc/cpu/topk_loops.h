// The loops of topk_kernels.h in scalar code and whatever the compiler makes of it, over
// hits32(const uint32_t*, BitRange) and hits16: a bit for each of kBlock elements in [low, low +
// range]. Include after their definitions; everything here has internal linkage, so that code of
// one instruction set is never linked into another.
#pragma once
#include <cstdint>

#include "mass_loops.h"
#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kBlock = 32;

inline uint32_t hits(const uint32_t* x, BitRange range) { return hits32(x, range); }
inline uint32_t hits(const uint16_t* x, BitRange range) { return hits16(x, range); }

template <class Bits>
inline void append(const Bits* row, int64_t index, BitRange range, ScoreList& list) {
  list.keys[list.count] = row[index];  // overwritten if NaN
  list.indices[list.count] = static_cast<int32_t>(index);
  list.count += (row[index] & (range.sign - 1)) <= range.magnitude;
}

template <class Bits>
int64_t scan(const Bits* row, int64_t begin, int64_t end, BitRange range, ScoreList& list) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    uint32_t found = hits(row + i, range);
    if (found == 0) continue;
    if (list.count + kBlock > list.capacity) return i;
    for (; found != 0; found &= found - 1) append(row, i + __builtin_ctz(found), range, list);
  }
  for (; i < end; ++i) {
    if (static_cast<Bits>(row[i] - range.low) > range.range) continue;
    if (list.count == list.capacity) return i;
    append(row, i, range, list);
  }
  return i;
}

void order_keys(FloatFormat format, int64_t count, uint32_t* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(keys[i], format);
}

KeyRange key_range(const uint32_t* keys, int64_t count) {
  KeyRange range{keys[0], keys[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.low = keys[i] < range.low ? keys[i] : range.low;
    range.high = keys[i] > range.high ? keys[i] : range.high;
  }
  return range;
}

int64_t collect(const uint32_t* keys, int64_t count, KeyRange range, uint32_t* to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = keys[i];
    to[kept] = key;  // overwritten unless in range
    kept += key - range.low <= range.high - range.low;
  }
  return kept;
}

void keep(uint32_t key, int64_t num_ties, ScoreList& list) {
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; ++i) {
    const uint32_t entry = list.keys[i];
    const bool tied = (entry == key) & (num_ties > 0);
    num_ties -= tied;
    list.keys[kept] = entry;  // overwritten unless kept
    list.indices[kept] = list.indices[i];
    kept += tied | (entry > key);
  }
  list.count = kept;
}

constexpr TopKKernels kTopKKernels = {scan<uint32_t>, scan<uint16_t>, order_keys, key_range,
                                      collect,        keep,           mass_sum};

}  // namespace
}  // namespace longctx::cpu
