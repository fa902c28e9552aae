// gather_attention: each query token reads only the keys that were selected for it, where they
// stand. A block takes a segment of the set of a (batch entry, kv head, token) for up to kRows of
// the rows that share it: query heads, and where tokens share a set those of several. Its warps
// take turns at tiles of 16 (float32: 8) keys and never wait for each other: each has its own K and
// V tile, softmax and sums, joined at the end.
//
//   In step i of a warp, between the waits A and B:
//   A   K i is there        find tile i+1 before      s = q k^T
//       start K i+1         scale, bias, mask         softmax update
//   B   V i is there        acc += p v
//       start V i+1
//   So one tile or two are under way at any time, and the indices of a tile, the page of each key
//   and then its row, which depend on each other, are loaded while the copies before them land.
//
// Bound by memory: a tile of head_dim 128 in 16 bits is 8 KiB, for 16 + 16 tensor core products
// and 24 matrix loads. What the copies need under way, per multiprocessor, is bandwidth times
// latency, some 32 KiB: four blocks of four warps have 64 to 128 KiB.
#pragma once
#include <type_traits>

#include "cuda/gather_attention.h"
#include "cuda/gather_keys.cuh"
#include "cuda/gather_products.cuh"
#include "cuda/gather_products_fp32.cuh"
#include "cuda/last_block.cuh"
#include "cuda/merge_states.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda {

constexpr int kGatherWarps = 4;
constexpr int kGatherThreads = kGatherWarps * device::kWarpSize;

// What a launch hands to the kernel beside the params.
struct GatherLaunch {
  uint32_t heads = 1;  // of the units
  uint32_t num_segments = 1;
  uint32_t unit_tokens = 1;
  uint32_t row_tiles = 1;                // blocks that share the rows of a unit
  ScoreScale scale;                      // 16 bits
  float softmax_scale = 1, softcap = 0;  // float32
  SourceRows q, k, v;
  AttentionPartials partials;
  MergeParams merge;
  bool merge_aligned = false;
  // as in the plan
  uint32_t* counters = nullptr;
  float* scores = nullptr;
  int64_t max_slots = 0;
};

// What a block works on.
struct GatherItem {
  GatherUnit unit;
  int64_t segment;
  int64_t row_group;  // that the blocks of all segments share
  int rows;           // of the block

  LONGCTX_DEVICE int64_t head(int row) const {
    return unit.head * unit.group + (unit.first_row + row) % unit.group;
  }
  LONGCTX_DEVICE int64_t token(int row) const {
    return unit.token + (unit.first_row + row) / unit.group;
  }
  // Of out and lse in contiguous tensors.
  LONGCTX_DEVICE int64_t state(const GatherAttentionParams& p, int row) const {
    return (unit.batch * p.num_q_heads + head(row)) * p.seqs.seqlen_q + token(row);
  }
  template <class T>
  LONGCTX_DEVICE T* address(const TensorView& view, int row) const {
    return static_cast<T*>(view.data) + unit.batch * view.batch_stride +
           head(row) * view.head_stride + token(row) * view.seq_stride;
  }
};

// Blocks that read the same keys stand side by side.
template <int kRows>
LONGCTX_DEVICE GatherItem gather_item(const GatherAttentionParams& p, const GatherLaunch& launch) {
  GatherItem item;
  auto index = static_cast<uint32_t>(device::block_index());
  const uint32_t row_tile = index % launch.row_tiles;
  index /= launch.row_tiles;
  item.segment = index % launch.num_segments;
  index /= launch.num_segments;
  item.row_group = int64_t{index} * launch.row_tiles + row_tile;
  const auto units = static_cast<uint32_t>(p.seqs.seqlen_q) / launch.unit_tokens;  // of a head
  GatherUnit& unit = item.unit;
  unit.batch = index / units / launch.heads;
  unit.head = index / units % launch.heads;
  unit.token = index % units;
  unit.group = static_cast<int32_t>(p.num_q_heads / launch.heads);
  unit.first_row = static_cast<int32_t>(row_tile) * kRows;
  const int32_t rows = unit.group * static_cast<int32_t>(launch.unit_tokens);
  unit.end_row = unit.first_row + kRows < rows ? unit.first_row + kRows : rows;
  item.rows = unit.end_row - unit.first_row;
  return item;
}

