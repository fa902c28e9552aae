// Where a sequence lies on the query and key axes. Offsets read from tensors are clamped to the
// axes, so that a wrong cu_seqlens or seqused_k can never address memory outside them.
#pragma once
#include <cstdint>

#include "longctx/config.h"
#include "longctx/params.h"

namespace longctx {

struct Sequence {
  int64_t batch_index = 0;
  int64_t q_begin = 0;  // first row on the query axis
  int64_t q_len = 0;
  int64_t k_begin = 0;  // first row on the key axis
  int64_t k_len = 0;
  // Query row i of the sequence stands at this key position plus i (bottom-right alignment).
  LONGCTX_HD int64_t diagonal() const { return k_len - q_len; }
};

LONGCTX_HD inline int64_t clamp_index(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

LONGCTX_HD inline Sequence sequence_at(const SequenceParams& params, int64_t index) {
  Sequence seq;
  if (params.cu_seqlens_q == nullptr) {
    seq.batch_index = index;
    seq.q_len = params.seqlen_q;
    seq.k_len = params.seqused_k == nullptr
                    ? params.seqlen_k
                    : clamp_index(params.seqused_k[index], 0, params.seqlen_k);
    return seq;
  }
  seq.q_begin = clamp_index(params.cu_seqlens_q[index], 0, params.seqlen_q);
  seq.q_len =
      clamp_index(params.cu_seqlens_q[index + 1], seq.q_begin, params.seqlen_q) - seq.q_begin;
  seq.k_begin = clamp_index(params.cu_seqlens_k[index], 0, params.seqlen_k);
  seq.k_len =
      clamp_index(params.cu_seqlens_k[index + 1], seq.k_begin, params.seqlen_k) - seq.k_begin;
  return seq;
}

}  // namespace longctx
