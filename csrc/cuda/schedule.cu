#include "cuda/runtime.h"
#include "cuda/schedule.cuh"
#include "cuda/schedule.h"

namespace longctx::cuda {

void order_rows_longest_first(const char* op, const BlockList& blocks, int32_t* order) {
  ScheduleParams p;
  p.blocks = blocks;
  p.num_rows = blocks.pattern_batch * blocks.pattern_heads * blocks.num_q_blocks;
  if (p.num_rows == 0) return;
  // Every block reads the counts of all slices: at most 64 KiB, which stay in L2.
  constexpr int64_t kMaxSlices = 64 * kScheduleWarps;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  p.slice_rows = device::kWarpSize * ceil_div(p.num_rows, device::kWarpSize * kMaxSlices);
  p.num_slices = ceil_div(p.num_rows, p.slice_rows);
  p.order = order;
  const Workspace counts(p.num_slices * kMagnitudes * static_cast<int64_t>(sizeof(int32_t)));
  p.counts = counts.as<int32_t>();
  const dim3 grid(static_cast<unsigned>(ceil_div(p.num_slices, kScheduleWarps)));
  launch(op, &count_rows_kernel, grid, kScheduleThreads, 0, p);
  launch(op, &place_rows_kernel, grid, kScheduleThreads, sizeof(PlaceRowsShared), p);
}

}  // namespace longctx::cuda
