// attention and block_sparse_attention in float32, with plain products out of shared memory: the
// steps of attention.cuh without tensor cores, which round their operands. K and V take turns in
// one buffer.
// Sixteen threads share four rows; in each they hold two keys of s and every sixteenth group of
// four columns of out.
#pragma once
#include "cuda/attention_fp32.h"
#include "cuda/fp32_rows.cuh"
#include "cuda/online_softmax.cuh"
#include "cuda/runtime.h"

namespace longctx::cuda::fp32 {

constexpr int kTileRows = 32, kTileKeys = 32;
constexpr int kRowThreads = 16;                               // of a row
constexpr int kOwnRows = kTileRows * kRowThreads / kThreads;  // of a thread
constexpr int kOwnKeys = kTileKeys / kRowThreads;
constexpr int kSlice = kRowThreads * kChunk;

struct Launch {
  BlockList blocks;  // block_indptr null: dense
  ItemGrid grid;
  float softmax_scale = 1;
  float softcap = 0;  // 0: none
  SourceRows q, k, v;
  AttentionPartials partials;
};

template <int kHeadDim>
struct Shared {
  using Mask = ItemMask<kTileRows>;
  using Keys = KeyTile<kTileKeys>;
  static constexpr int kStride = kHeadDim + kPad;  // elements
  static constexpr int kKeyStride = kTileKeys + kPad;
  static constexpr int kQ = 0;                                   // [kTileRows, kHeadDim]
  static constexpr int kKeyRows = kTileRows * kStride * 4;       // [kTileKeys, kHeadDim]: K, then V
  static constexpr int kP = kKeyRows + kTileKeys * kStride * 4;  // [kTileRows, kTileKeys]
  static constexpr int kMask = kP + kTileRows * kKeyStride * 4;
  static constexpr int kKeys = kMask + sizeof(Mask);  // [2]
  static constexpr int kBytes = kKeys + 2 * sizeof(Keys);
  static_assert(kBytes <= 99 * 1024);

  char* base = device::shared_memory();
  LONGCTX_DEVICE float* q(int row) const { return at(kQ) + row * kStride; }
  LONGCTX_DEVICE float* key(int slot) const { return at(kKeyRows) + slot * kStride; }
  LONGCTX_DEVICE float* p(int row) const { return at(kP) + row * kKeyStride; }
  LONGCTX_DEVICE Mask& mask() const { return *reinterpret_cast<Mask*>(base + kMask); }
  LONGCTX_DEVICE Keys& keys(int parity) const {
    return reinterpret_cast<Keys*>(base + kKeys)[parity];
  }

 private:
  LONGCTX_DEVICE float* at(int offset) const { return reinterpret_cast<float*>(base + offset); }
};

LONGCTX_DEVICE float row_max(float x) {
  for (int mask = kRowThreads / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, device::shuffle_xor(x, mask));
  }
  return x;
}
LONGCTX_DEVICE float row_sum(float x) {
  for (int mask = kRowThreads / 2; mask > 0; mask /= 2) x += device::shuffle_xor(x, mask);
  return x;
}

