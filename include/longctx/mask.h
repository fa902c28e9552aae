// The predicate, in one place for both backends: which keys a query row sees.
// A row's visible keys are (window or sinks) and (range 0 or range 1), each a half-open interval
// of key positions counted from the first key of the row's sequence.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx {

// Int: int64_t, or int32_t where registers are short and every key position fits.
template <class Int>
struct BasicInterval {
  Int begin = 0;
  Int end = 0;
  LONGCTX_HD bool contains(Int key) const { return key >= begin && key < end; }
  LONGCTX_HD bool covers(Int lo, Int hi) const { return lo >= begin && hi <= end; }
  LONGCTX_HD bool overlaps(Int lo, Int hi) const { return begin < end && lo < end && hi > begin; }
};
using Interval = BasicInterval<int64_t>;

enum class Visibility : int32_t { kNone, kPartial, kFull };

template <class Int>
struct BasicRowMask {
  BasicInterval<Int> window;
  BasicInterval<Int> sinks;
  BasicInterval<Int> ranges[2];

  LONGCTX_HD bool visible(Int key) const {
    return (window.contains(key) || sinks.contains(key)) &&
           (ranges[0].contains(key) || ranges[1].contains(key));
  }

  // Conservative: kFull and kNone are certain, kPartial means "test each key".
  LONGCTX_HD Visibility visibility(Int lo, Int hi) const {
    const bool in_structure = window.covers(lo, hi) || sinks.covers(lo, hi);
    const bool in_ranges = ranges[0].covers(lo, hi) || ranges[1].covers(lo, hi);
    if (in_structure && in_ranges) return Visibility::kFull;
    const bool touches_structure = window.overlaps(lo, hi) || sinks.overlaps(lo, hi);
    const bool touches_ranges = ranges[0].overlaps(lo, hi) || ranges[1].overlaps(lo, hi);
    return touches_structure && touches_ranges ? Visibility::kPartial : Visibility::kNone;
  }
};
using RowMask = BasicRowMask<int64_t>;

// The mask of query row `row` (counted from the sequence's first query).
LONGCTX_HD inline RowMask row_mask(const MaskParams& mask, const Sequence& seq, int64_t row) {
  const int64_t position = row + seq.diagonal();
  RowMask result;
  int64_t end = seq.k_len;
  if (mask.causal && position + 1 < end) end = position + 1;
  if (end < 0) end = 0;
  result.window.begin = 0;
  result.window.end = end;
  if (mask.window_size_left >= 0 && position - mask.window_size_left > 0) {
    result.window.begin = position - mask.window_size_left;
  }
  if (mask.window_size_right >= 0 && position + mask.window_size_right + 1 < end) {
    result.window.end = position + mask.window_size_right + 1;
  }
  result.sinks.end = mask.num_sink_tokens < end ? mask.num_sink_tokens : end;
  if (mask.key_ranges == nullptr) {
    result.ranges[0].end = seq.k_len;
    return result;
  }
  const int32_t* pair = mask.key_ranges + seq.batch_index * mask.key_ranges_batch_stride +
                        (seq.q_begin + row) * mask.key_ranges_row_stride;
  for (int r = 0; r < 2; ++r, pair += mask.key_ranges_range_stride) {
    if (r == mask.num_key_ranges) break;
    result.ranges[r].begin = static_cast<int64_t>(pair[0]) - seq.k_begin;
    result.ranges[r].end = static_cast<int64_t>(pair[1]) - seq.k_begin;
  }
  return result;
}

}  // namespace longctx
