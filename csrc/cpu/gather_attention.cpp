// gather_attention on the CPU: each query token reads only the keys that were selected for it,
// where they stand, once for all query heads that share the selection.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "dense_chunk.h"
#include "few_rows_run.h"
#include "kernels.h"
#include "longctx/mask.h"
#include "longctx/sequence.h"

namespace longctx::cpu {
namespace {

struct Unit {
  int64_t batch;
  int64_t head;   // of the units: kv heads, or query heads where these select for themselves
  int64_t token;  // row of the query axis
};

// The selected keys of a unit, or a segment of them: run by run, gathered into lists.
class SelectedKeys {
 public:
  SelectedKeys() = default;
  // Slots [slot, slot_end) of the unit: the keys of its listed entries one after the other, then
  // num_first and num_last more. Not every slot holds a key.
  SelectedKeys(const GatherAttentionParams& p, const Unit& unit, int64_t heads, int64_t slot,
               int64_t slot_end)
      : params_(&p), slot_(slot), slot_end_(slot_end) {
    const Sequence seq = sequence_at(p.seqs, unit.batch);
    const int64_t visible = clamp_index(seq.diagonal() + unit.token + 1, 0, seq.k_len);
    first_end_ = std::min(p.num_first, visible);
    last_begin_ = std::max(first_end_, visible - std::min(p.num_last, visible));
    last_end_ = visible;
    const int64_t kv_head = unit.head * p.num_kv_heads / heads;
    const int64_t index_head = unit.head * p.index_heads / heads;
    const bool in_pages = p.pages.page_table != nullptr;
    const int64_t first = in_pages ? 0 : unit.batch;
    k_ = row_address(p.k, element_bytes(p.dtype), first, kv_head, 0);
    v_ = row_address(p.v, element_bytes(p.dtype), first, kv_head, 0);
    if (in_pages) pages_ = p.pages.page_table + unit.batch * p.pages.max_pages;
    k_step_ = p.k.seq_stride * element_bytes(p.dtype);
    v_step_ = p.v.seq_stride * element_bytes(p.dtype);
    indices_ = p.indices.row(unit.batch, index_head, unit.token);
    num_entries_ = p.num_entries;
    if (p.counts.data != nullptr) {
      num_entries_ =
          clamp_index(*p.counts.row(unit.batch, index_head, unit.token), 0, p.num_entries);
    }
    if (p.bias.data != nullptr) bias_ = p.bias.row(unit.batch, index_head, unit.token);
    entry_ = slot / p.block_size_k;
    offset_ = slot % p.block_size_k;
  }

  // False when no key is left.
  bool next(KeyList* list) {
    list->count = 0;
    list->has_bias = bias_ != nullptr;
    while (list->count < kListKeys) {
      if (run_.begin >= run_.end && !next_run()) break;
      const char *k = k_, *v = v_;
      int64_t row = run_.begin;
      int64_t count = std::min(run_.end - run_.begin, kListKeys - list->count);
      if (pages_ != nullptr) {
        const PagesParams& pages = params_->pages;
        const int64_t page = pages_[row / pages.page_size];
        row %= pages.page_size;
        count = std::min(count, pages.page_size - row);
        if (page < 0 || page >= pages.num_pages) {
          run_.begin += count;
          continue;
        }
        k += page * params_->k.batch_stride * element_bytes(params_->dtype);
        v += page * params_->v.batch_stride * element_bytes(params_->dtype);
      }
      for (int64_t i = 0; i < count; ++i, ++row) {
        list->k_rows[list->count + i] = k + row * k_step_;
        list->v_rows[list->count + i] = v + row * v_step_;
        list->bias[list->count + i] = run_bias_;
      }
      run_.begin += count;
      list->count += count;
    }
    return list->count > 0;
  }

 private:
  bool next_run() {
    const int64_t block = params_->block_size_k;
    const int64_t first = params_->num_entries * block;  // slot of the first forced key
    const int64_t last = first + params_->num_first;
    while (slot_ < slot_end_) {
      int64_t size = slot_end_ - slot_;
      if (slot_ < first) {
        if (entry_ >= num_entries_) {
          slot_ = first;
          continue;
        }
        size = std::min(size, block - offset_);
        const int64_t key = indices_[entry_] * block + offset_;
        bool listed = indices_[entry_] >= 0;
        if (bias_ != nullptr) {
          run_bias_ = bias_[entry_];
          listed &= run_bias_ != -std::numeric_limits<float>::infinity();
        }
        ++entry_;
        offset_ = 0;
        // Forced keys count once: as such.
        run_ = {std::max(key, first_end_), std::min(key + size, last_begin_)};
        if (!listed) run_ = {};
      } else if (slot_ < last) {
        run_bias_ = 0;
        size = std::min(size, last - slot_);
        run_ = {slot_ - first, std::min(slot_ - first + size, first_end_)};
      } else {
        run_bias_ = 0;
        const int64_t key = last_begin_ + slot_ - last;
        run_ = {key, std::min(key + size, last_end_)};
      }
      slot_ += size;
      if (run_.begin < run_.end) return true;
    }
    return false;
  }

  const GatherAttentionParams* params_ = nullptr;
  int64_t slot_ = 0, slot_end_ = 0;
  int64_t entry_ = 0, offset_ = 0;  // of the slot, while it is a listed one
  int64_t num_entries_ = 0;
  const int32_t* indices_ = nullptr;  // [num_entries]
  // Keys [0, first_end) and [last_begin, last_end) are forced; the unit sees those below last_end.
  int64_t first_end_ = 0, last_begin_ = 0, last_end_ = 0;
  const char *k_ = nullptr, *v_ = nullptr;  // row of key 0
  int64_t k_step_ = 0, v_step_ = 0;         // bytes
  const int32_t* pages_ = nullptr;          // [max_pages]; null: not paged
  const float* bias_ = nullptr;             // [num_entries]; null: none
  Interval run_;
  float run_bias_ = 0;
};

class Source {
 public:
  using Keys = SelectedKeys;

  explicit Source(const GatherAttentionParams& params)
      : p_(params),
        heads_(params.index_heads == params.num_q_heads ? params.num_q_heads
                                                        : params.num_kv_heads) {
    job_.shape = {p_.dtype, p_.head_dim, p_.head_dim_v, p_.softmax_scale, p_.softcap};
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
    const Unit u = unit(index);
    return row_address(p_.q, element_bytes(p_.dtype), u.batch, u.head * job_.heads + row, u.token);
  }
  FewRowsOutput output(int64_t index, int64_t row) const {
    const Unit u = unit(index);
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
  Unit unit(int64_t index) const {
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
