// attention and block_sparse_attention on tensor cores: flash attention (Dao et al., 2022) over the
// key tiles that an item visits. Four warps own kTileRows / 4 (row, head) pairs each, so that the
// softmax needs shuffles among four lanes only.
//
//   K and V have one buffer each; key tables alternate. In step i, between the barriers A and B:
//   A   K i is there, and every warp has read V i-1
//       start V i    warp 3: table i+1    s = q k^T, mask, softmax update
//   B   V i and table i+1 are there, and every warp has read K i
//       start K i+1                       acc += p v
//   Table i+1 replaces table i-1, whose last reader, the mask of step i-1, is before B i-1.
//   Before A 0 lie the item, the row masks and table 0, a barrier after each, then K 0.
//
// Floor of a step of 128 rows at head_dim 128, counted in the binary: a warp's 256 products hold
// its tensor core for 2048 cycles on Ampere and 1024 on Hopper; its 64 exponentials a lane take
// 512, its instructions about 800 issue slots. The four warps' 320 matrix loads and the copies hold
// the shared memory for 1536 cycles, which is the floor on Hopper.
#pragma once
#include "cuda/attention.h"
#include "cuda/online_softmax.cuh"
#include "cuda/runtime.h"
#include "cuda/tile_copy.cuh"

namespace longctx::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * device::kWarpSize;
constexpr int kTileKeys = 64;

// Blocks that should share a multiprocessor: what the registers of accumulators and scores allow.
template <int kHeadDim, int kTileRows>
constexpr int kMinBlocks = kTileRows == 128 ? (kHeadDim <= 64 ? 3 : 2)
                                            : (kHeadDim <= 64    ? 4
                                               : kHeadDim <= 128 ? 3
                                                                 : 2);

// What a launch hands to the kernel beside the params.
struct AttentionLaunch {
  BlockList blocks;  // block_indptr null: dense
  ItemGrid grid;
  ScoreScale scale;
  SourceRows q, k, v, out;
  AttentionPartials partials;
};

// What a block works on. In shared memory, so that it takes no registers while the products run.
struct AttentionTask {
  Item item;
  const uint16_t* k;  // [head_dim], the first key of the sequence
  const uint16_t* v;  // [head_dim_v]
};

// A block's shared memory.
template <int kHeadDim, int kHeadDimV, int kTileRows>
struct AttentionShared {
  using Mask = ItemMask<kTileRows>;
  using Keys = KeyTile<kTileKeys>;
  static constexpr int kQ = 0;  // [kTileRows, kHeadDim]; at the end out [kTileRows, kHeadDimV]
  static constexpr int kK = kQ + kTileRows * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kV = kK + kTileKeys * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kMask = kV + kTileKeys * TileRows<kHeadDimV>::kRowBytes;
  static constexpr int kTask = kMask + sizeof(Mask);
  static constexpr int kKeys = kTask + sizeof(AttentionTask);  // [2]
  static constexpr int kBytes = kKeys + 2 * sizeof(Keys);
  static_assert(kBytes <= 99 * 1024 && kHeadDimV <= kHeadDim);

  char* base = device::shared_memory();
  LONGCTX_DEVICE char* q(int row) const { return base + kQ + row * TileRows<kHeadDim>::kRowBytes; }
  LONGCTX_DEVICE char* out(int row) const { return q(row); }
  LONGCTX_DEVICE char* k() const { return base + kK; }
  LONGCTX_DEVICE char* v() const { return base + kV; }
  LONGCTX_DEVICE Mask& mask() const { return *reinterpret_cast<Mask*>(base + kMask); }
  LONGCTX_DEVICE AttentionTask& task() const {
    return *reinterpret_cast<AttentionTask*>(base + kTask);
  }
  LONGCTX_DEVICE Keys& keys(int parity) const {
    return reinterpret_cast<Keys*>(base + kKeys)[parity];
  }
};

// s += q k^T, of the warp's rows.
template <class T, class Shared, int kHeadDim, int kRowTiles>
LONGCTX_DEVICE void multiply_scores(const Shared& shared, int first_row,
                                    float (&s)[kRowTiles][kTileKeys / 8][4]) {
  const MatrixLane<kHeadDim> q_lane(shared.q(first_row), true), k_lane(shared.base, false);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      device::load_matrices(a[m], q_lane.at(Shared::kQ, 16 * m, step));
    }
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; n += 2) {
      uint32_t b[4];
      device::load_matrices(b, k_lane.at(Shared::kK, 8 * n, step));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        device::multiply_add(T(), s[m][n], a[m], b[0], b[1]);
        device::multiply_add(T(), s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += p v.
template <class T, class Shared, int kHeadDimV, int kRowTiles>
LONGCTX_DEVICE void add_values(const Shared& shared,
                               const uint32_t (&p)[kRowTiles][kTileKeys / 16][4],
                               float (&acc)[kRowTiles][kHeadDimV / 8][4]) {
  const MatrixLane<kHeadDimV> v_lane(shared.base, true);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kHeadDimV / 8; n += 2) {
      uint32_t b[4];
      device::load_matrices_transposed(b, v_lane.at(Shared::kV, 16 * step, n / 2));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        device::multiply_add(T(), acc[m][n], p[m][step], b[0], b[1]);
        device::multiply_add(T(), acc[m][n + 1], p[m][step], b[2], b[3]);
      }
    }
  }
}

