// Inputs that the microbenchmarks share.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/reduced_float.h"
#include "longctx/params.h"

namespace longctx::cpu {
namespace {

template <class T>
DType dtype_of();
template <>
inline DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
inline DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}
template <>
inline DType dtype_of<Float16>() {
  return DType::kFloat16;
}

// [heads, seqlen, head_dim], contiguous, standard normal.
template <class T>
class Tensor {
 public:
  Tensor(int64_t heads, int64_t seqlen, int64_t head_dim)
      : data_(heads * seqlen * head_dim), seqlen_(seqlen), head_dim_(head_dim) {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    for (T& x : data_) narrow(normal(rng), x);
  }
  TensorView view() {
    return {data_.data(), static_cast<int64_t>(data_.size()), seqlen_ * head_dim_, head_dim_};
  }

 private:
  std::vector<T> data_;
  int64_t seqlen_, head_dim_;
};

// One batch entry of `seqlen_q` queries at the end of `seqlen_k` keys.
inline SequenceParams one_sequence(int64_t seqlen_q, int64_t seqlen_k) {
  SequenceParams seqs;
  seqs.batch = seqs.num_seqs = 1;
  seqs.seqlen_q = seqlen_q;
  seqs.seqlen_k = seqlen_k;
  return seqs;
}

}  // namespace
}  // namespace longctx::cpu
