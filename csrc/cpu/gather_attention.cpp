// gather_attention on the CPU: each query token reads only the keys that were selected for it,
// where they stand, once for all query heads that share the selection, and where tokens share it
// too, once for all of them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "dense_chunk.h"
#include "few_rows_run.h"
#include "gather_keys.h"
#include "kernels.h"

namespace longctx::cpu {
namespace {

template <class T>
bool same_for_all_tokens(const RowsView<T>& rows) {
  return rows.data == nullptr || rows.row_stride == 0;
}

// Whether one pass over the keys can serve all tokens.
bool tokens_share_keys(const GatherAttentionParams& p) {
  if (p.seqs.seqlen_q < 2 || p.block_out != nullptr) return false;
  if (!same_for_all_tokens(p.indices) || !same_for_all_tokens(p.counts) ||
      !same_for_all_tokens(p.bias) || !same_for_all_tokens(p.rope.k_positions)) {
    return false;
  }
  if (p.rope.cos_sin == nullptr) return true;
  // The last keys stand where they do for every token, and every token stands somewhere.
  for (int64_t b = 0; b < p.seqs.batch; ++b) {
    for (int64_t t = 0; t < p.seqs.seqlen_q; ++t) {
      const int64_t position = q_position(p, b, t);
      if (p.rope.row(position) == nullptr) return false;
      const bool follows = position == q_position(p, b, 0) + t;
      if (!follows && p.num_last > 0 && p.tree_mask.data == nullptr) return false;
    }
  }
  return true;
}

// Units are (batch entry, head, token), or (batch entry, head) where tokens share keys; heads are
// kv heads, or query heads where these select for themselves.
class Source : public FewRowsSource {
 public:
  using Keys = SelectedKeys;

  explicit Source(const GatherAttentionParams& params)
      : p_(params),
        heads_(p_.index_heads == p_.num_q_heads ? p_.num_q_heads : p_.num_kv_heads),
        unit_tokens_(tokens_share_keys(p_) ? 1 : p_.seqs.seqlen_q) {
    job_.shape = {p_.dtype,         p_.head_dim, p_.head_dim_v,
                  p_.softmax_scale, p_.softcap,  p_.rope.rotary_dim};
    job_.num_units = p_.seqs.batch * heads_ * unit_tokens_;
    job_.num_tokens = unit_tokens_ == 0 ? 1 : p_.seqs.seqlen_q / unit_tokens_;
    job_.heads = p_.num_q_heads / heads_;
    job_.own_keys = job_.num_tokens > 1;
    job_.num_segments =
        p_.block_out != nullptr ? p_.num_entries + 1 : choose_segments(num_slots(), job_.num_units);
    if (p_.key_mass != nullptr) {
      job_.num_masses = own_masses() + (job_.own_keys ? p_.num_entries + 1 : 0);
    }
  }
  const FewRowsJob& job() const { return job_; }

  Keys keys(int64_t index, int64_t segment) const {
    const Unit u = unit(index);
    GatherPart part;
    part.batch = u.batch;
    part.kv_head = u.head * p_.num_kv_heads / heads_;
    part.index_head = u.head * p_.index_heads / heads_;
    part.token = u.token;
    part.slots = slots(segment);
    part.entry_base = segment;
    part.in_tree = p_.tree_mask.data != nullptr;
    if (!job_.own_keys) {
      part.keys = key_set(p_, u.batch, u.token);
      // A token that the table has no position for sees nothing.
      if (p_.rope.cos_sin != nullptr && query_rope(index, 0) == nullptr) part.slots = {};
    } else if (segment < job_.num_segments) {
      part.keys = common_key_set(p_, u.batch);
      part.in_tree = false;
    } else {
      part.token = segment - job_.num_segments;
      part.keys = own_key_set(p_, u.batch, part.token);
      part.slots = {0, num_slots()};
      part.entry_base = own_masses();
    }
    return {p_, part};
  }
  const void* query(int64_t index, int64_t row) const {
    const Unit u = unit(index);
    return row_address(p_.q, element_bytes(p_.dtype), u.batch, head(u, row), token(u, row));
  }
  const float* query_rope(int64_t index, int64_t row) const {
    const Unit u = unit(index);
    return p_.rope.cos_sin == nullptr ? nullptr
                                      : p_.rope.row(q_position(p_, u.batch, token(u, row)));
  }
  FewRowsOutput output(int64_t index, int64_t row) const {
    const Unit u = unit(index);
    const int64_t size = element_bytes(p_.dtype), flat = flat_row(u, row);
    FewRowsOutput output;
    output.out = const_cast<char*>(row_address(p_.out, size, u.batch, head(u, row), token(u, row)));
    output.lse = static_cast<char*>(p_.lse) + flat * lse_bytes();
    if (p_.block_out != nullptr) {
      const int64_t rows = p_.seqs.batch * p_.num_q_heads * p_.seqs.seqlen_q;
      output.segment_out = static_cast<char*>(p_.block_out) + flat * p_.head_dim_v * size;
      output.segment_lse = static_cast<char*>(p_.block_lse) + flat * lse_bytes();
      output.segment_out_step = rows * p_.head_dim_v * size;
      output.segment_lse_step = rows * lse_bytes();
    }
    return output;
  }

