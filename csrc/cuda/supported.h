// What ops ask of their inputs on CUDA, beyond what csrc/ops has checked. `first` is the op's first
// argument.
#pragma once
#include <stdexcept>
#include <string>

#include "longctx/params.h"

namespace longctx::cuda {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxSeqlen = int64_t{1} << 30;  // positions are 32 bits in a kernel

inline void require_supported(const std::string& op, DType dtype, int64_t head_dim,
                              const SequenceParams& seqs, const char* first = "q") {
  const auto require = [&op](bool ok, const char* argument, const char* rule,
                             const std::string& got) {
    if (ok) return;
    throw std::invalid_argument("longctx::" + op + ": `" + argument + "` must " + rule +
                                " on CUDA; got " + got);
  };
  require(dtype != DType::kFloat64, first, "have dtype float32, bfloat16 or float16", "float64");
  require(head_dim <= kMaxHeadDim, first, "have a head_dim of at most 256",
          std::to_string(head_dim));
  require(seqs.seqlen_q <= kMaxSeqlen, "q", "have at most 2^30 rows",
          std::to_string(seqs.seqlen_q));
  require(seqs.seqlen_k <= kMaxSeqlen, "k", "have at most 2^30 rows",
          std::to_string(seqs.seqlen_k));
}

inline void require_head_dim_v(const std::string& op, int64_t head_dim_v) {
  if (head_dim_v <= kMaxHeadDim) return;
  throw std::invalid_argument("longctx::" + op +
                              ": `v` must have a head_dim_v of at most 256 on CUDA; got " +
                              std::to_string(head_dim_v));
}

}  // namespace longctx::cuda
