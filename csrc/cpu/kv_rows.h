// Where the rows of a batch entry's keys lie, and which keys a list names.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dense_chunk.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kRowsAhead = 8;  // rows that are prefetched before they are copied

// The rows of one head of a batch entry.
class KeyRows {
 public:
  KeyRows(const KVRowsParams& p, const TensorView& view, int64_t dim, int64_t batch, int64_t head)
      : pages_(p.pages), row_bytes_(dim * element_bytes(p.dtype)) {
    const bool in_pages = pages_.page_table != nullptr;
    data_ = static_cast<char*>(view.data) +
            ((in_pages ? 0 : batch * view.batch_stride) + head * view.head_stride) *
                element_bytes(p.dtype);
    row_step_ = view.seq_stride * element_bytes(p.dtype);
    page_step_ = view.batch_stride * element_bytes(p.dtype);
    if (in_pages) table_ = pages_.page_table + batch * pages_.max_pages;
  }

  int64_t row_bytes() const { return row_bytes_; }

  // Whether the key's page does. `key` is one that the batch entry has room for, here and below.
  bool exists(int64_t key) const {
    if (table_ == nullptr) return true;
    const int64_t page = table_[key / pages_.page_size];
    return page >= 0 && page < pages_.num_pages;
  }

  // Null where the key's page does not exist.
  char* at(int64_t key) const {
    if (table_ == nullptr) return data_ + key * row_step_;
    if (!exists(key)) return nullptr;
    const int64_t page = table_[key / pages_.page_size];
    return data_ + page * page_step_ + key % pages_.page_size * row_step_;
  }

  void prefetch(int64_t key) const {
    const char* row = at(key);
    if (row == nullptr) return;
    for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte);
  }

 private:
  PagesParams pages_;
  char* data_ = nullptr;
  int64_t row_step_ = 0, page_step_ = 0;  // bytes
  int64_t row_bytes_ = 0;
  const int32_t* table_ = nullptr;  // [max_pages]; null: not paged
};

inline int64_t used_keys(const KVRowsParams& p, int64_t batch) {
  return p.seqused_k == nullptr ? p.seqlen_k : clamp_index(p.seqused_k[batch], 0, p.seqlen_k);
}

inline int64_t counted_entries(const KVRowsParams& p, int64_t batch, int64_t index_head) {
  if (p.counts.data == nullptr) return p.num_entries;
  return clamp_index(*p.counts.row(batch, index_head, 0), 0, p.num_entries);
}

}  // namespace
}  // namespace longctx::cpu
