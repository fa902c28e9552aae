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

// Where a token stands for the rotary embedding.
inline int64_t q_position(const GatherAttentionParams& p, int64_t batch, int64_t token) {
  if (p.rope.q_positions.data != nullptr) return *p.rope.q_positions.row(batch, 0, token);
  return sequence_at(p.seqs, batch).diagonal() + token;
}

// Which keys are in the set of a token, and why: no key for two reasons.
struct KeySet {
  Interval first;
  Interval listed;  // keys in here are in the set if an entry lists them
  Interval last;    // without those in `gap`
  Interval gap;
};

inline KeySet key_set(const GatherAttentionParams& p, int64_t batch, int64_t token) {
  const Sequence seq = sequence_at(p.seqs, batch);
  const int64_t visible = clamp_index(seq.diagonal() + token + 1, 0, seq.k_len);
  const int64_t first_end = std::min(p.num_first, visible);
  const int64_t last_begin = std::max(first_end, visible - std::min(p.num_last, visible));
  return {{0, first_end}, {first_end, last_begin}, {last_begin, visible}, {}};
}

// What every token has for the same reason.
inline KeySet common_key_set(const GatherAttentionParams& p, int64_t batch) {
  const KeySet from = key_set(p, batch, 0), to = key_set(p, batch, p.seqs.seqlen_q - 1);
  int64_t end = from.last.end;
  if (p.tree_mask.data != nullptr) {
    end = clamp_index(sequence_at(p.seqs, batch).diagonal(), 0, end);
  }
  return {{0, std::min(from.first.end, end)},
          {to.listed.begin, std::min(from.listed.end, end)},
          {to.last.begin, end},
          {}};
}

// What a token has besides.
inline KeySet own_key_set(const GatherAttentionParams& p, int64_t batch, int64_t token) {
  const KeySet common = common_key_set(p, batch), all = key_set(p, batch, token);
  return {{common.first.end, all.first.end},
          {std::max(all.listed.begin, common.listed.end), all.listed.end},
          all.last,
          common.last};
}

// What lists of keys are drawn from.
struct GatherPart {
  int64_t batch = 0;
  int64_t kv_head = 0;
  int64_t index_head = 0;
  int64_t token = 0;  // whose rows of the index tensors are read
  KeySet keys;
  bool in_tree = false;  // the tree decides about the keys of its tokens
  Interval slots;        // the keys of the entries one after the other, then num_first and num_last
                         // more; not every slot holds a key
  int64_t entry_base = 0;  // added to the entries in a list
};

class SelectedKeys {
  static constexpr int64_t kSequentialKeys = 16;  // of an entry that reads like a sequence

 public:
  SelectedKeys() = default;
  SelectedKeys(const GatherAttentionParams& p, const GatherPart& part)
      : params_(&p), part_(part), slot_(part.slots.begin) {
    const bool in_pages = p.pages.page_table != nullptr;
    const int64_t first = in_pages ? 0 : part.batch;
    k_ = row_address(p.k, element_bytes(p.dtype), first, part.kv_head, 0);
    v_ = row_address(p.v, element_bytes(p.dtype), first, part.kv_head, 0);
    if (in_pages) pages_ = p.pages.page_table + part.batch * p.pages.max_pages;
    k_step_ = p.k.seq_stride * element_bytes(p.dtype);
    v_step_ = p.v.seq_stride * element_bytes(p.dtype);
    indices_ = p.indices.row(part.batch, part.index_head, part.token);
    num_entries_ = p.num_entries;
    if (p.counts.data != nullptr) {
      num_entries_ =
          clamp_index(*p.counts.row(part.batch, part.index_head, part.token), 0, p.num_entries);
    }
    if (p.bias.data != nullptr) bias_ = p.bias.row(part.batch, part.index_head, part.token);
    entry_ = part.slots.begin / p.block_size_k;
    offset_ = part.slots.begin % p.block_size_k;
    diagonal_ = sequence_at(p.seqs, part.batch).diagonal();
    if (part.in_tree) tree_ = p.tree_mask.row(part.batch, 0, part.token);
    if (p.rope.cos_sin != nullptr) place_rope();
    plain_ = tree_ == nullptr && p.rope.cos_sin == nullptr;
    simple_ = plain_ && p.block_size_k == 1 && pages_ == nullptr && bias_ == nullptr;
  }