// write out, lse. The warp's rows of the Q tile are its own: they take the rounded results on their
// way to whole rows of 16-byte stores.
template <class T, int kHeadDimV, int kRowTiles>
LONGCTX_DEVICE void write_out(const AttentionParams& p, const AttentionLaunch& launch,
                              const Item& item, int first_row, char* rows,
                              const RowStates<kRowTiles>& states,
                              const float (&acc)[kRowTiles][kHeadDimV / 8][4]) {
  device::sync_warp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = first_row + own_row(m, half);
      const float sum = quad_sum(states.sum[m][half]);
      const bool exists = pair < item.num_pairs();
      const float sink = p.sinks != nullptr && exists ? p.sinks[item.head(pair)] : -INFINITY;
      const RowResult result = finish_row(states.reference[m][half] * kLn2, sum, sink);
      if (exists && device::lane_index() % 4 == 0) {
        static_cast<float*>(p.lse)[state_index(p, item, pair)] = result.lse;
      }
#pragma unroll
      for (int n = 0; n < kHeadDimV / 8; ++n) {
        // A row that saw nothing has sums of zero weights: acc is 0.
        const uint32_t values = device::pack_pair(T(), acc[m][n][2 * half] * result.factor,
                                                  acc[m][n][2 * half + 1] * result.factor);
        const int offset = TileRows<kHeadDimV>::offset(own_row(m, half), n);
        *reinterpret_cast<uint32_t*>(rows + offset + device::lane_index() % 4 * 4) = values;
      }
    }
  }
  device::sync_warp();
  constexpr int kRows = 16 * kRowTiles;
  const int pair = first_row + device::lane_index() % kRows;
  uint16_t* target = nullptr;
  if (pair < item.num_pairs()) {
    target = row_address<uint16_t>(p.out, item, item.head(pair), item.seq.q_begin + item.row(pair));
  }
  write_own_rows<kHeadDimV, kRows>(rows, target, launch.out);
}

// The state of a split: out normalised over its own keys, without sinks.
template <int kHeadDimV, int kRowTiles>
LONGCTX_DEVICE void write_split(const AttentionParams& p, const AttentionLaunch& launch,
                                const Item& item, int first_row, const RowStates<kRowTiles>& states,
                                const float (&acc)[kRowTiles][kHeadDimV / 8][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = first_row + own_row(m, half);
      const float sum = quad_sum(states.sum[m][half]);
      if (pair >= item.num_pairs()) continue;
      const RowResult result = finish_row(states.reference[m][half] * kLn2, sum, -INFINITY);
      const int64_t row = state_index(p, item, pair);
      if (device::lane_index() % 4 == 0) launch.partials.lse[row] = result.lse;
      float* out = launch.partials.out + row * p.head_dim_v;
#pragma unroll
      for (int n = 0; n < kHeadDimV / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = own_column(n) + i;
          if (column < p.head_dim_v) out[column] = acc[m][n][2 * half + i] * result.factor;
        }
      }
    }
  }
}

template <class T, int kHeadDim, int kHeadDimV, int kTileRows>
LONGCTX_KERNEL(kAttentionThreads, (kMinBlocks<kHeadDim, kTileRows>))
attention_kernel(const LONGCTX_GRID_CONSTANT AttentionParams p,
                 const LONGCTX_GRID_CONSTANT AttentionLaunch launch) {
  constexpr int kWarpRows = kTileRows / kAttentionWarps, kRowTiles = kWarpRows / 16;
  using Shared = AttentionShared<kHeadDim, kHeadDimV, kTileRows>;
  const Shared shared;
  const BlockList* blocks = launch.blocks.block_indptr == nullptr ? nullptr : &launch.blocks;
  const int warp = device::warp_index(), first_row = warp * kWarpRows;
  if (warp == 0) {
    const Item found = item_at(p, blocks, launch.grid, device::block_index());
    if (device::lane_index() == 0) {
      shared.task() = {found, row_address<uint16_t>(p.k, found, found.kv_head, found.seq.k_begin),
                       row_address<uint16_t>(p.v, found, found.kv_head, found.seq.k_begin)};
    }
  }
  device::sync_threads();
  const Item& item = shared.task().item;
  if (item.num_rows == 0) return;
  // The last warp walks the keys: it has no rows where an item is short.
  const bool walks = warp == kAttentionWarps - 1;
  const bool has_rows = first_row < item.num_pairs();

  // load q tile
  const int own_pair = first_row + device::lane_index() % kWarpRows;
  const uint16_t* q_row = nullptr;
  if (own_pair < item.num_pairs()) {
    q_row = row_address<uint16_t>(p.q, item, item.head(own_pair),
                                  item.seq.q_begin + item.row(own_pair));
  }
  copy_own_rows<kHeadDim, kWarpRows>(shared.q(first_row), q_row, launch.q);
  shared.mask().init_rows(p.mask, item);
  device::sync_threads();
  KeyTiles<kTileKeys, kTileRows> tiles(shared.mask());
  if (walks) {
    shared.mask().init_extents();
    tiles.begin(blocks, item_block_row(p, blocks, item), item, launch.grid.num_splits);
    tiles.next(shared.keys(0));
  }
  device::sync_threads();
  bool more = shared.keys(0).exists();
  if (more) {
    copy_keys<kHeadDim, kAttentionThreads>(shared.k(), shared.keys(0), shared.task().k, launch.k);
  }
  device::commit_copies();

  RowStates<kRowTiles> states;
  float acc[kRowTiles][kHeadDimV / 8][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      states.reference[m][half] = -INFINITY;
      states.sum[m][half] = 0;
    }
#pragma unroll
    for (int n = 0; n < kHeadDimV / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
    }
  }

  // for each key block of the row
