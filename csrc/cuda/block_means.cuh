// The mean of every block of rows of a tensor, read once: a warp a block, 16 bytes a lane.
#pragma once
#include "cuda/score_tile.cuh"
#include "cuda/slots.cuh"

namespace longctx::cuda {

constexpr int kMeansWarps = 4;
constexpr int kMeansThreads = kMeansWarps * device::kWarpSize;

// Of q: [batch, heads, num_q_blocks, row_stride], by rows of the map. Of k: [batch, heads, slots,
// row_stride], by slots of key blocks.
struct MeansGrid {
  TensorView tensor;
  bool of_q = false;
  bool aligned = false;
  int64_t heads = 0;
  int64_t slots = 0;       // of blocks
  int64_t num_means = 0;   // of a head
  int64_t row_stride = 0;  // elements, a multiple of 16 bytes
};

// The rows of a block, and where its mean belongs.
struct BlockRows {
  Sequence seq;
  int64_t first = 0;  // on the axis
  int64_t count = 0;
  int64_t mean = 0;
};

LONGCTX_DEVICE BlockRows block_rows(const BlockMapParams& map, const MeansGrid& grid,
                                    int64_t batch_index, int64_t slot) {
  BlockRows rows;
  if (grid.of_q) {
    const MapPiece piece = map_piece_at(map, batch_index, slot, 1);
    rows.seq = piece.map.seq;
    const int64_t begin = piece.row * map.block_size_q;
    rows.first = rows.seq.q_begin + begin;
    rows.count = clamp_index(rows.seq.q_len - begin, 0, map.block_size_q);
    rows.mean = piece.map.first_row + piece.row;
    return rows;
  }
  const Piece piece = piece_at(map.seqs, batch_index, slot, map.block_size_k,
                               [](const Sequence& seq) { return key_span(seq); });
  if (piece.sequence < 0) return rows;
  rows.seq = sequence_at(map.seqs, piece.sequence);
  const int64_t begin = piece.number * map.block_size_k;
  rows.first = rows.seq.k_begin + begin;
  rows.count = clamp_index(rows.seq.k_len - begin, 0, map.block_size_k);
  rows.mean = slot;
  return rows;
}

template <class T>
struct alignas(16) Chunk {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  T x[kElements];
};

// sums += the elements of rows row, row + row_step, ... below num_rows, `count` of each; 16 bytes
// at a time if they are whole and aligned.
template <class T>
LONGCTX_DEVICE void add_rows(const T* from, int64_t stride, int64_t row, int64_t num_rows,
                             int64_t row_step, int64_t count, bool aligned,
                             float (&sums)[Chunk<T>::kElements]) {
  if (aligned && count >= Chunk<T>::kElements) {
#pragma unroll 4
    for (; row < num_rows; row += row_step) {
      const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from + row * stride);
#pragma unroll
      for (int e = 0; e < Chunk<T>::kElements; ++e) sums[e] += device::widen(chunk.x[e]);
    }
    return;
  }
  for (; row < num_rows; row += row_step) {
#pragma unroll
    for (int e = 0; e < Chunk<T>::kElements; ++e) {
      if (e < count) sums[e] += device::widen(from[row * stride + e]);
    }
  }
}

template <class T, class Mean>
LONGCTX_KERNEL(kMeansThreads, 4)
block_means_kernel(const BlockScoresParams p, const MeansGrid grid, Mean* means) {
  constexpr int kElements = Chunk<T>::kElements;
  const int64_t index = device::block_index() * kMeansWarps + device::warp_index();
  const int64_t map = index / grid.slots;
  if (map >= p.map.seqs.batch * grid.heads) return;
  const BlockRows rows = block_rows(p.map, grid, map / grid.heads, index % grid.slots);
  if (rows.count == 0) return;
  const T* first = static_cast<const T*>(grid.tensor.data) +
                   rows.seq.batch_index * grid.tensor.batch_stride +
                   map % grid.heads * grid.tensor.head_stride + rows.first * grid.tensor.seq_stride;
  Mean* mean = means + (map * grid.num_means + rows.mean) * grid.row_stride;

  // A row takes the fewest lanes that reach its end, so that the warp reads several rows at a time.
  int row_lanes = device::kWarpSize;
  while (row_lanes > 1 && row_lanes / 2 * kElements >= p.head_dim) row_lanes /= 2;
  const int lane = device::lane_index();
  for (int64_t column = 0; column < p.head_dim; column += row_lanes * kElements) {
    const int64_t d = column + lane % row_lanes * kElements;
    float sums[kElements] = {};
    if (d < p.head_dim) {
      add_rows(first + d, grid.tensor.seq_stride, lane / row_lanes, rows.count,
               device::kWarpSize / row_lanes, p.head_dim - d, grid.aligned, sums);
    }
    for (int mask = row_lanes; mask < device::kWarpSize; mask *= 2) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] += device::shuffle_xor(sums[e], mask);
    }
    if (lane >= row_lanes) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (d + e < p.head_dim) device::narrow(sums[e] / static_cast<float>(rows.count), mean[d + e]);
    }
  }
}

}  // namespace longctx::cuda
