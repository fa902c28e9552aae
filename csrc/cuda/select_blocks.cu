#include "cuda/fill.cuh"
#include "cuda/kernels.h"
#include "cuda/list_rows.cuh"
#include "cuda/runtime.h"
#include "cuda/select_blocks.cuh"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "select_blocks";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

// How many threads share a row, and whether its keys fit shared memory: the one place that decides.
struct SelectTile {
  int row_threads = device::kWarpSize;   // about eight columns each
  int list_threads = device::kWarpSize;  // about 1024 columns per warp
  int64_t staged_columns = 0;

  explicit SelectTile(int64_t columns) {
    while (row_threads < kMaxSelectThreads && row_threads * int64_t{8} < columns) row_threads *= 2;
    while (list_threads < kListThreads && list_threads * int64_t{32} < columns) list_threads *= 2;
    // 64 KiB: on any device a block of 1024 threads has room for them.
    if (columns <= 16 * 1024) staged_columns = columns;
  }
  int64_t shared_bytes() const {
    return static_cast<int64_t>(sizeof(SelectShared) + staged_columns * sizeof(uint32_t));
  }
};

void scan_counts(const SelectBlocksParams& p) {
  CountScan scan;
  scan.block_indptr = p.block_indptr;
  scan.num_rows = p.map.num_q_blocks;
  scan.size = p.map.seqs.batch * p.heads * (scan.num_rows + 1);
  constexpr int64_t kMaxChunks = 1024;  // every block sums up the chunks before its own
  scan.chunk = kListThreads * ceil_div(scan.size, kListThreads * kMaxChunks);
  const int64_t chunks = ceil_div(scan.size, scan.chunk);
  const Workspace sums(chunks * static_cast<int64_t>(sizeof(int64_t)));
  scan.chunk_sums = sums.as<int64_t>();
  launch(kOp, &sum_counts_kernel, grid_of(chunks), kListThreads, sizeof(BlockSlots), scan);
  launch(kOp, &scan_counts_kernel, grid_of(chunks), kListThreads, sizeof(BlockSlots), scan);
}

// One cut per sequence and head.
void cut_maps(const SelectBlocksParams& p, RowCut* row_cuts) {
  const int64_t maps = p.map.seqs.num_seqs * p.heads;
  if (maps == 0) return;
  constexpr int64_t kStateInts = sizeof(MapState) / sizeof(int64_t);
  const Workspace states(maps * static_cast<int64_t>(sizeof(MapState)));
  fill(kOp, states.as<int64_t>(), maps * kStateInts, int64_t{0});
  MapGrid grid;
  grid.states = states.as<MapState>();
  grid.row_cuts = row_cuts;
  // A multiprocessor runs up to eight blocks; a block has a row for each of its warps.
  grid.slices = at_most(ceil_div(int64_t{8} * device_limits().num_multiprocessors, maps),
                        ceil_div(p.map.num_q_blocks, kMapThreads / device::kWarpSize));
  const dim3 blocks = grid_of(maps * grid.slices);
  launch(kOp, &map_bounds_kernel, blocks, kMapThreads, sizeof(BlockSlots), p, grid);
  if (p.method == SelectMethod::kCumulative) {
    launch(kOp, &map_masses_kernel, blocks, kMapThreads, sizeof(BlockSlots), p, grid);
  }
  const bool searches = p.method != SelectMethod::kRelative;
  for (int digit = 0; searches && digit < kMaxDigits; ++digit) {
    launch(kOp, &map_digits_kernel, blocks, kMapThreads, sizeof(KeySums), p, grid, digit);
  }
  launch(kOp, &map_ties_kernel, blocks, kMapThreads, 0, p, grid);
  grid.slices = 1;
  if (searches) launch(kOp, &share_ties_kernel, grid_of(maps), device::kWarpSize, 0, p, grid);
}

}  // namespace

void run_select_blocks_cuda(const SelectBlocksParams& p) {
  const int64_t maps = p.map.seqs.batch * p.heads;
  const int64_t rows = maps * p.map.num_q_blocks;
  if (maps == 0) return;
  if (rows == 0) return scan_counts(p);
  const SelectTile tile(p.map.num_k_blocks);
  SelectGrid grid;
  grid.words = ceil_div(p.map.num_k_blocks, device::kWarpSize);
  grid.staged_columns = tile.staged_columns;
  const Workspace chosen(rows * grid.words * static_cast<int64_t>(sizeof(uint32_t)));
  grid.chosen = chosen.as<uint32_t>();

  // cut, count; for a threshold, or a single row, there is no difference
  const bool per_row = p.per_row || p.method == SelectMethod::kThreshold || p.map.num_q_blocks == 1;
  const Workspace row_cuts(per_row ? 0 : rows * static_cast<int64_t>(sizeof(RowCut)));
  grid.row_cuts = row_cuts.as<RowCut>();
  if (!per_row) cut_maps(p, grid.row_cuts);
  launch(kOp, &select_row_kernel, grid_of(rows), tile.row_threads, tile.shared_bytes(), p, grid);

  // scan
  scan_counts(p);

  // write
  if (p.capacity == 0) return;
  launch(kOp, &write_rows_kernel, grid_of(rows), tile.list_threads, sizeof(BlockSlots),
         static_cast<const uint32_t*>(grid.chosen), grid.words, p.map.num_q_blocks,
         static_cast<const int64_t*>(p.block_indptr), p.block_indices);
  constexpr int64_t kPerThread = 16;
  const int64_t blocks = at_most(ceil_div(p.capacity, kListThreads * kPerThread), 1 << 16);
  const int64_t* total = p.block_indptr + maps * (p.map.num_q_blocks + 1) - 1;
  launch(kOp, &fill_tail_kernel, grid_of(blocks), kListThreads, 0, total, p.capacity, blocks,
         p.block_indices);
}

}  // namespace longctx::cuda