  template <class T>
  void reduce_masses(const EntryMass<T>* masses) const {
    const int64_t size = p_.num_entries + 1;
    const int64_t num_totals = p_.seqs.batch * p_.index_heads * p_.index_tokens;
    const auto no_state = [] { return 0; };
    for_each_item(num_totals, no_state, [&](int64_t item, int) {
      const int64_t token = item % p_.index_tokens, head = item / p_.index_tokens % p_.index_heads;
      std::vector<T> total(size);
      const int64_t units = job_.num_units / p_.seqs.batch;
      const int64_t batch = item / p_.index_tokens / p_.index_heads;
      for (int64_t index = batch * units; index < (batch + 1) * units; ++index) {
        const Unit u = unit(index);
        if (u.head * p_.index_heads / heads_ != head) continue;
        for (int64_t row = 0; row < job_.num_rows(); ++row) {
          if (p_.index_tokens > 1 && this->token(u, row) != token) continue;
          add_masses(masses + (index * job_.num_rows() + row) * job_.num_masses,
                     static_cast<const T*>(p_.lse)[flat_row(u, row)], total.data());
        }
      }
      std::copy(total.begin(), total.end(), p_.key_mass + item * size);
    });
  }

 private:
  struct Unit {
    int64_t batch;
    int64_t head;
    int64_t token;  // the first of the unit
  };
  Unit unit(int64_t index) const {
    return {index / unit_tokens_ / heads_, index / unit_tokens_ % heads_, index % unit_tokens_};
  }
  int64_t head(const Unit& u, int64_t row) const { return u.head * job_.heads + row % job_.heads; }
  int64_t token(const Unit& u, int64_t row) const { return u.token + row / job_.heads; }
  int64_t flat_row(const Unit& u, int64_t row) const {
    return (u.batch * p_.num_q_heads + head(u, row)) * p_.seqs.seqlen_q + token(u, row);
  }
  int64_t lse_bytes() const { return p_.dtype == DType::kFloat64 ? 8 : 4; }

  int64_t num_slots() const {
    return p_.num_entries * p_.block_size_k + p_.num_first + p_.num_last;
  }
  // Of the segments that all rows of a unit see.
  Interval slots(int64_t segment) const {
    if (p_.block_out == nullptr) {
      return {num_slots() * segment / job_.num_segments,
              num_slots() * (segment + 1) / job_.num_segments};
    }
    const int64_t begin = segment * p_.block_size_k;
    return {begin, segment == p_.num_entries ? num_slots() : begin + p_.block_size_k};
  }

  // Masses of a row: those of segment s begin at s, so that segments which share an entry do not
  // share a mass; behind them those of the token's own keys.
  int64_t own_masses() const { return p_.num_entries + job_.num_segments; }

  template <class T>
  void add_masses(const EntryMass<T>* masses, T lse, T* total) const {
    if (lse == -std::numeric_limits<T>::infinity()) return;
    T reference = 0, factor = std::exp(-lse);
    const auto add = [&](const EntryMass<T>& mass, T& sum) {
      if (mass.sum == 0) return;
      if (mass.reference != reference) factor = std::exp(mass.reference - lse);
      reference = mass.reference;
      sum += mass.sum * factor;
    };
    for (int64_t segment = 0; segment < job_.num_segments; ++segment) {
      const Interval range = slots(segment);
      const int64_t last = std::min((range.end - 1) / p_.block_size_k, p_.num_entries);
      for (int64_t e = std::min(range.begin / p_.block_size_k, p_.num_entries); e <= last; ++e) {
        add(masses[segment + e], total[e]);
      }
    }
    if (!job_.own_keys) return;
    for (int64_t e = 0; e <= p_.num_entries; ++e) add(masses[own_masses() + e], total[e]);
  }

  const GatherAttentionParams& p_;
  int64_t heads_;        // of the units
  int64_t unit_tokens_;  // units of a head
  FewRowsJob job_;
};

}  // namespace

void run_gather_attention_cpu(const GatherAttentionParams& params) {
  const Source source(params);
  run_few_rows(source.job(), source);
}

}  // namespace longctx::cpu
