// gather_attention beside loops over the selected keys in float64.
#pragma once
#include "tensors.h"

namespace longctx::simt_tests {

struct GatherCase {
  DType dtype = DType::kBFloat16;
  int64_t batch = 1;
  int64_t num_q_heads = 4;
  int64_t num_kv_heads = 1;
  int64_t seqlen_q = 1;
  int64_t seqlen_k = 90;
  int64_t head_dim = 128;
  int64_t head_dim_v = 128;
  int64_t num_entries = 20;
  int64_t index_heads = 1;
  int64_t block_size_k = 1;
  int64_t num_first = 0;
  int64_t num_last = 0;
  int64_t page_size = 0;  // > 0: k and v in pages
  int64_t rotary_dim = 0;
  int64_t k_position_step = 1;
  double softcap = 0;
  bool with_counts = false;
  bool with_bias = false;
  bool shared_tokens = false;  // one list for all
  bool with_tree = false;
  bool with_results = false;     // masses and states of the entries
  bool with_q_positions = true;  // where rotated
  bool with_workspace = false;   // and then the bits of a call without one
  std::vector<int32_t> seqused_k;
  Layout layout = Layout::kHeadsFirst;
};

// Runs the case in every mode and compares all that it returns.
void check_gather(const GatherCase& c);

}  // namespace longctx::simt_tests
