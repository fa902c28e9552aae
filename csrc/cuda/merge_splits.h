// Attention whose keys were split over several blocks: their results become one.
#pragma once
#include "longctx/params.h"

namespace longctx::cuda {

// Every split writes the lse of every row; -inf where it saw no key, and then no out.
struct SplitMerge {
  DType dtype = DType::kFloat32;  // of merged_out; not float64
  const float* out = nullptr;     // [num_splits, batch, heads, seqlen_q, dim_v], without sinks
  const float* lse = nullptr;     // [num_splits, batch, heads, seqlen_q], without sinks
  const float* sinks = nullptr;   // [heads] or null: applied here, and only here
  int64_t num_splits = 0;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t seqlen_q = 0;
  int64_t dim_v = 0;
  TensorView merged_out;        // [batch, heads, seqlen_q, dim_v], any strides
  float* merged_lse = nullptr;  // [batch, heads, seqlen_q], without sinks
};

void merge_splits(const char* op, const SplitMerge& params);

}  // namespace longctx::cuda
