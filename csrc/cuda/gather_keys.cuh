// Which keys a unit of gather_attention reads: its slots are the keys of its listed entries one
// after the other, then the first and the last keys that are in its set anyway. Not every slot
// holds a key.
#pragma once
#include "device/thread.cuh"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

// Query rows that share a set, or so much of it that one pass over the keys serves them: row r is
// head r % group of token r / group.
struct GatherUnit {
  int64_t batch = 0;
  int64_t head = 0;       // of the units: kv heads, or query heads that select for themselves
  int64_t token = 0;      // whose rows of the index tensors are read
  int32_t first_row = 0;  // of the block's rows, counted from the token
  int32_t end_row = 1;
  int32_t group = 1;
};

struct SlotRange {
  int32_t begin = 0, end = 0;
};

// Where a token stands for the rotary embedding; `diagonal` is the place of token 0.
LONGCTX_DEVICE int64_t q_position(const GatherAttentionParams& p, int64_t batch, int64_t token,
                                  int64_t diagonal) {
  if (p.rope.q_positions.data != nullptr) return *p.rope.q_positions.row(batch, 0, token);
  return diagonal + token;
}

template <class Element>
struct GatheredKey {
  const Element* k = nullptr;   // [head_dim]; null: no key
  const Element* v = nullptr;   // [head_dim_v]
  const float* rope = nullptr;  // [2, rotary_dim / 2] of its position; null: not rotated
  float bias = 0;
  uint32_t rows = 0;  // bit r: row first_row + r sees the key
};

// In shared memory, so that it takes no registers while the products run.
template <class Element>
class SelectedKeys {
 public:
  LONGCTX_DEVICE SelectedKeys(const GatherAttentionParams& p, const GatherUnit& unit,
                              int64_t heads) {
    const Sequence seq = sequence_at(p.seqs, unit.batch);
    batch_ = static_cast<int32_t>(unit.batch);
    diagonal_ = static_cast<int32_t>(seq.diagonal());
    length_ = static_cast<int32_t>(seq.k_len);
    first_row_ = unit.first_row;
    group_ = unit.group;
    first_token_ = static_cast<int32_t>(unit.token) + unit.first_row / unit.group;
    last_token_ = static_cast<int32_t>(unit.token) + (unit.end_row - 1) / unit.group;
    const Forced from = forced(p, first_token_), to = forced(p, last_token_);
    first_end_ = to.first_end;
    last_begin_ = from.last_begin;
    const int64_t index_head = unit.head * p.index_heads / heads;
    const int64_t kv_head = unit.head * p.num_kv_heads / heads;
    const bool in_pages = p.pages.page_table != nullptr;
    const int64_t view_batch = in_pages ? 0 : unit.batch;
    k_ = static_cast<const Element*>(p.k.data) + view_batch * p.k.batch_stride +
         kv_head * p.k.head_stride;
    v_ = static_cast<const Element*>(p.v.data) + view_batch * p.v.batch_stride +
         kv_head * p.v.head_stride;
    if (in_pages) pages_ = p.pages.page_table + unit.batch * p.pages.max_pages;
    indices_ = p.indices.row(unit.batch, index_head, unit.token);
    if (p.bias.data != nullptr) bias_ = p.bias.row(unit.batch, index_head, unit.token);
    if (p.tree_mask.data != nullptr) tree_ = p.tree_mask.row(unit.batch, 0, 0);

    // An entry has no more slots than the sequence has keys.
    const int64_t block = clamp_index(p.block_size_k, 0, seq.k_len);
    entry_slots_ = static_cast<uint32_t>(block > 0 ? block : 1);
    int64_t entries = p.num_entries;
    if (p.counts.data != nullptr) {
      entries = clamp_index(*p.counts.row(unit.batch, index_head, unit.token), 0, p.num_entries);
    }
    listed_ = static_cast<int32_t>(entries * block);
    num_slots_ = listed_ + first_end_ + to.visible - last_begin_;

    if (p.rope.cos_sin == nullptr) return;
    const int64_t token = tree_ == nullptr ? unit.token : 0;
    last_shift_ = q_position(p, unit.batch, token, diagonal_) - (diagonal_ + token);
    // A token that the table has no position for sees nothing.
    placed_ = 0;
    for (int32_t t = first_token_; t <= last_token_; ++t) {
      if (query_rope(p, t) != nullptr) placed_ |= rows_of(t);
    }
    if (placed_ == 0) listed_ = num_slots_ = 0;
    if (p.rope.k_positions.data != nullptr) {
      positions_ = p.rope.k_positions.row(unit.batch, index_head, unit.token);
    }
  }

