// Where a row of scores lies and which of its indices compete: the rules that both backends share.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx {

LONGCTX_HD inline int64_t row_offset(const ScoreRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int dim = rows.num_dims - 1; dim >= 0; --dim) {
    offset += row % rows.sizes[dim] * rows.strides[dim];
    row /= rows.sizes[dim];
  }
  return offset;
}

LONGCTX_HD inline int64_t row_length(const ScoreRows& rows, int64_t row) {
  return rows.lengths == nullptr ? rows.n : clamp_index(rows.lengths[row], 0, rows.n);
}

// Indices [0, first) and [last, length) are forced, [first, last) compete for `places` of the
// `capacity` entries of the result. The forced ones fit: the op checks that.
struct RowParts {
  int64_t first = 0;
  int64_t last = 0;
  int64_t length = 0;
  int64_t places = 0;
};

LONGCTX_HD inline RowParts row_parts(int64_t length, int64_t num_first, int64_t num_last,
                                     int64_t capacity) {
  RowParts parts;
  parts.length = length;
  parts.first = num_first < length ? num_first : length;
  const int64_t free = length - parts.first;
  parts.last = length - (num_last < free ? num_last : free);
  parts.places =
      clamp_index(capacity - parts.first - (length - parts.last), 0, parts.last - parts.first);
  return parts;
}

}  // namespace longctx
