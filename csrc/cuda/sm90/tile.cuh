// The shapes of the Hopper kernel, and what a block keeps in shared memory.
#pragma once
#include "cuda/items.cuh"
#include "cuda/visit.cuh"
#include "device/hopper.cuh"

namespace longctx::cuda::sm90 {

constexpr int kPanelColumns = device::kPanelBytes / 2;  // of 16-bit elements

template <int kHeadDim>
struct Tile {
  static constexpr int kRows = 128;                        // (row, head) pairs of an item
  static constexpr int kKeys = kHeadDim > 128 ? 64 : 128;  // of a tile
  static constexpr int kStages = kHeadDim < 128 ? 4 : 2;   // tiles of K and of V under way
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kRowPanelBytes = kRows * device::kPanelBytes;
  static constexpr int kKeyPanelBytes = kKeys * device::kPanelBytes;
  // The producer walks one tile ahead of what it has room for, and a tile's positions are read
  // until its V is: see the timetable.
  static constexpr int kTiles = kStages + 2;
  static constexpr int kConsumerRows = 64;  // of a warpgroup
  static constexpr int kConsumers = kRows / kConsumerRows;
  // The consumers issue their products in turns, so that one's softmax runs beside the other's
  // products. Larger head_dims have so little softmax that they need not.
  static constexpr bool kTurns = kHeadDim <= 128;
  static constexpr int kThreads = (1 + kConsumers) * device::kWarpgroupSize;
  // Registers of a thread: at the launch, then of the producer's warpgroup and of each consumer's.
  // A consumer waits until the block has what it asks for, so that a sum above what the launch
  // brought would be waited for forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * kLaunchRegisters);
};

template <int kHeadDim>
struct alignas(device::kSwizzleBytes) SharedMemory {
  using Shape = Tile<kHeadDim>;
  char q[Shape::kPanels][Shape::kRowPanelBytes];                  // [rows, 64] each
  char k[Shape::kStages][Shape::kPanels][Shape::kKeyPanelBytes];  // [keys, 64] each
  char v[Shape::kStages][Shape::kPanels][Shape::kKeyPanelBytes];  // [keys, 64] each
  uint64_t q_full;
  uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  uint64_t turn[Shape::kConsumers];
  struct alignas(16) Keys : KeyTile<Shape::kKeys> {};  // positions are read in pairs
  Keys tiles[Shape::kTiles];
  ItemMask<Shape::kRows> mask;
  Item item;
  int32_t consumers;  // warpgroups that have rows
};

// A place in a ring of stages, and the parity of the phase that ends when its tile is there.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  LONGCTX_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace longctx::cuda::sm90
