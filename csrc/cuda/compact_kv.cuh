// compact_kv, truncate_kv: moves the listed rows of caches to the front, in place. A block owns
// some columns of the rows of one head of one cache, so that only its own threads meet in a byte.
// It goes through the list kCompactThreads entries at a time: which of them count, load their rows,
// barrier, store. Sources ascend, so a store hits no row that is still to be loaded; the barrier
// keeps it behind the loads of the same entries.
#pragma once
#include "cuda/kv_rows.cuh"

namespace longctx::cuda {

constexpr int kCompactThreads = 256;
constexpr int kCompactWarps = kCompactThreads / device::kWarpSize;
constexpr int kCompactBlocks = 3;  // on a multiprocessor
constexpr int kMovesUnderWay = 4;  // words of a thread
constexpr int kLayersAtOnce = 48;  // a launch has 4 KiB of parameters

struct CompactLayers {
  TensorView k[kLayersAtOnce];
  TensorView v[kLayersAtOnce];
};

struct CompactKVGrid {
  int lanes = 1;         // threads that share a row: words of a slice
  int64_t k_slices = 0;  // of a row
  int64_t v_slices = 0;
  int64_t k_words = 0;
  int64_t v_words = 0;
};

struct KeptKeys {
  int32_t keys[kCompactThreads];  // those of the entries at hand that stay, ascending
  int32_t largest[kCompactWarps];
  int32_t counts[kCompactWarps];
};

// Lists the keys of the threads that are above `last` and those of all threads before, and returns
// how many there are; `last` becomes the largest key. The block calls it together.
LONGCTX_DEVICE int keep_ascending(int32_t key, int32_t& last, KeptKeys& kept) {
  const int lane = device::lane_index(), warp = device::thread_index() / device::kWarpSize;
  int32_t through = key;
  for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
    const int32_t other = device::shuffle_up(through, delta);
    if (other > through) through = other;
  }
  int32_t bar = device::shuffle_up(through, 1);
  if (lane == 0 || last > bar) bar = last;
  if (lane == device::kWarpSize - 1) kept.largest[warp] = through;
  device::sync_threads();
  int32_t largest = last;
  for (int w = 0; w < kCompactWarps; ++w) {
    if (w == warp && largest > bar) bar = largest;
    if (kept.largest[w] > largest) largest = kept.largest[w];
  }
  last = largest;

  const uint32_t stay = device::ballot(key > bar);
  if (lane == 0) kept.counts[warp] = device::count_bits(stay);
  device::sync_threads();
  int place = device::count_bits(stay & ((uint32_t{1} << lane) - 1)), total = 0;
  for (int w = 0; w < kCompactWarps; ++w) {
    if (w < warp) place += kept.counts[w];
    total += kept.counts[w];
  }
  if (key > bar) kept.keys[place] = key;
  device::sync_threads();
  return total;
}

// The entries of a list, as keys.
class ListedKeys {
 public:
  LONGCTX_DEVICE ListedKeys(const CompactKVParams& p, int64_t batch, int64_t index_head)
      : counted_(counted_entries(p, batch, index_head)),
        used_(static_cast<int32_t>(used_keys(p, batch))) {
    if (p.indices.data != nullptr) entries_ = p.indices.row(batch, index_head, 0);
    if (p.of_draft) first_ = used_ - static_cast<int32_t>(p.num_draft_tokens);
  }

  LONGCTX_DEVICE int64_t counted() const { return counted_; }
  // The key that the first entry that counts moves to.
  LONGCTX_DEVICE int32_t front() const { return first_ > 0 ? first_ : 0; }

  // -1: none.
  LONGCTX_DEVICE int32_t at(int64_t index, const KeyRows& rows) const {
    if (index >= counted_) return -1;
    const int64_t entry = entries_ == nullptr ? index : entries_[index];
    const int64_t key = first_ + entry;
    if (entry < 0 || key < 0 || key >= used_) return -1;
    return rows.exists(static_cast<int32_t>(key)) ? static_cast<int32_t>(key) : -1;
  }

 private:
  const int32_t* entries_ = nullptr;  // null: 0, 1, ...
  int64_t counted_;
  int32_t used_;
  int32_t first_ = 0;  // the key that entries count from; below 0: of a draft longer than the keys
};

// Grid: (k slices + v slices) * batch * heads * layers blocks.
template <class Word>
LONGCTX_KERNEL(kCompactThreads, kCompactBlocks)
compact_kv_kernel(const LONGCTX_GRID_CONSTANT CompactKVParams p,
                  const LONGCTX_GRID_CONSTANT CompactLayers layers, const CompactKVGrid grid,
                  const int element_bytes) {
  auto& kept = *reinterpret_cast<KeptKeys*>(device::shared_memory());
  const int64_t slices = grid.k_slices + grid.v_slices, heads = p.batch * p.num_kv_heads;
  const int64_t row = device::block_index() / slices, layer = row / heads;
  const int64_t batch = row % heads / p.num_kv_heads, head = row % p.num_kv_heads;
  const int64_t index_head = head * p.index_heads / p.num_kv_heads;
  int64_t slice = device::block_index() % slices;
  const bool is_k = slice < grid.k_slices, answers = slice == 0 && layer == 0;
  if (!is_k) slice -= grid.k_slices;
  const int64_t word = slice * grid.lanes + device::thread_index() % grid.lanes;
  KeyRows rows(p.pages, is_k ? layers.k[layer] : layers.v[layer], element_bytes, batch, head);
  rows.skip(word * static_cast<int64_t>(sizeof(Word)));
  const ListedKeys list(p, batch, index_head);

  const int step = kCompactThreads / grid.lanes;  // entries from word to word of a thread
  int own = device::thread_index() / grid.lanes;
  if (word >= (is_k ? grid.k_words : grid.v_words)) own = kCompactThreads;  // none is its own
  int32_t front = list.front(), last = front - 1;
  int32_t ahead = list.at(device::thread_index(), rows);
#pragma unroll 1
  for (int64_t first = 0; first < list.counted(); first += kCompactThreads) {
    const int32_t key = ahead;
    ahead = list.at(first + kCompactThreads + device::thread_index(), rows);
    const int count = keep_ascending(key, last, kept);
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kMovesUnderWay * step) {
      Word loaded[kMovesUnderWay];
      uint32_t moves = 0;  // bit r: word r does
#pragma unroll
      for (int r = 0; r < kMovesUnderWay; ++r) {
        const int i = begin + own + r * step;
        if (i >= count || kept.keys[i] == front + i) continue;
        moves |= uint32_t{1} << r;
        loaded[r] = *reinterpret_cast<const Word*>(rows.at(kept.keys[i]));
      }
      device::sync_threads();
#pragma unroll
      for (int r = 0; r < kMovesUnderWay; ++r) {
        if ((moves >> r & 1) == 0) continue;
        char* to = rows.at(front + begin + own + r * step);
        if (to != nullptr) *reinterpret_cast<Word*>(to) = loaded[r];
      }
    }
    front += count;
  }
  const bool first_of_list = head == 0 || (head - 1) * p.index_heads / p.num_kv_heads != index_head;
  if (answers && first_of_list && p.lengths != nullptr && device::thread_index() == 0) {
    p.lengths[batch * p.index_heads + index_head] = front;
  }
}

}  // namespace longctx::cuda
