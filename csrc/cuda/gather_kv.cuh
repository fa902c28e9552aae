// gather_kv: rows of k and v at the listed keys, copied out in the order of the list. Some threads
// share a row, a word each, and have kRowsUnderWay rows under way at a time; nothing waits for
// another thread.
#pragma once
#include "cuda/kv_rows.cuh"

namespace longctx::cuda {

constexpr int kGatherThreads = 256;
constexpr int kRowsUnderWay = 8;

struct GatherKVGrid {
  int lanes = 1;        // threads that share a row
  int64_t pieces = 1;   // blocks that share a list
  int64_t k_words = 0;  // of a row
  int64_t v_words = 0;
};

// Entries that a block takes.
LONGCTX_HD inline int64_t gathered_entries(int lanes) {
  return int64_t{kGatherThreads} / lanes * kRowsUnderWay;
}

// Grid: batch * heads * pieces blocks for k, and as many for v, in turns.
template <class Word>
LONGCTX_KERNEL(kGatherThreads, 3)
gather_kv_kernel(const LONGCTX_GRID_CONSTANT GatherKVParams p, const GatherKVGrid grid,
                 const int element_bytes) {
  const bool is_k = device::block_index() % 2 == 0;
  const int64_t item = device::block_index() / 2;
  const int64_t row = item / grid.pieces, piece = item % grid.pieces;
  const int64_t batch = row / p.num_kv_heads, head = row % p.num_kv_heads;
  const int64_t index_head = head * p.index_heads / p.num_kv_heads;
  const KeyRows rows(p.pages, is_k ? p.k : p.v, element_bytes, batch, head);

  const int step = kGatherThreads / grid.lanes;  // entries from row to row of a thread
  const int64_t first = piece * gathered_entries(grid.lanes) + device::thread_index() / grid.lanes;
  const int32_t* list = p.indices.row(batch, index_head, 0) + first;
  const int64_t counted = counted_entries(p, batch, index_head) - first;
  const auto used = static_cast<int32_t>(used_keys(p, batch));
  int32_t keys[kRowsUnderWay];
#pragma unroll
  for (int r = 0; r < kRowsUnderWay; ++r) keys[r] = r * step < counted ? list[r * step] : -1;
  const char* from[kRowsUnderWay];
#pragma unroll
  for (int r = 0; r < kRowsUnderWay; ++r) {
    from[r] = keys[r] >= 0 && keys[r] < used ? rows.at(keys[r]) : nullptr;
  }
  const int64_t left = (p.num_entries - first + step - 1) / step;
  const int num_rows = static_cast<int>(clamp_index(left, 0, kRowsUnderWay));
  const int64_t words = is_k ? grid.k_words : grid.v_words;
  Word* to = static_cast<Word*>(is_k ? p.k_out : p.v_out) + (row * p.num_entries + first) * words;
#pragma unroll 1
  for (int64_t word = device::thread_index() % grid.lanes; word < words; word += grid.lanes) {
    Word loaded[kRowsUnderWay];
#pragma unroll
    for (int r = 0; r < kRowsUnderWay; ++r) {
      loaded[r] = from[r] == nullptr ? Word() : reinterpret_cast<const Word*>(from[r])[word];
    }
    Word* next = to + word;
#pragma unroll
    for (int r = 0; r < kRowsUnderWay; ++r) {
      if (r < num_rows) *next = loaded[r];
      next += step * words;
    }
  }
}

}  // namespace longctx::cuda
