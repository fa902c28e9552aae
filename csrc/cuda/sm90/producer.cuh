// The producer of the Hopper kernel: one warp that walks over the keys of an item and copies Q, K
// and V to shared memory. What it waits for, and why, is at the head of attention.cuh.
#pragma once
#include "cuda/online_softmax.cuh"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tile.cuh"

namespace longctx::cuda::sm90 {

// What a launch hands to the kernel.
struct AttentionMaps {
  TensorMap q, k, v;
};
struct AttentionTask {
  AttentionParams p;
  BlockList blocks;  // block_indptr null: dense
  ItemGrid grid;
  ScoreScale scale;
  AttentionPartials partials;
  int box_keys;  // neighbouring keys that one copy brings

  LONGCTX_DEVICE const BlockList* block_list() const {
    return blocks.block_indptr == nullptr ? nullptr : &blocks;
  }
};

template <int kHeadDim>
LONGCTX_DEVICE void load_queries(SharedMemory<kHeadDim>& shared, const AttentionMaps& maps,
                                 const AttentionTask& task, const Item& item) {
  using Shape = Tile<kHeadDim>;
  const int rows = static_cast<int>(task.grid.block_rows);
  const int first_row = static_cast<int>(item.seq.q_begin + item.row_begin);
  device::mbarrier_arrive_expect(&shared.q_full,
                                 item.num_heads * rows * Shape::kPanels * device::kPanelBytes);
#pragma unroll 1
  for (int head = 0; head < item.num_heads; ++head) {
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      device::load_box(shared.q[panel] + head * rows * device::kPanelBytes, &maps.q, &shared.q_full,
                       panel * kPanelColumns, first_row, static_cast<int>(item.first_head) + head,
                       static_cast<int>(item.seq.batch_index));
    }
  }
}

// A tile of K or V, in boxes of neighbouring keys.
template <int kHeadDim>
LONGCTX_DEVICE void load_tile(
    char (&stage)[Tile<kHeadDim>::kPanels][Tile<kHeadDim>::kKeyPanelBytes], const TensorMap* map,
    uint64_t* full, int box_keys, const KeyTile<Tile<kHeadDim>::kKeys>& tile, const Item& item) {
  using Shape = Tile<kHeadDim>;
  device::mbarrier_arrive_expect(full, Shape::kPanels * Shape::kKeyPanelBytes);
  for (int slot = 0; slot < Shape::kKeys; slot += box_keys) {
    const int32_t position = tile.positions[slot];
    const int row = static_cast<int>(item.seq.k_begin) + (position < 0 ? ~position : position);
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      device::load_box(stage[panel] + slot * device::kPanelBytes, map, full, panel * kPanelColumns,
                       row, static_cast<int>(item.kv_head), static_cast<int>(item.seq.batch_index));
    }
  }
}

template <int kHeadDim>
LONGCTX_DEVICE void produce(SharedMemory<kHeadDim>& shared, const AttentionMaps& maps,
                            const AttentionTask& task) {
  using Shape = Tile<kHeadDim>;
  const Item& item = shared.item;
  const bool elected = device::elect_one();
  // load q tile
  if (elected) load_queries(shared, maps, task, item);
  shared.mask.init_extents();
  BlockRow row;
  if (task.block_list() != nullptr) {
    const int64_t head = pattern_head(task.blocks, item.first_head, task.p.num_q_heads);
    row = block_row(task.blocks, item.seq.batch_index, head, item.list_row);
  }
  KeyTiles<Shape::kKeys, Shape::kRows> tiles(shared.mask);
  tiles.begin(task.block_list(), row, item, task.grid.num_splits);
  // for each key block of the row
  Place<Shape::kStages> at;
  Place<Shape::kTiles> walk;
  for (bool more = true; more; at.advance(), walk.advance()) {
    KeyTile<Shape::kKeys>& tile = shared.tiles[walk.stage];
    tiles.next(tile);
    device::sync_warp();
    more = tile.exists();
    // The other lanes do not touch what the consumers have freed before this one has waited.
    if (elected) {
      device::mbarrier_wait(&shared.k_empty[at.stage], at.parity ^ 1);
      if (more) {
        load_tile<kHeadDim>(shared.k[at.stage], &maps.k, &shared.k_full[at.stage], task.box_keys,
                            tile, item);
        device::mbarrier_wait(&shared.v_empty[at.stage], at.parity ^ 1);
        load_tile<kHeadDim>(shared.v[at.stage], &maps.v, &shared.v_full[at.stage], task.box_keys,
                            tile, item);
      } else {
        device::mbarrier_arrive(&shared.k_full[at.stage]);
      }
    }
    device::sync_warp();
  }
}

}  // namespace longctx::cuda::sm90
