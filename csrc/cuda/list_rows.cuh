// The counts and chosen columns of rows -> block_indptr and block_indices.
#pragma once
#include "cuda/block_reduce.cuh"

namespace longctx::cuda {

constexpr int kListThreads = 256;

// block_indptr [num_lists, num_rows + 1] holds counts; the first entry of every list is not set.
struct CountScan {
  int64_t* block_indptr = nullptr;
  int64_t size = 0;  // of block_indptr
  int64_t num_rows = 0;
  int64_t chunk = 0;              // entries of a block of threads; a multiple of kListThreads
  int64_t* chunk_sums = nullptr;  // [number of chunks]

  LONGCTX_DEVICE int64_t count(int64_t index) const {
    return index < size && index % (num_rows + 1) != 0 ? block_indptr[index] : 0;
  }
};

LONGCTX_KERNEL(kListThreads, 1) sum_counts_kernel(const CountScan scan) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  const int64_t first = device::block_index() * scan.chunk;
  int64_t sum = 0;
  for (int64_t i = device::thread_index(); i < scan.chunk; i += kListThreads) {
    sum += scan.count(first + i);
  }
  sum = reduce_block(sum, Sum(), slots);
  if (device::thread_index() == 0) scan.chunk_sums[device::block_index()] = sum;
}

LONGCTX_KERNEL(kListThreads, 1) scan_counts_kernel(const CountScan scan) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  int64_t before = 0;
  for (int64_t c = device::thread_index(); c < device::block_index(); c += kListThreads) {
    before += scan.chunk_sums[c];
  }
  before = reduce_block(before, Sum(), slots);
  const int64_t first = device::block_index() * scan.chunk;
  for (int64_t i = device::thread_index(); i < scan.chunk; i += kListThreads) {
    const int64_t through = scan_warp(scan.count(first + i));
    int64_t total;
    const int64_t earlier =
        sum_before_warp(device::shuffle(through, device::kWarpSize - 1), total, slots);
    if (first + i < scan.size) scan.block_indptr[first + i] = before + earlier + through;
    before += total;
  }
}

// Chosen columns in ascending order, one block of threads per row. chosen [rows, words]: see
// SelectGrid.
LONGCTX_KERNEL(kListThreads, 1)
write_rows_kernel(const uint32_t* chosen, const int64_t words, const int64_t num_rows,
                  const int64_t* block_indptr, int32_t* block_indices) {
  auto& slots = *reinterpret_cast<BlockSlots*>(device::shared_memory());
  const int lane = device::lane_index();
  const int64_t row = device::block_index();
  const int64_t* indptr = block_indptr + row + row / num_rows;
  if (indptr[0] == indptr[1]) return;
  const uint32_t* bits = chosen + row * words;

  // a run of words per warp
  const int64_t num_warps = device::num_threads() / device::kWarpSize;
  const int64_t own = (words + num_warps - 1) / num_warps;
  const int64_t begin = device::thread_index() / device::kWarpSize * own;
  const int64_t end = begin + own < words ? begin + own : words;
  int64_t count = 0, total;
  for (int64_t w = begin + lane; w < end; w += device::kWarpSize) {
    count += device::count_bits(bits[w]);
  }
  int32_t* next =
      block_indices + indptr[0] + sum_before_warp(reduce_warp(count, Sum()), total, slots);

  for (int64_t first = begin; first < end; first += device::kWarpSize) {
    const uint32_t mine = first + lane < end ? bits[first + lane] : 0;
    for (int w = 0; w < device::kWarpSize; ++w) {
      const uint32_t word = device::shuffle(mine, w);
      if (word >> lane & 1) {
        next[device::count_bits(word & ((uint32_t{1} << lane) - 1))] =
            static_cast<int32_t>((first + w) * device::kWarpSize + lane);
      }
      next += device::count_bits(word);
    }
  }
}

// -1 from block_indptr[last] on.
LONGCTX_KERNEL(kListThreads, 1)
fill_tail_kernel(const int64_t* total, const int64_t capacity, const int64_t num_blocks,
                 int32_t* block_indices) {
  const int64_t first = device::block_index() * kListThreads + device::thread_index();
  for (int64_t i = *total + first; i < capacity; i += num_blocks * kListThreads) {
    block_indices[i] = -1;
  }
}

}  // namespace longctx::cuda
