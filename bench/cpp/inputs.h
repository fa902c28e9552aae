// Inputs that the microbenchmarks share.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>

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

// [heads, seqlen, head_dim], contiguous, standard normal; on a cache line, as torch's tensors are.
template <class T>
class Tensor {
 public:
  Tensor(int64_t heads, int64_t seqlen, int64_t head_dim)
      : size_(heads * seqlen * head_dim),
        data_(static_cast<T*>(std::aligned_alloc(64, (size_ * sizeof(T) + 63) / 64 * 64)),
              std::free),
        seqlen_(seqlen),
        head_dim_(head_dim) {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size_; ++i) narrow(normal(rng), data_.get()[i]);
  }
  TensorView view() { return {data_.get(), size_, seqlen_ * head_dim_, head_dim_}; }

 private:
  int64_t size_;
  std::unique_ptr<T, decltype(&std::free)> data_;
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
