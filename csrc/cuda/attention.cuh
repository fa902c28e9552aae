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
//   Before A 0 lie the row masks (a barrier), then table 0 (a barrier), then K 0.
#pragma once
#include "cuda/attention.h"
#include "cuda/online_softmax.cuh"
#include "cuda/runtime.h"
#include "cuda/tile_copy.cuh"

namespace longctx::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * device::kWarpSize;
constexpr int kTileKeys = 64;

// What a launch hands to the kernel beside the params.
struct AttentionLaunch {
  BlockList blocks;  // block_indptr null: dense
  ItemGrid grid;
  ScoreScale scale;
  SourceRows q, k, v, out;
  AttentionPartials partials;
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
  static constexpr int kKeys = kMask + sizeof(Mask);  // [2]
  static constexpr int kBytes = kKeys + 2 * sizeof(Keys);
  static_assert(kBytes <= 99 * 1024 && kHeadDimV <= kHeadDim);

  char* base = device::shared_memory();
  LONGCTX_DEVICE char* q(int row) const { return base + kQ + row * TileRows<kHeadDim>::kRowBytes; }
  LONGCTX_DEVICE char* out(int row) const { return q(row); }
  LONGCTX_DEVICE char* k() const { return base + kK; }
  LONGCTX_DEVICE char* v() const { return base + kV; }
  LONGCTX_DEVICE Mask& mask() const { return *reinterpret_cast<Mask*>(base + kMask); }
  LONGCTX_DEVICE Keys& keys(int parity) const {
    return reinterpret_cast<Keys*>(base + kKeys)[parity];
  }
};

// Where a lane finds its matrix rows of 16 x 16 blocks of a tile: matrices 0 and 1 hold rows 0 to
// 15 of the left half if `down`, else the upper half's left and right.
template <int kCols>
class MatrixLane {
 public:
  LONGCTX_DEVICE MatrixLane(const char* tile, bool down) {
    const int lane = device::lane_index();
    const int row = down ? lane % 16 : lane / 16 * 8 + lane % 8;
    first_ = tile + TileRows<kCols>::offset(row, down ? lane / 16 : lane / 8 % 2);
  }
  // Row `row` (a multiple of 8) and columns 16 * step of the tile are the block's first.
  LONGCTX_DEVICE const char* at(int row, int step) const {
    // The chunk's lowest bit is the lane's own, so that an xor moves it within a panel.
    const auto moved = reinterpret_cast<uintptr_t>(first_) ^ static_cast<uintptr_t>(step % 4 * 32);
    return reinterpret_cast<const char*>(moved) + step / 4 * 128 + row * TileRows<kCols>::kRowBytes;
  }

 private:
  const char* first_;
};

// s += q k^T. Q: the warp's rows.
template <class T, int kHeadDim, int kRowTiles>
LONGCTX_DEVICE void multiply_scores(const char* q, const char* k,
                                    float (&s)[kRowTiles][kTileKeys / 8][4]) {
  const MatrixLane<kHeadDim> q_lane(q, true), k_lane(k, false);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) device::load_matrices(a[m], q_lane.at(16 * m, step));
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; n += 2) {
      uint32_t b[4];
      device::load_matrices(b, k_lane.at(8 * n, step));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        device::multiply_add(T(), s[m][n], a[m], b[0], b[1]);
        device::multiply_add(T(), s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += p v. The accumulators of s are, packed in pairs, the left operand of the next product.
template <class T, int kHeadDimV, int kRowTiles>
LONGCTX_DEVICE void add_values(const float (&p)[kRowTiles][kTileKeys / 8][4], const char* v,
                               float (&acc)[kRowTiles][kHeadDimV / 8][4]) {
  const MatrixLane<kHeadDimV> v_lane(v, true);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[m][2 * step + i / 2][i % 2 * 2];
        a[m][i] = device::pack_pair(T(), pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDimV / 8; n += 2) {
      uint32_t b[4];
      device::load_matrices_transposed(b, v_lane.at(16 * step, n / 2));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        device::multiply_add(T(), acc[m][n], a[m], b[0], b[1]);
        device::multiply_add(T(), acc[m][n + 1], a[m], b[2], b[3]);
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
LONGCTX_KERNEL(kAttentionThreads, 2)
attention_kernel(const AttentionParams p, const AttentionLaunch launch) {
  constexpr int kWarpRows = kTileRows / kAttentionWarps, kRowTiles = kWarpRows / 16;
  const AttentionShared<kHeadDim, kHeadDimV, kTileRows> shared;
  const BlockList* blocks = launch.blocks.block_indptr == nullptr ? nullptr : &launch.blocks;
  const Item item = item_at(p, blocks, launch.grid, device::block_index());
  if (item.num_rows == 0) return;
  const int warp = device::warp_index(), first_row = warp * kWarpRows;
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
  const uint16_t* k_rows = row_address<uint16_t>(p.k, item, item.kv_head, item.seq.k_begin);
  const uint16_t* v_rows = row_address<uint16_t>(p.v, item, item.kv_head, item.seq.k_begin);

  shared.mask().init_rows(p.mask, item);
  device::sync_threads();
  KeyTiles<kTileKeys, kTileRows> tiles(shared.mask());
  if (walks) {
    shared.mask().init_extents();
    tiles.begin(blocks, item_block_row(p, blocks, item), item, launch.grid.num_splits);
    tiles.next(shared.keys(0));
  }
  device::sync_threads();
  if (shared.keys(0).exists()) {
    copy_keys<kHeadDim, kAttentionThreads>(shared.k(), shared.keys(0), k_rows, p.k.seq_stride,
                                           launch.k);
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
  for (int parity = 0; shared.keys(parity).exists(); parity ^= 1) {
    const auto& keys = shared.keys(parity);
    device::wait_copies<0>();
    device::sync_threads();  // A
    copy_keys<kHeadDimV, kAttentionThreads>(shared.v(), keys, v_rows, p.v.seq_stride, launch.v);
    device::commit_copies();
    if (walks) tiles.next(shared.keys(parity ^ 1));

    float s[kRowTiles][kTileKeys / 8][4];
    if (has_rows) {
      // s = q k^T
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
        }
      }
      multiply_scores<T, kHeadDim>(shared.q(first_row), shared.k(), s);
      // mask
      float factor = launch.scale.scale_log2;
      if (keys.partial() || !launch.scale.monotone()) {
        adjust_scores(launch.scale, keys, shared.mask(), first_row, s);
        factor = 1;
      }
      // softmax update
      update_softmax(factor, s, states, acc);
    }
    device::wait_copies<0>();
    device::sync_threads();  // B
    if (shared.keys(parity ^ 1).exists()) {
      copy_keys<kHeadDim, kAttentionThreads>(shared.k(), shared.keys(parity ^ 1), k_rows,
                                             p.k.seq_stride, launch.k);
    }
    device::commit_copies();
    // acc += p v
    if (has_rows) add_values<T, kHeadDimV>(s, shared.v(), acc);
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
