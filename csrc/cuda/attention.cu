// Launches attention and block_sparse_attention: the path, the tile, the splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/attention_fp32.h"
#include "cuda/attention_path.h"
#include "cuda/kernels.h"
#include "cuda/merge_splits.h"
#include "cuda/runtime.h"
#include "cuda/schedule.h"
#include "cuda/supported.h"
#include "cuda/unowned_rows.h"
#ifdef LONGCTX_SM90
#include "cuda/sm90/attention.h"
#endif

namespace longctx::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t instance_dim(const AttentionParams& p) { return std::max(p.head_dim, p.head_dim_v); }

// Calls f(Dim<n>) with the smallest of `dims` that holds `dim`.
template <int n>
struct Dim {
  static constexpr int value = n;
};
template <int first, int... rest, class F>
void with_dim(int64_t dim, const F& f) {
  if constexpr (sizeof...(rest) > 0) {
    if (dim > first) return with_dim<rest...>(dim, f);
  }
  f(Dim<first>());
}

ForcedPath forced_path = ForcedPath::kAuto;

// The most (row, head) pairs of a tile. 128 halve what a product reads from shared memory, but two
// blocks must fit a multiprocessor, and every multiprocessor should get some.
int64_t choose_tile_rows(const AttentionParams& p, const BlockList* blocks, int64_t max_heads,
                         const DeviceLimits& limits) {
  if (p.dtype == DType::kFloat32) return 32;
  if (instance_dim(p) > 128) return 64;
  const int64_t rows = blocks == nullptr ? p.seqs.seqlen_q : blocks->block_size_q;
  if (rows * max_heads <= 64) return 64;
  if (blocks != nullptr) return 128;
  const bool two_fit = limits.shared_memory_per_block >= 128 * 1024;
  const int64_t tiles = ceil_div(p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q, 128);
  return two_fit && tiles >= 2 * limits.num_multiprocessors ? 128 : 64;
}

// The largest divisor of `max_heads` whose rows fit the tile.
int64_t choose_heads(int64_t max_heads, int64_t rows, int64_t tile_rows) {
  for (int64_t heads = max_heads; heads > 1; --heads) {
    if (max_heads % heads == 0 && heads * rows <= tile_rows) return heads;
  }
  return 1;
}

// Keys of an item are split where there are fewer items than places for blocks, but no split gets
// less than a few tiles. The lengths of sequences are on the device: the axes bound them.
int64_t choose_splits(const AttentionParams& p, const BlockList* blocks, int64_t items,
                      int64_t places) {
  constexpr int64_t kMinKeys = 256, kMaxSplits = 64;
  int64_t keys = p.seqs.seqlen_k;
  if (blocks != nullptr) {
    const int64_t rows = blocks->pattern_batch * blocks->pattern_heads * blocks->num_q_blocks;
    keys = std::min(keys, ceil_div(blocks->capacity, rows) * blocks->block_size_k);
  }
  return std::max<int64_t>(1, std::min({places / items, keys / kMinKeys, kMaxSplits}));
}

// Head groups whose keys and values share the L2 cache while the blocks walk over their rows.
int64_t choose_groups_at_a_time(const AttentionParams& p, const ItemGrid& grid) {
  constexpr int64_t kCacheBytes = int64_t{24} << 20;
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t kv_bytes = p.seqs.seqlen_k * (p.head_dim + p.head_dim_v) * element;
  const int64_t kv_heads = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, kv_bytes));
  const int64_t groups_per_kv_head = grid.head_groups / p.num_kv_heads;
  return std::min(kv_heads * groups_per_kv_head, p.seqs.batch * grid.head_groups);
}