// A block's shared memory.
template <class Math>
struct GatherShared {
  struct Task {
    GatherItem item;
    SelectedKeys<typename Math::Element> keys;
    uint32_t arrivals;
  };
  struct Sums {
    float reference[Math::kRows];
    float sum[Math::kRows];
  };
  static constexpr int kQ = 0;                             // [kRows, kDim]
  static constexpr int kTiles = Math::kTileBytes;          // of each warp: K, V [kKeys, kDim];
  static constexpr int kWarpBytes = 2 * Math::kTileBytes;  // at the end acc [kRows, kDim] float
  static constexpr int kSums = kTiles + kGatherWarps * kWarpBytes;
  static constexpr int kTask = kSums + kGatherWarps * static_cast<int>(sizeof(Sums));
  static constexpr int kBytes = kTask + static_cast<int>(sizeof(Task));
  static_assert(kBytes <= 99 * 1024 && kWarpBytes >= Math::kRows * Math::kDim * 4);

  char* base = device::shared_memory();
  LONGCTX_DEVICE char* q() const { return base + kQ; }
  LONGCTX_DEVICE char* k(int warp) const { return base + kTiles + warp * kWarpBytes; }
  LONGCTX_DEVICE char* v(int warp) const { return k(warp) + Math::kTileBytes; }
  LONGCTX_DEVICE Sums& sums(int warp) const { return reinterpret_cast<Sums*>(base + kSums)[warp]; }
  LONGCTX_DEVICE Task& task() const { return *reinterpret_cast<Task*>(base + kTask); }
  // Four rows of a quad's pairs do not meet in a bank.
  LONGCTX_DEVICE float* acc(int warp, int row, int column) const {
    return reinterpret_cast<float*>(k(warp)) + row * Math::kDim + (column ^ row % 4 * 8);
  }
};

// Rotates rows of a tile that a warp owns, from the first on; lane r brings the angles of row r,
// null for none.
template <class Math>
LONGCTX_DEVICE void rotate_rows(char* tile, int rows, const float* own_rope, int64_t rotary_dim) {
  const int half = static_cast<int>(rotary_dim / 2);
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    const auto address = device::shuffle(reinterpret_cast<int64_t>(own_rope), row);
    if (address == 0) continue;
    const auto* cos_sin = reinterpret_cast<const float*>(address);
#pragma unroll 1
    for (int d = device::lane_index(); d < half; d += device::kWarpSize) {
      const float cos = cos_sin[d], sin = cos_sin[half + d];
      auto &low = Math::element(tile, row, d), &high = Math::element(tile, row, d + half);
      const float x = device::widen(low), y = device::widen(high);
      device::narrow(x * cos - y * sin, low);
      device::narrow(y * cos + x * sin, high);
    }
  }
  device::sync_warp();
}

// write out, lse: joins what the warps have, for good or for the merge of the segments.
template <class Math>
LONGCTX_DEVICE void write_rows(const GatherAttentionParams& p, const GatherLaunch& launch,
                               const GatherItem& item, const GatherShared<Math>& shared) {
  const int64_t states = p.seqs.batch * p.num_q_heads * p.seqs.seqlen_q;
  for (int row = device::warp_index(); row < item.rows; row += kGatherWarps) {
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kGatherWarps; ++w) top = fmaxf(top, shared.sums(w).reference[row]);
    float factors[kGatherWarps], total = 0;
#pragma unroll
    for (int w = 0; w < kGatherWarps; ++w) {
      factors[w] = expf((shared.sums(w).reference[row] - finite(top)) * Math::kUnit);
      total = fmaf(shared.sums(w).sum[row], factors[w], total);
    }
    const RowResult result = finish_row(top * Math::kUnit, total, -INFINITY);
    const int64_t state = item.state(p, row), partial = item.segment * states + state;
    const bool whole = launch.partials.out == nullptr;
    if (device::lane_index() == 0) {
      (whole ? static_cast<float*>(p.lse) + state : launch.partials.lse + partial)[0] = result.lse;
      if (p.block_lse != nullptr) static_cast<float*>(p.block_lse)[partial] = result.lse;
    }
    auto* out = item.template address<typename Math::Out>(p.out, row);
    const int64_t row_begin = partial * p.head_dim_v;
    for (int column = device::lane_index(); column < p.head_dim_v; column += device::kWarpSize) {
      float value = 0;
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) {
        value = fmaf(*shared.acc(w, row, column), factors[w], value);
      }
      value *= result.factor;
      if (whole) {
        device::narrow(value, out[column]);
      } else {
        launch.partials.out[row_begin + column] = value;
      }
      if (p.block_out != nullptr) {
        device::narrow(value, static_cast<typename Math::Out*>(p.block_out)[row_begin + column]);
      }
    }
  }
}