  // Of one of num_segments parts, cut at multiples of `unit` slots.
  LONGCTX_DEVICE SlotRange segment(int64_t index, int64_t num_segments, int32_t unit) const {
    const int64_t units = (int64_t{num_slots_} + unit - 1) / unit;
    const int64_t end = units * (index + 1) / num_segments * unit;
    return {static_cast<int32_t>(units * index / num_segments * unit),
            static_cast<int32_t>(clamp_index(end, 0, num_slots_))};
  }
  // Of an entry; of the forced keys if `index` is the number of entries of a list.
  LONGCTX_DEVICE SlotRange entry(const GatherAttentionParams& p, int64_t index) const {
    if (index == p.num_entries) return {listed_, num_slots_};
    const int64_t begin = index * entry_slots_;
    return {static_cast<int32_t>(clamp_index(begin, 0, listed_)),
            static_cast<int32_t>(clamp_index(begin + entry_slots_, 0, listed_))};
  }
  LONGCTX_DEVICE int32_t first_token() const { return first_token_; }
  LONGCTX_DEVICE bool has_bias() const { return bias_ != nullptr; }
  // Null: the table has no such position.
  LONGCTX_DEVICE const float* query_rope(const GatherAttentionParams& p, int64_t token) const {
    return p.rope.row(q_position(p, batch_, token, diagonal_));
  }

  LONGCTX_DEVICE GatheredKey<Element> at(const GatherAttentionParams& p, int32_t slot) const {
    GatheredKey<Element> found;
    int64_t key, position;
    uint32_t rows;
    if (slot < listed_) {
      const uint32_t entry = static_cast<uint32_t>(slot) / entry_slots_;
      const uint32_t offset = static_cast<uint32_t>(slot) - entry * entry_slots_;
      const int64_t index = indices_[entry];
      const int64_t first_key = index * p.block_size_k;
      key = first_key + offset;
      if (index < 0) return found;
      rows = rows_that_see(p, key, Why::kListed);
      if (rows == 0) return found;
      if (bias_ != nullptr) {
        found.bias = bias_[entry];
        if (found.bias == -INFINITY) return found;
      }
      position =
          (positions_ == nullptr ? first_key : positions_[entry]) + offset * p.rope.k_position_step;
    } else {
      key = slot - listed_;
      position = key;
      const bool of_last = key >= first_end_;
      if (of_last) key += last_begin_ - first_end_;
      rows = rows_that_see(p, key, of_last ? Why::kLast : Why::kFirst);
      if (rows == 0) return found;
      if (of_last) {
        position = tree_ != nullptr && key >= diagonal_ && p.rope.cos_sin != nullptr
                       ? q_position(p, batch_, key - diagonal_, diagonal_)
                       : key + last_shift_;
      }
    }
    if (p.rope.cos_sin != nullptr) {
      found.rope = p.rope.row(position);
      if (found.rope == nullptr) return found;
    }
    const Element *k = k_, *v = v_;
    int64_t row = key;
    if (pages_ != nullptr) {
      const auto page_size = static_cast<uint32_t>(p.pages.page_size);
      const uint32_t place = static_cast<uint32_t>(key) / page_size;
      const int64_t page = pages_[place];
      if (page < 0 || page >= p.pages.num_pages) return found;
      row = key - int64_t{place} * page_size;
      k += page * p.k.batch_stride;
      v += page * p.v.batch_stride;
    }
    found.k = k + row * p.k.seq_stride;
    found.v = v + row * p.v.seq_stride;
    found.rows = rows;
    return found;
  }