#pragma unroll 1
  for (int parity = 0; more; parity ^= 1) {
    const auto& keys = shared.keys(parity);
    device::wait_copies<0>();
    device::sync_threads();  // A
    copy_keys<kHeadDimV, kAttentionThreads>(shared.v(), keys, shared.task().v, launch.v);
    device::commit_copies();
    if (walks) tiles.next(shared.keys(parity ^ 1));

    uint32_t weights[kRowTiles][kTileKeys / 16][4];
    if (has_rows) {
      // s = q k^T
      float s[kRowTiles][kTileKeys / 8][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
        }
      }
      multiply_scores<T, Shared, kHeadDim>(shared, first_row, s);
      // mask
      float factor = launch.scale.scale_log2;
      if (keys.partial() || !launch.scale.monotone()) {
        scale_scores(launch.scale, s);
        if (keys.partial()) {
          const int pair = first_row + device::lane_index() % kWarpRows;
          mask_scores(keys.slots_seen_by(shared.mask().rows[pair % item.num_rows]), s);
        }
        factor = 1;
      }
      // softmax update
      update_softmax<T>(factor, s, states, acc, weights);
    }
    device::wait_copies<0>();
    device::sync_threads();  // B
    more = shared.keys(parity ^ 1).exists();
    if (more) {
      copy_keys<kHeadDim, kAttentionThreads>(shared.k(), shared.keys(parity ^ 1), shared.task().k,
                                             launch.k);
    }
    device::commit_copies();
    // acc += p v
    if (has_rows) add_values<T, Shared, kHeadDimV>(shared, weights, acc);
  }

  // write out, lse
  device::wait_copies<0>();
  if (!has_rows) return;
  if (launch.partials.out != nullptr) {
    write_split<kHeadDimV>(p, launch, item, first_row, states, acc);
  } else {
    write_out<T, kHeadDimV>(p, launch, item, first_row, shared.out(first_row), states, acc);
  }
}

// The tiles that an instance has.
template <class T, int kHeadDim, int kHeadDimV, int kTileRows>
void launch_attention_tile(const AttentionParams& params, const BlockList* blocks,
                           const AttentionPlan& plan) {
  AttentionLaunch launch_params;
  if (blocks != nullptr) launch_params.blocks = *blocks;
  launch_params.grid = plan.grid;
  launch_params.scale = score_scale(params.softmax_scale, params.softcap);
  launch_params.q = source_rows(params.q, params.head_dim, kChunk);
  launch_params.k = source_rows(params.k, params.head_dim, kChunk);
  launch_params.v = source_rows(params.v, params.head_dim_v, kChunk);
  launch_params.out = source_rows(params.out, params.head_dim_v, kChunk);
  launch_params.partials = plan.partials;
  launch(plan.op, &attention_kernel<T, kHeadDim, kHeadDimV, kTileRows>,
         dim3(static_cast<unsigned>(num_items(params, blocks, plan.grid))), kAttentionThreads,
         AttentionShared<kHeadDim, kHeadDimV, kTileRows>::kBytes, params, launch_params);
}

template <class T, int head_dim>
void launch_attention(const AttentionParams& params, const BlockList* blocks,
                      const AttentionPlan& plan) {
  if constexpr (head_dim <= 128) {
    if (plan.tile_rows == 128) {
      return launch_attention_tile<T, head_dim, head_dim, 128>(params, blocks, plan);
    }
  }
  if constexpr (head_dim == 192) {
    if (params.head_dim_v <= 128) {
      return launch_attention_tile<T, head_dim, 128, 64>(params, blocks, plan);
    }
  }
  launch_attention_tile<T, head_dim, head_dim, 64>(params, blocks, plan);
}

template <class T, int head_dim>
int64_t attention_shared_bytes() {
  return AttentionShared < head_dim, head_dim, head_dim <= 128 ? 128 : 64 > ::kBytes;
}

}  // namespace longctx::cuda
