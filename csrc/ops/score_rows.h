// The arguments that topk_select and threshold_select share, checked once.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"

namespace longctx {

// `lengths` must be contiguous and outlive the result.
inline ScoreRows score_rows(const Checker& check, const Tensor& scores,
                            const OptionalTensor& lengths) {
  ScoreRows rows;
  check.require(scores.scalar_type() == ScalarType::Float ||
                    scores.scalar_type() == ScalarType::BFloat16 ||
                    scores.scalar_type() == ScalarType::Half,
                "scores", "have dtype float32, bfloat16 or float16", scores.scalar_type());
  rows.dtype = check.floating("scores", scores);
  check.require(scores.dim() >= 1 && scores.dim() <= kMaxRowDims + 1, "scores",
                "have shape [..., n], of 1 to 9 dims", scores.sizes());
  rows.num_dims = static_cast<int>(scores.dim()) - 1;
  rows.n = scores.size(rows.num_dims);
  check.require(rows.n <= std::numeric_limits<int32_t>::max(), "scores",
                "have indices that fit int32", scores.sizes());
  check.contiguous_last_dim("scores", scores);
  rows.num_rows = 1;
  for (int dim = 0; dim < rows.num_dims; ++dim) {
    rows.sizes[dim] = scores.size(dim);
    rows.strides[dim] = scores.stride(dim);
    rows.num_rows *= rows.sizes[dim];
  }
  if (lengths) {
    check.same_device("lengths", *lengths, scores);
    check.dtype("lengths", *lengths, ScalarType::Int);
    bool same = lengths->dim() == rows.num_dims;
    for (int dim = 0; same && dim < rows.num_dims; ++dim) {
      same = lengths->size(dim) == rows.sizes[dim];
    }
    if (!same) {
      check.fail("lengths",
                 "have the shape of `scores` without its last dim, of " + to_text(scores.sizes()),
                 lengths->sizes());
    }
    rows.lengths = lengths->const_data_ptr<int32_t>();
  }
  rows.data = scores.const_data_ptr();
  return rows;
}

// `name` is the argument that `capacity`, the entries of a row of indices, was given as.
inline void check_forced(const Checker& check, const char* name, int64_t capacity, int64_t n,
                         int64_t num_first, int64_t num_last) {
  check.require(capacity >= 0 && capacity <= std::numeric_limits<int32_t>::max(), name,
                "be a number of indices", capacity);
  check.require(num_first >= 0, "num_first", "not be negative", num_first);
  check.require(num_last >= 0, "num_last", "not be negative", num_last);
  const int64_t forced = std::min(std::min(num_first, n) + std::min(num_last, n), n);
  check.require(capacity >= forced, name, "leave room for `num_first` and `num_last`", capacity);
}

// Outputs of the shape of the rows, with `capacity` indices each.
inline std::tuple<Tensor, Tensor> new_index_rows(const Tensor& scores, int64_t capacity) {
  const auto sizes = scores.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = capacity;
  const Tensor indices = new_tensor(scores, shape, ScalarType::Int);
  shape.pop_back();
  return {indices, new_tensor(scores, shape, ScalarType::Int)};
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : tensor;
}

}  // namespace longctx