// The one place that decides how a call is cut.
AttentionPlan choose_plan(const char* op, const AttentionParams& p, const BlockList* blocks,
                          AttentionPath path, const DeviceLimits& limits) {
  AttentionPlan plan;
  plan.op = op;
  const bool hopper = path == AttentionPath::kSm90;
  const bool shared_pattern = blocks == nullptr || blocks->pattern_heads <= p.num_kv_heads;
  const int64_t max_heads = shared_pattern ? p.num_q_heads / p.num_kv_heads : 1;
  plan.tile_rows = hopper ? 128 : choose_tile_rows(p, blocks, max_heads, limits);
  ItemGrid& grid = plan.grid;
  if (blocks == nullptr) {
    // Rows of several heads in a tile reach less far beyond the diagonal than those of one.
    constexpr int64_t kMinRows = 16;
    // A copy on Hopper brings the rows of a swizzle, 8, or a multiple.
    const int64_t unit = hopper ? 8 : 1;
    const int64_t rows = ceil_div(p.seqs.seqlen_q, unit) * unit;
    grid.heads_per_item = choose_heads(max_heads, std::min(rows, kMinRows), plan.tile_rows);
    grid.block_rows = plan.tile_rows / grid.heads_per_item / unit * unit;
    if (hopper) grid.block_rows = std::min(grid.block_rows, rows);
    grid.blocks_per_seq = ceil_div(p.seqs.seqlen_q, grid.block_rows) +
                          (p.seqs.cu_seqlens_q == nullptr ? 0 : p.seqs.num_seqs);
  } else {
    grid.heads_per_item = choose_heads(max_heads, blocks->block_size_q, plan.tile_rows);
    grid.block_rows = std::min(blocks->block_size_q, plan.tile_rows);
    grid.items_per_block = blocks->block_size_q / grid.block_rows;
  }
  grid.head_groups = p.num_q_heads / grid.heads_per_item;
  grid.groups_at_a_time = choose_groups_at_a_time(p, grid);
  const int64_t places = (hopper ? 1 : 2) * limits.num_multiprocessors;
  grid.num_splits = choose_splits(p, blocks, num_items(p, blocks, grid), places);
  return plan;
}

void require_supported_attention(const char* op, const AttentionParams& p) {
  require_supported(op, p.dtype, p.head_dim, p.seqs);
  require_head_dim_v(op, p.head_dim_v);
}

// Rows of the query axis that belong to no sequence: out = 0, lse = -inf.
void fill_unowned(const AttentionParams& p, const AttentionPlan& plan) {
  if (p.seqs.cu_seqlens_q == nullptr) return;
  UnownedRows rows;
  rows.seqs = p.seqs;
  rows.num_maps = p.num_q_heads * plan.grid.num_splits;
  rows.lse = plan.partials.lse;
  if (rows.lse == nullptr) {
    const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
    rows.lse = static_cast<float*>(p.lse);
    rows.out = static_cast<char*>(p.out.data);
    rows.map_stride = p.out.head_stride * element;
    rows.row_stride = p.out.seq_stride * element;
    rows.row_bytes = p.head_dim_v * element;
  }
  fill_unowned_rows(plan.op, rows);
}

void launch_path(AttentionPath path, const AttentionParams& p, const BlockList* blocks,
                 const AttentionPlan& plan) {
  if (path == AttentionPath::kFloat32) {
    return with_dim<64, 128, 256>(instance_dim(p), [&](auto dim) {
      launch_attention_fp32<float, decltype(dim)::value>(p, blocks, plan);
    });
  }
#ifdef LONGCTX_SM90
  if (path == AttentionPath::kSm90) {
    return with_dim<64, 128, 256>(instance_dim(p), [&](auto dim) {
      constexpr int head_dim = decltype(dim)::value;
      if (p.dtype == DType::kBFloat16) {
        sm90::launch_attention<__nv_bfloat16, head_dim>(p, blocks, plan);
      } else {
        sm90::launch_attention<__half, head_dim>(p, blocks, plan);
      }
    });
  }
#endif
  with_dim<64, 96, 128, 192, 256>(instance_dim(p), [&](auto dim) {
    constexpr int head_dim = decltype(dim)::value;
    if (p.dtype == DType::kBFloat16) {
      launch_attention<__nv_bfloat16, head_dim>(p, blocks, plan);
    } else {
      launch_attention<__half, head_dim>(p, blocks, plan);
    }
  });
}

