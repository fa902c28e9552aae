// linear_attention and linear_attention_states beside loops over pairs of tokens in float64.
#pragma once
#include "longctx/decay.h"
#include "tensors.h"

namespace longctx::simt_tests {

enum class Decay { kNone, kPerHead, kPerToken };

struct LinearCase {
  DType dtype = DType::kBFloat16;
  int64_t batch = 1, num_q_heads = 2, num_kv_heads = 1;
  int64_t seqlen_q = 150, seqlen_k = 150;
  int64_t head_dim = 128, head_dim_v = 128;
  Layout layout = Layout::kHeadsFirst;
  Decay decay = Decay::kPerHead;
  bool causal = true, reverse = false, normalize = false, wide_out = false;
  bool initial_state = true;
  bool rows = true;  // else linear_attention_states
  int64_t num_segments = 1;
  double size = 1;          // of q, k and v
  double decay_size = 0.1;  // of log decays
  std::vector<int32_t> cu_seqlens;

  int64_t num_seqs() const {
    return cu_seqlens.empty() ? batch : static_cast<int64_t>(cu_seqlens.size()) - 1;
  }
  int64_t state_dim() const { return head_dim_v + (normalize ? 1 : 0); }
  int64_t num_chunks() const {
    return (seqlen_k + kLinearChunk - 1) / kLinearChunk + (cu_seqlens.empty() ? 0 : num_seqs());
  }
};

// Runs the case in every mode and compares all that it returns.
void check_linear(const LinearCase& c);

// A sweep that is cut at a chunk and resumed from the state gives the same bits. One head.
void check_linear_resumes(const LinearCase& c);

}  // namespace longctx::simt_tests
