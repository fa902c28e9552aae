// append_kv: copies new rows behind those of a cache and computes the pages of a summary that they
// fall into. Warps take turns at the pages and the rows of a head. A page's new keys are read where
// they come from, so that no warp waits for what another one writes.
#pragma once
#include "cuda/kv_rows.cuh"
#include "cuda/summarize_pages.cuh"
#include "longctx/new_keys.h"

namespace longctx::cuda {

constexpr int kAppendWarps = 4;
constexpr int kNewRowsUnderWay = 8;  // of a thread

// How a warp copies rows: some lanes share one, a word each.
struct NewRowsGrid {
  bool wide = false;  // words of 16 bytes; else of an element
  int lanes = 1;
  int32_t words = 0;   // of a row
  int64_t chunks = 0;  // of rows: a warp has one at a time
};

struct AppendKVGrid {
  int64_t blocks = 1;  // of threads, for each head of each batch entry
  int64_t pages = 0;   // of the summary that new keys can fall into
  NewRowsGrid k, v;
  SummaryGrid summary;
};

LONGCTX_HD inline int64_t rows_of_chunk(int lanes) {
  return int64_t{device::kWarpSize} / lanes * kNewRowsUnderWay;
}

// The keys that there are when the new ones are: those in k, the others in the cache.
template <class T>
struct StoredAndNewKeys {
  const AppendKVParams& p;
  int64_t batch, head, start;
  LONGCTX_DEVICE const T* operator()(int64_t key) const {
    const T* stored = key_row<T>(p.k_cache, p.pages, batch, head, key);
    if (stored == nullptr || key < start) return stored;
    return static_cast<const T*>(p.k.data) + batch * p.k.batch_stride + head * p.k.head_stride +
           (key - start) * p.k.seq_stride;
  }
};

// Tokens of a chunk, of those in [keys.first, keys.last); a warp calls it together.
template <class Word>
LONGCTX_DEVICE void copy_new_rows(const NewRowsGrid& grid, const TensorView& rows,
                                  const KeyRows& cache, int element_bytes, const NewKeys& keys,
                                  int64_t batch, int64_t head, int64_t chunk) {
  const char* from = static_cast<const char*>(rows.data) +
                     (batch * rows.batch_stride + head * rows.head_stride) * element_bytes;
  const int step = device::kWarpSize / grid.lanes;  // tokens from row to row of a thread
  const int64_t first = chunk * rows_of_chunk(grid.lanes) + device::lane_index() / grid.lanes;
  char* to[kNewRowsUnderWay];
#pragma unroll
  for (int r = 0; r < kNewRowsUnderWay; ++r) {
    const int64_t token = first + r * step;
    const bool written = token >= keys.first && token < keys.last;
    to[r] = written ? cache.at(static_cast<int32_t>(keys.start + token)) : nullptr;
  }
  for (int word = device::lane_index() % grid.lanes; word < grid.words; word += grid.lanes) {
    Word loaded[kNewRowsUnderWay];
#pragma unroll
    for (int r = 0; r < kNewRowsUnderWay; ++r) {
      if (to[r] == nullptr) continue;
      const char* row = from + (first + r * step) * rows.seq_stride * element_bytes;
      loaded[r] = reinterpret_cast<const Word*>(row)[word];
    }
#pragma unroll
    for (int r = 0; r < kNewRowsUnderWay; ++r) {
      if (to[r] != nullptr) reinterpret_cast<Word*>(to[r])[word] = loaded[r];
    }
  }
}

// Grid: batch * heads * grid.blocks.
template <class T>
LONGCTX_KERNEL(kAppendWarps* device::kWarpSize, 3)
append_kv_kernel(const LONGCTX_GRID_CONSTANT AppendKVParams p,
                 const LONGCTX_GRID_CONSTANT AppendKVGrid grid) {
  const int64_t map = device::block_index() / grid.blocks,
                part = device::block_index() % grid.blocks;
  const int64_t batch = map / p.num_kv_heads, head = map % p.num_kv_heads;
  const NewKeys keys = new_keys(p, batch);
  if (head == 0 && part == 0 && device::thread_index() == 0) {
    p.lengths[batch] = static_cast<int32_t>(keys.length);
  }
  const int64_t items = grid.pages + grid.k.chunks + grid.v.chunks;
  int64_t item = part * kAppendWarps + device::warp_index();
  for (; item < items; item += grid.blocks * kAppendWarps) {
    if (item < grid.pages) {
      const StoredAndNewKeys<T> all = {p, batch, head, keys.start};
      const int64_t begin = keys.start > 0 ? keys.start : 0;
      const int64_t page = begin / p.summary.page_size + item;
      if (begin >= keys.length || page * p.summary.page_size >= keys.length) continue;
      const PageSummary<T, StoredAndNewKeys<T>> summary(p.summary, grid.summary, all, batch, head,
                                                        page, keys.length);
      p.summary.method == SummaryMethod::kMinMax ? summary.extremes() : summary.mean();
      continue;
    }
    const bool is_k = item < grid.pages + grid.k.chunks;
    const NewRowsGrid& rows = is_k ? grid.k : grid.v;
    const KeyRows cache(p.pages, is_k ? p.k_cache : p.v_cache, sizeof(T), batch, head);
    const auto copy = [&](auto word) {
      copy_new_rows<decltype(word)>(rows, is_k ? p.k : p.v, cache, sizeof(T), keys, batch, head,
                                    item - grid.pages - (is_k ? 0 : grid.k.chunks));
    };
    rows.wide ? copy(Word16()) : copy(T());
  }
}

}  // namespace longctx::cuda
