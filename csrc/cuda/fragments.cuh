// Where the lanes of a warp find the operands of tensor-core products in tiles of shared memory,
// and what they hold of the results.
#pragma once
#include "cuda/tile_copy.cuh"
#include "device/mma.cuh"

namespace longctx::cuda {

// Row of the warp's tile that the lane holds in `half` of row tile m.
LONGCTX_DEVICE int own_row(int m, int half) { return 16 * m + 8 * half + device::lane_index() / 4; }
// Column of the first of two elements that the lane holds in column tile n.
LONGCTX_DEVICE int own_column(int n) { return 8 * n + 2 * (device::lane_index() % 4); }

LONGCTX_DEVICE float quad_max(float x) {
  x = fmaxf(x, device::shuffle_xor(x, 1));
  return fmaxf(x, device::shuffle_xor(x, 2));
}
LONGCTX_DEVICE float quad_sum(float x) {
  x += device::shuffle_xor(x, 1);
  return x + device::shuffle_xor(x, 2);
}

// Where a lane finds its rows of 16 x 16 blocks in tiles with kCols columns.
template <int kCols>
class MatrixLane {
 public:
  // Offsets count from `base`, a multiple of 128 bytes before the tiles. The four matrices of a
  // block go down its left half, then its right; or, if not `down`, along its upper half, then its
  // lower.
  LONGCTX_DEVICE MatrixLane(const char* base, bool down) : base_(base) {
    const int lane = device::lane_index();
    const int row = down ? lane % 16 : lane / 16 * 8 + lane % 8;
    first_ = device::opaque(TileRows<kCols>::offset(row, down ? lane / 16 : lane / 8 % 2));
  }
  // The block at row `row`, a multiple of 8, and column 16 * step of the tile at `offset`.
  LONGCTX_DEVICE const char* at(int offset, int row, int step) const {
    // The chunk's lowest bit is the lane's own, so that an xor moves it within its 128 bytes.
    return base_ + (first_ ^ step % 4 * 32) + offset + step / 4 * 128 +
           row * TileRows<kCols>::kRowBytes;
  }

 private:
  const char* base_;
  int first_;
};

}  // namespace longctx::cuda
