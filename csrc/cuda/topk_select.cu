#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/topk_select.cuh"
#include "cuda/topk_slices.cuh"

namespace longctx::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// 64 KiB of keys: on any device a block of 1024 threads has room for them beside its sums.
constexpr int64_t kRowBytes = 64 * 1024;

// Whether groups of 16 bytes are aligned in every row.
bool aligned(const ScoreRows& rows, int64_t score_bytes) {
  bool all = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (int dim = 0; dim < rows.num_dims; ++dim) {
    all &= rows.sizes[dim] == 1 || rows.strides[dim] * score_bytes % 16 == 0;
  }
  return all;
}

// The lowest key whose score is at least `value`.
uint32_t threshold_key(float value, DType dtype) {
  const FloatFormat format = float_format(dtype);
  uint32_t low = format.sign - 1 - format.infinity, high = infinity_key(format);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    score_of(middle, dtype) >= value ? high = middle : low = middle + 1;
  }
  return low;
}

// How long rows are shared out: as many blocks of threads as run at a time, with at least 16 KiB
// each. More slices than 128 would have too many sums to put together.
SliceGrid slice_grid(const ScoreRows& rows, int64_t score_bytes) {
  constexpr int64_t kMaxSlices = 128, kSliceBytes = 16 * 1024;
  const int64_t chunk = device::kWarpSize * 16 / score_bytes;
  const int64_t blocks = int64_t{kSliceBlocks} * device_limits().num_multiprocessors;
  const int64_t wanted = at_most(clamp_index(blocks / rows.num_rows, 1, kMaxSlices),
                                 rows.n * score_bytes / kSliceBytes);
  SliceGrid grid;
  grid.num_rows = rows.num_rows;
  grid.slice = static_cast<uint32_t>(ceil_div(ceil_div(rows.n, wanted), chunk) * chunk);
  grid.num_slices = ceil_div(rows.n, grid.slice);
  grid.digit_bits = score_bytes == 2 ? 8 : kMaxDigitBits;
  grid.num_passes = static_cast<int>(ceil_div(8 * score_bytes, grid.digit_bits));
  return grid;
}

template <class Bits>
void select_in_slices(const char* op, const SelectRule& rule) {
  SliceGrid grid = slice_grid(rule.p.scores, sizeof(Bits));
  const int64_t blocks = grid.num_rows * grid.num_slices;
  const Workspace searches(grid.num_passes * grid.num_rows *
                           static_cast<int64_t>(sizeof(KeySearch)));
  const Workspace counts(2 * blocks * grid.entries() * static_cast<int64_t>(sizeof(int32_t)));
  const Workspace better(blocks * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t shared_blocks = rule.cumulative ? blocks : 0;
  const Workspace masses(2 * shared_blocks * grid.entries() *
                         static_cast<int64_t>(sizeof(int64_t)));
  const Workspace highest(shared_blocks * static_cast<int64_t>(sizeof(uint32_t)));
  const Workspace forced(shared_blocks * static_cast<int64_t>(sizeof(int64_t)));
  grid.searches = searches.as<KeySearch>();
  grid.counts = counts.as<int32_t>();
  grid.better = better.as<int32_t>();
  grid.masses = masses.as<int64_t>();
  grid.highest = highest.as<uint32_t>();
  grid.forced_masses = forced.as<int64_t>();

  const dim3 all(static_cast<unsigned>(blocks));
  const int64_t shared_bytes = TopKShared::bytes(rule.cumulative);
  if (rule.cumulative) {
    launch(op, &topk_highest_kernel<Bits>, all, kSliceThreads, shared_bytes, rule, grid);
  }
  for (int pass = 0; pass < grid.num_passes; ++pass) {
    launch(op, &topk_digits_kernel<Bits>, all, kSliceThreads, shared_bytes, rule, grid, pass);
  }
  launch(op, &topk_write_kernel<Bits>, all, kSliceThreads, shared_bytes, rule, grid);
}

template <class Bits>
void select(const char* op, const SelectRule& given) {
  const ScoreRows& rows = given.p.scores;
  if (rows.num_rows == 0) return;
  SelectRule rule = given;
  rule.aligned = aligned(rows, sizeof(Bits));
  if (rows.n * static_cast<int64_t>(sizeof(Bits)) > kRowBytes) {
    return select_in_slices<Bits>(op, rule);
  }
  int threads = device::kWarpSize;  // about eight scores each
  while (threads < kMaxRowThreads && threads * int64_t{8} < rows.n) threads *= 2;
  // Clearing and adding up 2^11 sums costs as much as another pass over a short row.
  const int digit_bits = sizeof(Bits) == 2 || rows.n <= 4096 ? 8 : kMaxDigitBits;
  const int64_t key_bytes = ceil_div(rows.n * static_cast<int64_t>(sizeof(Bits)), 16) * 16;
  launch(op, &topk_row_kernel<Bits>, dim3(static_cast<unsigned>(rows.num_rows)), threads,
         TopKShared::bytes(rule.cumulative) + key_bytes, rule, digit_bits);
}

void select(const char* op, const SelectRule& rule) {
  rule.p.scores.dtype == DType::kFloat32 ? select<uint32_t>(op, rule) : select<uint16_t>(op, rule);
}

}  // namespace

void run_topk_select_cuda(const TopKSelectParams& p) {
  SelectRule rule;
  rule.p = p;
  select("topk_select", rule);
}

void run_threshold_select_cuda(const ThresholdSelectParams& p) {
  const FloatFormat format = float_format(p.scores.dtype);
  SelectRule rule;
  rule.p = p;
  rule.cumulative = p.cumulative;
  rule.value = p.value;
  // With masses whatever is above -inf may be chosen.
  rule.floor =
      p.cumulative ? format.sign - format.infinity : threshold_key(p.value, p.scores.dtype);
  select("threshold_select", rule);
}

}  // namespace longctx::cuda