  // False when no key is left.
  bool next(KeyList* list) {
    list->count = 0;
    list->has_bias = bias_ != nullptr;
    list->scattered = params_->block_size_k < kSequentialKeys;
    if (simple_) list_single_keys(list);
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
        if (!plain_ && !admits(run_.begin + i, &list->rope[list->count])) continue;
        list->k_rows[list->count] = k + row * k_step_;
        list->v_rows[list->count] = v + row * v_step_;
        list->bias[list->count] = run_bias_;
        list->entries[list->count] = static_cast<int32_t>(run_entry_);
        ++list->count;
      }
      run_.begin += count;
    }
    return list->count > 0;
  }

 private:
  // The bulk of the usual case, without a branch a key.
  void list_single_keys(KeyList* list) {
    const Interval keys = part_.keys.listed;
    const int64_t end = std::min(num_entries_, part_.slots.end);
    int64_t count = 0;
    while (entry_ < end && count < kListKeys) {
      const int64_t stop = std::min(end, entry_ + kListKeys - count);
      for (; entry_ < stop; ++entry_) {
        const int64_t key = indices_[entry_];
        list->k_rows[count] = k_ + key * k_step_;
        list->v_rows[count] = v_ + key * v_step_;
        list->entries[count] = static_cast<int32_t>(part_.entry_base + entry_);
        count += keys.contains(key);
      }
    }
    slot_ = std::max(slot_, entry_);
    list->count = count;
  }

  void place_rope() {
    const GatherAttentionParams& p = *params_;
    const int64_t token = p.tree_mask.data == nullptr ? part_.token : 0;
    last_shift_ = q_position(p, part_.batch, token) - (diagonal_ + token);
    if (p.rope.k_positions.data != nullptr) {
      positions_ = p.rope.k_positions.row(part_.batch, part_.index_head, part_.token);
    }
  }

  // Whether a key of the run counts, and the angles of its position.
  bool admits(int64_t key, const float** angles) const {
    if (tree_ != nullptr && key >= diagonal_ && !tree_[key - diagonal_]) return false;
    if (params_->rope.cos_sin == nullptr) return true;
    int64_t position = run_position_ + key * run_step_;
    if (run_is_last_ && key >= diagonal_ && params_->tree_mask.data != nullptr) {
      position = q_position(*params_, part_.batch, key - diagonal_);
    }
    *angles = params_->rope.row(position);
    return *angles != nullptr;
  }

  // The keys of the next slots that hold any; false when none is left.
  bool next_run() {
    const int64_t block = params_->block_size_k;
    const int64_t first = params_->num_entries * block;  // slot of the first forced key
    const int64_t last = first + params_->num_first;
    const KeySet& keys = part_.keys;
    while (slot_ < part_.slots.end) {
      int64_t size = part_.slots.end - slot_;
      if (slot_ < first) {
        if (entry_ >= num_entries_) {
          slot_ = first;
          continue;
        }
        size = std::min(size, block - offset_);
        list_entry(size);
      } else if (slot_ < last) {
        size = std::min(size, last - slot_);
        const int64_t key = keys.first.begin + slot_ - first;
        force({key, std::min(key + size, keys.first.end)}, 0);
      } else {
        const int64_t key = keys.last.begin + slot_ - last;
        if (keys.gap.contains(key)) {
          slot_ += keys.gap.end - key;
          continue;
        }
        if (key < keys.gap.begin) size = std::min(size, keys.gap.begin - key);
        force({key, std::min(key + size, keys.last.end)}, last_shift_);
        run_is_last_ = true;
      }
      slot_ += size;
      if (run_.begin < run_.end) return true;
    }
    return false;
  }

  // The next `size` keys of the current entry.
  void list_entry(int64_t size) {
    const int64_t first_key = indices_[entry_] * params_->block_size_k;
    const int64_t key = first_key + offset_;
    bool listed = indices_[entry_] >= 0;
    if (bias_ != nullptr) {
      run_bias_ = bias_[entry_];
      listed &= run_bias_ != -std::numeric_limits<float>::infinity();
    }
    run_ = {std::max(key, part_.keys.listed.begin), std::min(key + size, part_.keys.listed.end)};
    if (!listed) run_ = {};
    run_entry_ = part_.entry_base + entry_;
    run_step_ = params_->rope.k_position_step;
    run_position_ =
        (positions_ == nullptr ? first_key : positions_[entry_]) - first_key * run_step_;
    ++entry_;
    offset_ = 0;
  }

  void force(Interval keys, int64_t shift) {
    run_ = keys;
    run_bias_ = 0;
    run_entry_ = part_.entry_base + params_->num_entries;
    run_step_ = 1;
    run_position_ = shift;
  }

  const GatherAttentionParams* params_ = nullptr;
  GatherPart part_;
  int64_t slot_ = 0;
  int64_t entry_ = 0, offset_ = 0;  // of the slot, while it is a listed one
  int64_t num_entries_ = 0;
  const int32_t* indices_ = nullptr;        // [num_entries]
  const char *k_ = nullptr, *v_ = nullptr;  // row of key 0
  int64_t k_step_ = 0, v_step_ = 0;         // bytes
  const int32_t* pages_ = nullptr;          // [max_pages]; null: not paged
  const float* bias_ = nullptr;             // [num_entries]; null: none
  const int32_t* positions_ = nullptr;      // [num_entries]; null: their keys' indices
  const bool* tree_ = nullptr;              // [seqlen_q]; null: all visible
  int64_t diagonal_ = 0;                    // index of the first token's own key
  int64_t last_shift_ = 0;  // from the index of one of the last keys to its position
  bool plain_ = true;       // keys of a run all count, without a position
  bool simple_ = false;     // and an entry is one row, without a bias

  Interval run_;  // keys left of the current run: of one entry, or of the forced ones
  float run_bias_ = 0;
  int64_t run_entry_ = 0;
  int64_t run_position_ = 0, run_step_ = 1;  // key j stands at run_position + j * run_step
  bool run_is_last_ = false;
};

}  // namespace longctx::cpu
