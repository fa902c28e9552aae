// Which keys a group of query rows visits, produced run by run and gathered into chunks. Only keys
// that at least one of the rows sees are ever produced, so that a chunk never reads memory that no
// query may look at.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "longctx/block_list.h"
#include "longctx/mask.h"
#include "strip_engine.h"

namespace longctx::cpu {

// Replaces `visible` by the union of what rows [row_begin, row_end) see: ascending, disjoint.
inline void visible_union(const MaskParams& mask, const Sequence& seq, int64_t row_begin,
                          int64_t row_end, std::vector<Interval>& visible) {
  visible.clear();
  const auto add = [&visible](Interval piece) {
    if (piece.begin >= piece.end) return;
    // Neighbouring rows see nearly the same keys: look back at the pieces of the last row.
    const size_t look_back = std::min<size_t>(visible.size(), 4);
    for (size_t i = visible.size() - look_back; i < visible.size(); ++i) {
      if (piece.begin <= visible[i].end && piece.end >= visible[i].begin) {
        visible[i].begin = std::min(visible[i].begin, piece.begin);
        visible[i].end = std::max(visible[i].end, piece.end);
        return;
      }
    }
    visible.push_back(piece);
  };
  const auto intersection = [](const Interval& a, const Interval& b) {
    return Interval{std::max(a.begin, b.begin), std::min(a.end, b.end)};
  };
  if (mask.key_ranges == nullptr) {
    // Windows move on row by row, so that the outer rows tell the union.
    const RowMask first = row_mask(mask, seq, row_begin);
    const RowMask last = row_mask(mask, seq, row_end - 1);
    add({first.window.begin, last.window.end});
    add(last.sinks);
  } else {
    for (int64_t row = row_begin; row < row_end; ++row) {
      const RowMask rows = row_mask(mask, seq, row);
      for (const Interval& range : rows.ranges) {
        add(intersection(rows.window, range));
        add(intersection(rows.sinks, range));
      }
    }
  }
  std::sort(visible.begin(), visible.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  size_t merged = 0;
  for (size_t i = 1; i < visible.size(); ++i) {
    if (visible[i].begin <= visible[merged].end) {
      visible[merged].end = std::max(visible[merged].end, visible[i].end);
    } else {
      visible[++merged] = visible[i];
    }
  }
  if (!visible.empty()) visible.resize(merged + 1);
}

// Streams the runs of keys that are visible and, with a block list, also listed. `visible` must
// outlive it.
class KeyRuns {
 public:
  KeyRuns() = default;
  // Every visible key of the sequence.
  KeyRuns(const std::vector<Interval>& visible, int64_t k_len)
      : seen_(visible.data()),
        seen_end_(seen_ + visible.size()),
        pending_{0, k_len},
        k_len_(k_len) {}
  // The visible keys of the listed blocks. Entries that are not ascending or outside are skipped.
  KeyRuns(const std::vector<Interval>& visible, int64_t k_len, BlockRow row, int64_t block_size)
      : seen_(visible.data()),
        seen_end_(seen_ + visible.size()),
        row_(row),
        block_size_(block_size),
        k_len_(k_len) {}

  bool next(Interval* run) {
    for (;;) {
      if (pending_.begin >= pending_.end && !next_listed()) return false;
      while (seen_ < seen_end_ && seen_->end <= pending_.begin) ++seen_;
      if (seen_ == seen_end_) return false;
      *run = {std::max(pending_.begin, seen_->begin), std::min(pending_.end, seen_->end)};
      const bool found = run->begin < run->end;
      pending_.begin = found ? run->end : pending_.end;
      if (found) return true;
    }
  }

 private:
  // Neighbouring blocks join into one run.
  bool next_listed() {
    pending_ = {};
    for (; row_.begin < row_.end; ++row_.begin) {
      const int64_t begin = *row_.begin * block_size_;
      if (*row_.begin <= last_block_ || begin >= k_len_) continue;
      const bool starts = pending_.begin == pending_.end;
      if (!starts && begin != pending_.end) return true;
      if (starts) pending_.begin = begin;
      pending_.end = std::min(begin + block_size_, k_len_);
      last_block_ = *row_.begin;
    }
    return pending_.begin < pending_.end;
  }

  const Interval* seen_ = nullptr;
  const Interval* seen_end_ = nullptr;
  Interval pending_;
  BlockRow row_;
  int64_t block_size_ = 1;
  int64_t k_len_ = 0;
  int64_t last_block_ = -1;
};

// K and V of one head from the first key of a sequence on; v is null for scores-only calls.
struct KeyRows {
  const char* k = nullptr;
  const char* v = nullptr;
  int64_t k_stride = 0;  // elements
  int64_t v_stride = 0;
  int64_t element_size = 0;
};

// Cuts runs into chunks.
class ChunkSource {
 public:
  ChunkSource() = default;
  ChunkSource(const KeyRuns& runs, const KeyRows& rows) : runs_(runs), rows_(rows) {}

  // False when no key is left.
  bool next(KeyChunk* chunk) {
    int64_t count = 0;
    while (count < kChunkKeys) {
      if (rest_.begin >= rest_.end && !runs_.next(&rest_)) break;
      const int64_t stop = std::min(count + rest_.end - rest_.begin, int64_t{kChunkKeys});
      for (; count < stop; ++count) set_slot(chunk, count, rest_.begin++);
    }
    chunk->num_keys = count;
    chunk->k_stride = rows_.k_stride;
    chunk->v_stride = rows_.v_stride;
    chunk->upcoming = {};
    chunk->contiguous16 = 0;
    if (count == 0) return false;
    for (int64_t t = 0; t < count / 16; ++t) {
      const bool run = chunk->positions[16 * t + 15] - chunk->positions[16 * t] == 15;
      chunk->contiguous16 |= static_cast<uint32_t>(run) << t;
    }
    for (int64_t slot = count; slot < chunk->num_slots(); ++slot) {
      set_slot(chunk, slot, chunk->positions[count - 1]);
    }
    return true;
  }

 private:
  void set_slot(KeyChunk* chunk, int64_t slot, int64_t position) const {
    chunk->positions[slot] = position;
    chunk->k_rows[slot] = rows_.k + position * rows_.k_stride * rows_.element_size;
    chunk->v_rows[slot] =
        rows_.v == nullptr ? nullptr : rows_.v + position * rows_.v_stride * rows_.element_size;
  }

  KeyRuns runs_;
  KeyRows rows_;
  Interval rest_;
};

}  // namespace longctx::cpu
