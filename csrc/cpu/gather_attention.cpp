// gather_attention on the CPU: each query token reads only the keys that were selected for it,
// where they stand, once for all query heads that share the selection.
#include <cstdint>

#include "dense_chunk.h"
#include "few_rows_run.h"
#include "gather_keys.h"
#include "kernels.h"

namespace longctx::cpu {
namespace {

class Source {
 public:
  using Keys = SelectedKeys;

  explicit Source(const GatherAttentionParams& params)
      : p_(params),
        heads_(params.index_heads == params.num_q_heads ? params.num_q_heads
                                                        : params.num_kv_heads) {
    job_.shape = {p_.dtype,         p_.head_dim, p_.head_dim_v,
                  p_.softmax_scale, p_.softcap,  p_.rope.rotary_dim};
    job_.num_units = p_.seqs.batch * heads_ * p_.seqs.seqlen_q;
    job_.heads = p_.num_q_heads / heads_;
    job_.num_segments = choose_segments(num_slots(), job_.num_units);
  }
  const FewRowsJob& job() const { return job_; }

  Keys keys(int64_t index, int64_t segment) const {
    return {p_, unit(index), heads_, num_slots() * segment / job_.num_segments,
            num_slots() * (segment + 1) / job_.num_segments};
  }
  const void* query(int64_t index, int64_t row) const {
    const GatherUnit u = unit(index);
    return row_address(p_.q, element_bytes(p_.dtype), u.batch, u.head * job_.heads + row, u.token);
  }
  const float* query_rope(int64_t index, int64_t) const {
    return p_.rope.cos_sin == nullptr ? nullptr : p_.rope.row(q_position(p_, unit(index)));
  }
  FewRowsOutput output(int64_t index, int64_t row) const {
    const GatherUnit u = unit(index);
    const int64_t head = u.head * job_.heads + row;
    const int64_t lse_size = p_.dtype == DType::kFloat64 ? 8 : 4;
    const int64_t flat = (u.batch * p_.num_q_heads + head) * p_.seqs.seqlen_q + u.token;
    return {const_cast<char*>(row_address(p_.out, element_bytes(p_.dtype), u.batch, head, u.token)),
            static_cast<char*>(p_.lse) + flat * lse_size, nullptr};
  }

 private:
  int64_t num_slots() const {
    return p_.num_entries * p_.block_size_k + p_.num_first + p_.num_last;
  }
  GatherUnit unit(int64_t index) const {
    const int64_t tokens = p_.seqs.seqlen_q;
    return {index / tokens / heads_, index / tokens % heads_, index % tokens};
  }

  const GatherAttentionParams& p_;
  int64_t heads_;  // of the units
  FewRowsJob job_;
};

}  // namespace

void run_gather_attention_cpu(const GatherAttentionParams& params) {
  const Source source(params);
  run_few_rows(source.job(), source);
}

}  // namespace longctx::cpu