 private:
  enum class Why { kListed, kFirst, kLast };
  // Keys [0, first_end) and [last_begin, visible) are in a token's set for that alone; where they
  // are listed as well, they count as forced. All three grow with the token.
  struct Forced {
    int32_t first_end, last_begin, visible;
    LONGCTX_DEVICE bool has(int64_t key, Why why) const {
      return why == Why::kListed  ? key >= first_end && key < last_begin
             : why == Why::kFirst ? key < first_end
                                  : key >= last_begin && key < visible;
    }
  };
  LONGCTX_DEVICE Forced forced(const GatherAttentionParams& p, int64_t token) const {
    const int64_t visible = clamp_index(diagonal_ + token + 1, 0, length_);
    const int64_t first = clamp_index(p.num_first, 0, visible);
    return {static_cast<int32_t>(first),
            static_cast<int32_t>(clamp_index(visible - p.num_last, first, visible)),
            static_cast<int32_t>(visible)};
  }
  LONGCTX_DEVICE bool sees(const GatherAttentionParams& p, int32_t token, int64_t key,
                           Why why) const {
    if (!forced(p, token).has(key, why)) return false;
    return tree_ == nullptr || key < diagonal_ ||
           p.tree_mask.row(batch_, 0, token)[key - diagonal_];
  }
  LONGCTX_DEVICE uint32_t rows_that_see(const GatherAttentionParams& p, int64_t key,
                                        Why why) const {
    const bool first_does = sees(p, first_token_, key, why);
    if (first_token_ == last_token_) return first_does ? placed_ : 0;
    const bool for_all = tree_ == nullptr || key < diagonal_;
    if (for_all && first_does && sees(p, last_token_, key, why)) return placed_;
    uint32_t rows = 0;
#pragma unroll 1
    for (int32_t token = first_token_; token <= last_token_; ++token) {
      if (sees(p, token, key, why)) rows |= rows_of(token);
    }
    return rows & placed_;
  }
  // The block's rows of a token.
  LONGCTX_DEVICE uint32_t rows_of(int32_t token) const {
    const int32_t begin = (token - first_token_) * group_ - first_row_ % group_;
    const uint32_t below_end = begin + group_ >= 32 ? ~0u : (1u << (begin + group_)) - 1;
    return below_end & ~((1u << (begin > 0 ? begin : 0)) - 1);
  }

  int32_t batch_ = 0;
  int32_t diagonal_ = 0;  // index of token 0's own key
  int32_t length_ = 0;    // keys of the sequence
  int32_t first_row_ = 0, group_ = 1;
  int32_t first_token_ = 0, last_token_ = 0;  // of the block's rows
  int32_t first_end_ = 0, last_begin_ = 0;    // of all of them
  int32_t listed_ = 0, num_slots_ = 0;        // slots of entries, and all
  uint32_t entry_slots_ = 1;
  const Element *k_ = nullptr, *v_ = nullptr;  // row of key 0
  const int32_t* pages_ = nullptr;             // [max_pages]; null: not paged
  const int32_t* indices_ = nullptr;           // [num_entries]
  const float* bias_ = nullptr;                // [num_entries]; null: none
  const int32_t* positions_ = nullptr;         // [num_entries]; null: their keys' indices
  const bool* tree_ = nullptr;                 // of token 0; null: all visible
  int64_t last_shift_ = 0;  // from the index of one of the last keys to its position
  uint32_t placed_ = ~0u;   // rows of tokens that have a position
};

}  // namespace longctx::cuda