// merge the segments, where this block is the last of those that have them.
template <class Math>
LONGCTX_DEVICE void merge_rows(const GatherAttentionParams& p, const GatherLaunch& launch,
                               const GatherShared<Math>& shared) {
  using Out = typename Math::Out;
  auto& task = shared.task();
  uint32_t* const counter = launch.counters + task.item.row_group;
  if (!is_last_block(counter, launch.num_segments, task.arrivals)) return;
  for (int row = device::warp_index(); row < task.item.rows; row += kGatherWarps) {
    const int64_t state = task.item.state(p, row);
    if (launch.merge_aligned) {
      merge_row<float, float, Out, 4>(launch.merge, state);
    } else {
      merge_row<float, float, Out, 1>(launch.merge, state);
    }
  }
}

template <class Math>
LONGCTX_KERNEL(kGatherThreads, Math::kMinBlocks)
gather_attention_kernel(const LONGCTX_GRID_CONSTANT GatherAttentionParams p,
                        const LONGCTX_GRID_CONSTANT GatherLaunch launch) {
  using Element = typename Math::Element;
  constexpr int kKeys = Math::kKeys, kRows = Math::kRows;
  const GatherShared<Math> shared;
  const int warp = device::warp_index(), lane = device::lane_index();
  char *k_tile = shared.k(warp), *v_tile = shared.v(warp);

  // load q tile
  if (warp == 0) {
    const GatherItem item = gather_item<kRows>(p, launch);
    if (lane == 0) shared.task() = {item, SelectedKeys<Element>(p, item.unit, launch.heads), 0};
    const Element* q_row = lane < item.rows ? item.address<Element>(p.q, lane) : nullptr;
    Math::copy(shared.q(), q_row, launch.q);
  }
  device::commit_copies();
  device::sync_threads();
  const auto& item = shared.task().item;
  const auto& keys = shared.task().keys;

  // The warp's next tile of the segment that holds a key: lane i finds that of slot i % kKeys.
  const SlotRange range = p.block_out == nullptr
                              ? keys.segment(item.segment, launch.num_segments, kKeys)
                              : keys.entry(p, item.segment);
  int32_t first_slot = range.begin + warp * kKeys;
  const auto find = [&](GatheredKey<Element>& key) -> bool {
    for (; first_slot < range.end; first_slot += kGatherWarps * kKeys) {
      const int32_t slot = first_slot + lane % kKeys;
      key = {};
      if (slot < range.end) key = keys.at(p, slot);
      if (device::ballot(key.k != nullptr) != 0) return true;
      if (launch.scores == nullptr || lane >= kKeys || slot >= range.end) continue;
      for (int row = 0; row < item.rows; ++row) {
        launch.scores[item.state(p, row) * launch.max_slots + slot] = -INFINITY;
      }
    }
    return false;
  };
  GatheredKey<Element> key;
  bool more = find(key);
  if (more) Math::copy(k_tile, key.k, launch.k);
  device::commit_copies();
  if (more) Math::copy(v_tile, key.v, launch.v);
  device::commit_copies();
  device::wait_copies<2>();
  device::sync_threads();  // q is there
  if (p.rope.cos_sin != nullptr) {
    if (warp == 0) {
      const float* own = lane < item.rows ? keys.query_rope(p, item.token(lane)) : nullptr;
      rotate_rows<Math>(shared.q(), item.rows, own, p.rope.rotary_dim);
    }
    device::sync_threads();
  }

  Math math(item.rows);
  // for each key tile of the warp
#pragma unroll 1
  while (more) {
    GatheredKey<Element> next;
    const int32_t own_slot = first_slot;
    first_slot += kGatherWarps * kKeys;
    const bool has_next = find(next);
    device::wait_copies<1>();
    device::sync_warp();  // A
    if (p.rope.cos_sin != nullptr) rotate_rows<Math>(k_tile, kKeys, key.rope, p.rope.rotary_dim);
    // s = q k^T
    math.multiply_scores(shared.q(), k_tile);
    device::sync_warp();  // every lane has read K
    if (has_next) Math::copy(k_tile, next.k, launch.k);
    device::commit_copies();
    // scale, bias, mask
    if constexpr (std::is_same_v<Element, float>) {
      math.finish_scores(launch.softmax_scale, launch.softcap, key.rows, keys.has_bias(), key.bias);
    } else {
      math.finish_scores(launch.scale, key.rows, keys.has_bias(), key.bias);
    }
    if (launch.scores != nullptr) {
      math.for_each_score([&](int row, int i, float score) {
        if (row >= item.rows || own_slot + i >= range.end) return;
        launch.scores[item.state(p, row) * launch.max_slots + own_slot + i] = score * Math::kUnit;
      });
    }
    // softmax update
    math.update_weights();
    device::wait_copies<1>();
    device::sync_warp();  // B
    // acc += p v
    math.add_values(v_tile);
    device::sync_warp();  // every lane has read V
    if (has_next) Math::copy(v_tile, next.v, launch.v);
    device::commit_copies();
    key = next;
    more = has_next;
  }
  device::wait_copies<0>();
  device::sync_warp();

  // write out, lse
  math.leave(
      [&](int row, float reference, float sum) {
        shared.sums(warp).reference[row] = reference;
        shared.sums(warp).sum[row] = sum;
      },
      [&](int row, int column, float x, float y) {
        *reinterpret_cast<Columns<float, 2>*>(shared.acc(warp, row, column)) = {x, y};
      });
  device::sync_threads();
  write_rows(p, launch, item, shared);
  if (launch.counters != nullptr) merge_rows(p, launch, shared);
}

