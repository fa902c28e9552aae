// The keys that a unit of gather_attention reads, run by run, gathered into lists.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "dense_chunk.h"
#include "few_rows.h"
#include "longctx/mask.h"
#include "longctx/sequence.h"

namespace longctx::cpu {

struct GatherUnit {
  int64_t batch;
  int64_t head;   // of the units: kv heads, or query heads where these select for themselves
  int64_t token;  // row of the query axis
};

// Where the unit's token stands for the rotary embedding.
inline int64_t q_position(const GatherAttentionParams& p, const GatherUnit& unit) {
  if (p.rope.q_positions.data != nullptr) return *p.rope.q_positions.row(unit.batch, 0, unit.token);
  return sequence_at(p.seqs, unit.batch).diagonal() + unit.token;
}

class SelectedKeys {
 public:
  SelectedKeys() = default;
  // Slots [slot, slot_end) of the unit: the keys of its listed entries one after the other, then
  // num_first and num_last more. Not every slot holds a key.
  SelectedKeys(const GatherAttentionParams& p, const GatherUnit& unit, int64_t heads, int64_t slot,
               int64_t slot_end)
      : params_(&p), slot_(slot), slot_end_(slot_end) {
    const Sequence seq = sequence_at(p.seqs, unit.batch);
    const int64_t visible = clamp_index(seq.diagonal() + unit.token + 1, 0, seq.k_len);
    first_end_ = std::min(p.num_first, visible);
    last_begin_ = std::max(first_end_, visible - std::min(p.num_last, visible));
    last_end_ = visible;
    const int64_t index_head = unit.head * p.index_heads / heads;
    if (p.rope.cos_sin != nullptr) {
      const int64_t position = q_position(p, unit);
      last_shift_ = position - (seq.diagonal() + unit.token);
      // A token that the table has no position for sees nothing.
      if (p.rope.row(position) == nullptr) slot_ = slot_end_;
      if (p.rope.k_positions.data != nullptr) {
        positions_ = p.rope.k_positions.row(unit.batch, index_head, unit.token);
      }
    }
    const int64_t kv_head = unit.head * p.num_kv_heads / heads;
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
          skip(count);
          continue;
        }
        k += page * params_->k.batch_stride * element_bytes(params_->dtype);
        v += page * params_->v.batch_stride * element_bytes(params_->dtype);
      }
      const RopeParams& rope = params_->rope;
      for (int64_t i = 0; i < count; ++i, ++row) {
        if (rope.cos_sin != nullptr) {
          const float* angles = rope.row(run_position_ + i * run_step_);
          if (angles == nullptr) continue;
          list->rope[list->count] = angles;
        }
        list->k_rows[list->count] = k + row * k_step_;
        list->v_rows[list->count] = v + row * v_step_;
        list->bias[list->count] = run_bias_;
        ++list->count;
      }
      skip(count);
    }
    return list->count > 0;
  }

 private:
  void skip(int64_t count) {
    run_.begin += count;
    run_position_ += count * run_step_;
  }

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
        const int64_t first_key = indices_[entry_] * block;
        const int64_t key = first_key + offset_;
        bool listed = indices_[entry_] >= 0;
        if (bias_ != nullptr) {
          run_bias_ = bias_[entry_];
          listed &= run_bias_ != -std::numeric_limits<float>::infinity();
        }
        // Forced keys count once: as such.
        run_ = {std::max(key, first_end_), std::min(key + size, last_begin_)};
        if (!listed) run_ = {};
        run_step_ = params_->rope.k_position_step;
        run_position_ = (positions_ == nullptr ? first_key : positions_[entry_]) +
                        (run_.begin - first_key) * run_step_;
        ++entry_;
        offset_ = 0;
      } else if (slot_ < last) {
        run_bias_ = 0;
        size = std::min(size, last - slot_);
        run_ = {slot_ - first, std::min(slot_ - first + size, first_end_)};
        run_step_ = 1;
        run_position_ = run_.begin;
      } else {
        run_bias_ = 0;
        const int64_t key = last_begin_ + slot_ - last;
        run_ = {key, std::min(key + size, last_end_)};
        run_step_ = 1;
        run_position_ = key + last_shift_;
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
  const int32_t* positions_ = nullptr;      // [num_entries]; null: their keys' indices
  int64_t last_shift_ = 0;  // from the index of one of the last keys to its position
  Interval run_;            // keys left of the current run
  int64_t run_position_ = 0, run_step_ = 1;  // of run_.begin, and from key to key
  float run_bias_ = 0;
};

}  // namespace longctx::cpu