template <int kHeadDim>
LONGCTX_KERNEL(kThreads, 1)
attention_kernel(const LONGCTX_GRID_CONSTANT AttentionParams p,
                 const LONGCTX_GRID_CONSTANT Launch launch) {
  constexpr int kSlices = kHeadDim / kSlice;
  const Shared<kHeadDim> shared;
  const BlockList* blocks = launch.blocks.block_indptr == nullptr ? nullptr : &launch.blocks;
  const Item item = item_at(p, blocks, launch.grid, device::block_index());
  if (item.num_rows == 0) return;
  const bool walks = device::warp_index() == kThreads / device::kWarpSize - 1;
  const int lane = device::thread_index() % kRowThreads;
  const int first_row = device::thread_index() / kRowThreads * kOwnRows;

  // load q tile
  copy_rows<kHeadDim>(shared.q(0), kTileRows, launch.q, [&](int pair) -> const float* {
    if (pair >= item.num_pairs()) return nullptr;
    return row_address<float>(p.q, item, item.head(pair), item.seq.q_begin + item.row(pair));
  });
  const float* k_rows = row_address<float>(p.k, item, item.kv_head, item.seq.k_begin);
  const float* v_rows = row_address<float>(p.v, item, item.kv_head, item.seq.k_begin);

  shared.mask().init_rows(p.mask, item);
  device::sync_threads();
  KeyTiles<kTileKeys, kTileRows> tiles(shared.mask());
  if (walks) {
    shared.mask().init_extents();
    tiles.begin(blocks, item_block_row(p, blocks, item), item, launch.grid.num_splits);
    tiles.next(shared.keys(0));
  }
  device::sync_threads();

  float reference[kOwnRows], sum[kOwnRows];
  float acc[kOwnRows][kSlices][kChunk];
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    reference[r] = -INFINITY;
    sum[r] = 0;
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) acc[r][j][e] = 0;
    }
  }

  // for each key block of the row
  for (int parity = 0; shared.keys(parity).exists(); parity ^= 1) {
    const auto& keys = shared.keys(parity);
    const auto key_rows = [&keys](const float* first, int64_t stride) {
      return [&keys, first, stride](int slot) {
        const int32_t position = keys.positions[slot];
        return position < 0 ? nullptr : first + position * stride;
      };
    };
    copy_rows<kHeadDim>(shared.key(0), kTileKeys, launch.k, key_rows(k_rows, p.k.seq_stride));
    device::wait_copies<0>();
    device::sync_threads();

    // s = q k^T
    float s[kOwnRows][kOwnKeys] = {};
    for (int slice = 0; slice < p.head_dim; slice += kSlice) {
      // Summed apart: no chain of additions is long enough to lose a digit.
      float part[kOwnRows][kOwnKeys] = {};
#pragma unroll 4
      for (int d = slice; d < slice + kSlice; d += kChunk) {
        Four k[kOwnKeys];
#pragma unroll
        for (int n = 0; n < kOwnKeys; ++n) k[n] = load_four(shared.key(lane + n * kRowThreads) + d);
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const Four q = load_four(shared.q(first_row + r) + d);
#pragma unroll
          for (int n = 0; n < kOwnKeys; ++n) {
#pragma unroll
            for (int e = 0; e < kChunk; ++e) part[r][n] = fmaf(q.x[e], k[n].x[e], part[r][n]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
        for (int n = 0; n < kOwnKeys; ++n) s[r][n] += part[r][n];
      }
    }

    // mask
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const RowMask32 mask = shared.mask().rows[(first_row + r) % item.num_rows];
#pragma unroll
      for (int n = 0; n < kOwnKeys; ++n) {
        s[r][n] *= launch.softmax_scale;
        if (launch.softcap > 0) s[r][n] = launch.softcap * tanhf(s[r][n] / launch.softcap);
        const int32_t position = keys.positions[lane + n * kRowThreads];
        if (keys.partial() && !mask.visible(position)) s[r][n] = -INFINITY;
      }
    }

    // softmax update
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float raised = fmaxf(reference[r], row_max(fmaxf(s[r][0], s[r][1])));
      const float factor = expf(reference[r] - finite(raised));
      reference[r] = raised;
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < kOwnKeys; ++n) {
        const float weight = expf(s[r][n] - finite(raised));
        shared.p(first_row + r)[lane + n * kRowThreads] = weight;
        tile_sum += weight;
      }
      sum[r] = fmaf(sum[r], factor, tile_sum);
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) acc[r][j][e] *= factor;
      }
    }
    device::sync_threads();  // every warp has read K

    copy_rows<kHeadDim>(shared.key(0), kTileKeys, launch.v, key_rows(v_rows, p.v.seq_stride));
    if (walks) tiles.next(shared.keys(parity ^ 1));
    device::wait_copies<0>();
    device::sync_threads();

    // acc += p v
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (j * kSlice >= p.head_dim_v) continue;
      float part[kOwnRows][kChunk] = {};
#pragma unroll 2
      for (int slot = 0; slot < kTileKeys; slot += kChunk) {
        Four weights[kOwnRows];
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) weights[r] = load_four(shared.p(first_row + r) + slot);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const Four v = load_four(shared.key(slot + i) + j * kSlice + lane * kChunk);
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
            for (int e = 0; e < kChunk; ++e) {
              part[r][e] = fmaf(weights[r].x[i], v.x[e], part[r][e]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) acc[r][j][e] += part[r][e];
      }
    }
    device::sync_threads();  // every warp has read V
  }
  device::wait_copies<0>();

  // write out, lse
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    const int pair = first_row + r;
    const float total = row_sum(sum[r]);
    if (pair >= item.num_pairs()) continue;
    const bool split = launch.partials.out != nullptr;
    const float sink = p.sinks != nullptr && !split ? p.sinks[item.head(pair)] : -INFINITY;
    const RowResult result = finish_row(reference[r], total, sink);
    const int64_t state = state_index(p, item, pair);
    float* lse = split ? launch.partials.lse : static_cast<float*>(p.lse);
    float* out =
        row_address<float>(p.out, item, item.head(pair), item.seq.q_begin + item.row(pair));
    if (split) out = launch.partials.out + state * p.head_dim_v;
    if (lane == 0) lse[state] = result.lse;
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const int column = j * kSlice + lane * kChunk + e;
        if (column < p.head_dim_v) out[column] = acc[r][j][e] * result.factor;
      }
    }
  }
}

}  // namespace longctx::cuda::fp32

namespace longctx::cuda {

template <class T, int head_dim>
void launch_attention_fp32(const AttentionParams& params, const BlockList* blocks,
                           const AttentionPlan& plan) {
  fp32::Launch launch_params;
  if (blocks != nullptr) launch_params.blocks = *blocks;
  launch_params.grid = plan.grid;
  launch_params.softmax_scale = static_cast<float>(params.softmax_scale);
  launch_params.softcap = static_cast<float>(params.softcap);
  launch_params.q = source_rows(params.q, params.head_dim, fp32::kChunk);
  launch_params.k = source_rows(params.k, params.head_dim, fp32::kChunk);
  launch_params.v = source_rows(params.v, params.head_dim_v, fp32::kChunk);
  launch_params.partials = plan.partials;
  launch(plan.op, &fp32::attention_kernel<head_dim>,
         dim3(static_cast<unsigned>(num_items(params, blocks, plan.grid))), fp32::kThreads,
         fp32::Shared<head_dim>::kBytes, params, launch_params);
}

template <class T, int head_dim>
int64_t attention_fp32_shared_bytes() {
  return fp32::Shared<head_dim>::kBytes;
}

}  // namespace longctx::cuda