template <class T, int kHeadDim>
using GatherMath =
    std::conditional_t<std::is_same_v<T, float>, PlainGather<kHeadDim>, TensorGather<T, kHeadDim>>;

template <class T, int head_dim>
void launch_gather_attention(const GatherAttentionParams& params, const GatherPlan& plan) {
  using Math = GatherMath<T, head_dim>;
  GatherLaunch launch_params;
  const int64_t rows = params.num_q_heads / plan.heads * plan.unit_tokens;
  const int64_t row_tiles = (rows + Math::kRows - 1) / Math::kRows;
  launch_params.heads = static_cast<uint32_t>(plan.heads);
  launch_params.unit_tokens = static_cast<uint32_t>(plan.unit_tokens);
  launch_params.num_segments = static_cast<uint32_t>(plan.num_segments);
  launch_params.row_tiles = static_cast<uint32_t>(row_tiles);
  launch_params.scale = score_scale(params.softmax_scale, params.softcap);
  launch_params.softmax_scale = static_cast<float>(params.softmax_scale);
  launch_params.softcap = static_cast<float>(params.softcap);
  launch_params.q = source_rows(params.q, params.head_dim, Math::kElements);
  launch_params.k = source_rows(params.k, params.head_dim, Math::kElements);
  launch_params.v = source_rows(params.v, params.head_dim_v, Math::kElements);
  launch_params.partials = plan.partials;
  launch_params.merge = merge_params(plan.merge);
  launch_params.merge_aligned = merge_columns<float, typename Math::Out>(launch_params.merge) > 1;
  launch_params.counters = plan.counters;
  launch_params.scores = plan.scores;
  launch_params.max_slots = plan.max_slots;
  const int64_t units = params.seqs.batch * plan.heads * params.seqs.seqlen_q / plan.unit_tokens;
  launch("gather_attention", &gather_attention_kernel<Math>,
         dim3(static_cast<unsigned>(units * plan.num_segments * row_tiles)), kGatherThreads,
         GatherShared<Math>::kBytes, params, launch_params);
}

template <class T, int head_dim>
int64_t gather_attention_shared_bytes() {
  return GatherShared<GatherMath<T, head_dim>>::kBytes;
}

}  // namespace longctx::cuda
