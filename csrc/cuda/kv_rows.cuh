// Where the rows of a batch entry's keys lie, and which keys a list names. Rows are bytes, copied
// in the widest words that all their addresses allow.
#pragma once
#include "cuda/columns.cuh"
#include "device/thread.cuh"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The rows of one head of a batch entry.
class KeyRows {
 public:
  LONGCTX_DEVICE KeyRows(const PagesParams& pages, const TensorView& view, int64_t element_bytes,
                         int64_t batch, int64_t head)
      : num_pages_(static_cast<uint32_t>(clamp_index(pages.num_pages, 0, INT32_MAX))),
        page_size_(static_cast<uint32_t>(pages.page_size)) {
    const bool in_pages = pages.page_table != nullptr;
    data_ = static_cast<char*>(view.data) +
            ((in_pages ? 0 : batch * view.batch_stride) + head * view.head_stride) * element_bytes;
    row_step_ = view.seq_stride * element_bytes;
    page_step_ = view.batch_stride * element_bytes;
    if (in_pages) table_ = pages.page_table + batch * pages.max_pages;
  }

  // From here on, what follows the first `bytes` of each row.
  LONGCTX_DEVICE void skip(int64_t bytes) { data_ += bytes; }

  // Whether the key's page does. `key` is one that the batch entry has room for, here and below.
  LONGCTX_DEVICE bool exists(int32_t key) const {
    return table_ == nullptr || page_of(key) < num_pages_;
  }

  // Null where the key's page does not exist.
  LONGCTX_DEVICE char* at(int32_t key) const {
    if (table_ == nullptr) return data_ + key * row_step_;
    const uint32_t page = page_of(key);
    if (page >= num_pages_) return nullptr;
    return data_ + page * page_step_ + static_cast<uint32_t>(key) % page_size_ * row_step_;
  }

 private:
  // A negative page is a large number.
  LONGCTX_DEVICE uint32_t page_of(int32_t key) const {
    return static_cast<uint32_t>(table_[static_cast<uint32_t>(key) / page_size_]);
  }

  char* data_ = nullptr;
  int64_t row_step_ = 0, page_step_ = 0;  // bytes
  const int32_t* table_ = nullptr;        // [max_pages]; null: not paged
  uint32_t num_pages_ = 0;
  uint32_t page_size_ = 1;
};

LONGCTX_DEVICE int64_t used_keys(const KVRowsParams& p, int64_t batch) {
  return p.seqused_k == nullptr ? p.seqlen_k : clamp_index(p.seqused_k[batch], 0, p.seqlen_k);
}

LONGCTX_DEVICE int64_t counted_entries(const KVRowsParams& p, int64_t batch, int64_t index_head) {
  if (p.counts.data == nullptr) return p.num_entries;
  return clamp_index(*p.counts.row(batch, index_head, 0), 0, p.num_entries);
}

// ---- words ----

constexpr int kMaxWordBytes = 16;
using Word16 = Columns<uint64_t, 2>;

// Bits that are set in an address of a row, or in its length.
inline uint64_t row_bits(const TensorView& view, int64_t dim, int64_t element_bytes) {
  const auto bytes = [&](int64_t elements) {
    return static_cast<uint64_t>(elements * element_bytes);
  };
  return reinterpret_cast<uintptr_t>(view.data) | bytes(view.batch_stride) |
         bytes(view.head_stride) | bytes(view.seq_stride) | bytes(dim);
}

// The widest word of which all that has these bits is a multiple.
inline int word_bytes(uint64_t bits) {
  bits |= kMaxWordBytes;
  return static_cast<int>(bits & -bits);
}

// Calls run(Word()) with the type of `bytes` bytes.
template <class Run>
void with_word(int bytes, const Run& run) {
  switch (bytes) {
    case 16:
      return run(Word16());
    case 8:
      return run(uint64_t());
    case 4:
      return run(uint32_t());
    default:
      return run(uint16_t());
  }
}

// Threads side by side that share a row, a word each: a power of two.
inline int lanes_of(int64_t words, int most) {
  int lanes = 1;
  while (lanes < most && lanes < words) lanes *= 2;
  return lanes;
}

}  // namespace longctx::cuda
