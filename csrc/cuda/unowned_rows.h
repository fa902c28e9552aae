// Packed sequences need not cover the query axis: rows that no sequence owns get out = 0,
// lse = -inf. Runs before the kernel proper; where the sequences cover everything it only looks.
#pragma once
#include "longctx/params.h"

namespace longctx::cuda {

struct UnownedRows {
  SequenceParams seqs;  // packed
  int64_t num_maps = 0;
  float* lse = nullptr;  // [num_maps, seqlen_q]; null: only out
  char* out = nullptr;   // [num_maps, seqlen_q], strides in bytes; null: only lse
  int64_t map_stride = 0;
  int64_t row_stride = 0;
  int64_t row_bytes = 0;  // even
};
void fill_unowned_rows(const char* op, const UnownedRows& rows);

}  // namespace longctx::cuda
