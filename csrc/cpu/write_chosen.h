// Writes what was chosen of a row.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "longctx/score_rows.h"
#include "topk_kernels.h"

namespace longctx::cpu {

// The forced indices, between them those of the list (null: the first `places` that compete), then
// -1.
inline void write_chosen(const TopKSelectParams& p, int64_t row, const RowParts& parts,
                         const ScoreList* list) {
  int32_t* const out = p.indices + row * p.k;
  int32_t* next = out;
  const auto count_up = [&next](int64_t begin, int64_t end) {
    std::iota(next, next + (end - begin), static_cast<int32_t>(begin));
    next += end - begin;
  };
  count_up(0, parts.first);
  if (list != nullptr) {
    next = std::copy_n(list->indices, list->count, next);
  } else {
    count_up(parts.first, parts.first + parts.places);
  }
  count_up(parts.last, parts.length);
  p.counts[row] = static_cast<int32_t>(next - out);
  std::fill(next, out + p.k, -1);
}

}  // namespace longctx::cpu