void merge(const AttentionParams& p, const AttentionPlan& plan) {
  SplitMerge splits;
  splits.dtype = p.dtype;
  splits.out = plan.partials.out;
  splits.lse = plan.partials.lse;
  splits.sinks = p.sinks;
  splits.num_splits = plan.grid.num_splits;
  splits.batch = p.seqs.batch;
  splits.heads = p.num_q_heads;
  splits.seqlen_q = p.seqs.seqlen_q;
  splits.dim_v = p.head_dim_v;
  splits.merged_out = p.out;
  splits.merged_lse = static_cast<float*>(p.lse);
  merge_splits(plan.op, splits);
}

void run(const char* op, const AttentionParams& p, const BlockList* blocks) {
  require_supported_attention(op, p);
  if (p.seqs.batch == 0 || p.seqs.seqlen_q == 0) return;
  const DeviceLimits& limits = device_limits();
  const AttentionPath path = choose_attention_path(p, blocks, limits).path;
  AttentionPlan plan = choose_plan(op, p, blocks, path, limits);

  const int64_t items = num_items(p, blocks, plan.grid);
  const int64_t num_lists =
      blocks == nullptr ? 0 : blocks->pattern_batch * blocks->pattern_heads * blocks->num_q_blocks;
  // Where all blocks run at once, their order does not matter.
  const bool ordered = blocks != nullptr && items > 2 * limits.num_multiprocessors;
  const Workspace order(ordered ? num_lists * static_cast<int64_t>(sizeof(int32_t)) : 0);
  if (ordered) {
    order_rows_longest_first(op, *blocks, order.as<int32_t>());
    plan.grid.order = order.as<int32_t>();
  }

  const int64_t states = plan.grid.num_splits == 1 ? 0
                                                   : plan.grid.num_splits * p.seqs.batch *
                                                         p.num_q_heads * p.seqs.seqlen_q;
  const Workspace partial_out(states * p.head_dim_v * static_cast<int64_t>(sizeof(float)));
  const Workspace partial_lse(states * static_cast<int64_t>(sizeof(float)));
  plan.partials = {partial_out.as<float>(), partial_lse.as<float>()};

  fill_unowned(p, plan);
  launch_path(path, p, blocks, plan);
  if (plan.grid.num_splits > 1) merge(p, plan);
}

}  // namespace

AttentionChoice choose_attention_path(const AttentionParams& p,
                                      [[maybe_unused]] const BlockList* blocks,
                                      [[maybe_unused]] const DeviceLimits& limits) {
  if (p.dtype == DType::kFloat32) return {AttentionPath::kFloat32, "float32"};
  if (forced_path == ForcedPath::kSm80) return {AttentionPath::kSm80, "forced"};
  const char* why_not = "this build has no sm_90a kernels";
#ifdef LONGCTX_SM90
  if (sm90::supports(p, blocks, limits, &why_not)) {
    return {AttentionPath::kSm90, forced_path == ForcedPath::kSm90 ? "forced" : "Hopper"};
  }
#endif
  if (forced_path == ForcedPath::kSm90) {
    throw std::invalid_argument(
        std::string("longctx::_force_cuda_path: `path` must support the call; got sm90: ") +
        why_not);
  }
  return {AttentionPath::kSm80, why_not};
}

void force_attention_path(ForcedPath path) { forced_path = path; }

const char* path_name(AttentionPath path) {
  switch (path) {
    case AttentionPath::kSm90:
      return "sm90";
    case AttentionPath::kSm80:
      return "sm80";
    case AttentionPath::kFloat32:
      return "float32";
  }
  return "";
}

void run_attention_cuda(const AttentionParams& params) { run("attention", params, nullptr); }

void run_block_sparse_attention_cuda(const BlockSparseAttentionParams& params) {
  run("block_sparse_attention", params, &params.blocks);
}

}  // namespace longctx::cuda
