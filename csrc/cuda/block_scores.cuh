// Block scores from means: q and k are read once and averaged per block; the products of the means
// cost 1 / (block_size_q * block_size_k) of q k^T, or 1 / block_size_k with full queries.
//
// Floor, per head: q and k once (k once a group of heads for kMean), 12 bytes a score with softmax
// (write, read, write; 4 without, and 4 to fill what nobody sees); 2 * head_dim FLOPs a product.
// At blocks of 128 and 128k keys of head_dim 128 that is 64 MB, 12 MB and 0.27 GFLOP: memory limits
// kMean; kMaxMean has 128 times the FLOPs, on tensor cores.
#pragma once
#include "cuda/block_means.cuh"

namespace longctx::cuda {

constexpr int kScoreColumns = 64;  // of a tile of the map
constexpr int kScoreThreads = ScoreTile<float, kScoreColumns>::kThreads;
constexpr int kMaximaStride = kScoreColumns + 1;

struct ScoresGrid {
  const void* q_means = nullptr;  // [batch, num_q_heads, num_q_blocks, row_stride]; kMean only
  const void* k_means = nullptr;  // [batch, num_kv_heads, k_slots, row_stride]
  int64_t k_slots = 0;
  int64_t row_stride = 0;  // elements
  int64_t tile_rows = 0;   // rows of the map in a tile
  int64_t row_slots = 0;   // tiles of rows of a head
  int64_t column_tiles = 0;
  bool q_aligned = false;  // of full queries
};

// A tile of the map of one head.
struct MapTile {
  MapPiece piece;
  int64_t batch_index = 0;
  int64_t head = 0;
  int64_t column = 0;    // the first
  int64_t num_rows = 0;  // 0: nothing to do

  LONGCTX_DEVICE MapTile(const BlockScoresParams& p, const ScoresGrid& grid) {
    int64_t index = device::block_index();
    column = index % grid.column_tiles * kScoreColumns;
    index /= grid.column_tiles;
    const int64_t slot = index % grid.row_slots;
    index /= grid.row_slots;
    head = index % p.num_q_heads;
    batch_index = index / p.num_q_heads;
    piece = map_piece_at(p.map, batch_index, slot, grid.tile_rows);
    if (piece.sequence < 0) return;
    num_rows = clamp_index(piece.map.num_rows - piece.row, 0, grid.tile_rows);
    if (num_rows > 0 && piece.map.num_visible(p.map, piece.row + num_rows - 1) <= column) {
      num_rows = 0;
    }
  }

  // Row `i` of the tile.
  LONGCTX_DEVICE float* scores(const BlockScoresParams& p, int64_t i) const {
    const int64_t row = piece.map.first_row + piece.row + i;
    return p.scores +
           ((batch_index * p.num_q_heads + head) * p.map.num_q_blocks + row) * p.map.num_k_blocks;
  }

  // The mean of key block `column + i`, or null where there is none.
  template <class T>
  LONGCTX_DEVICE const char* k_mean(const BlockScoresParams& p, const ScoresGrid& grid,
                                    int i) const {
    if (column + i >= piece.map.num_columns) return nullptr;
    const int64_t kv_head = head * p.num_kv_heads / p.num_q_heads;
    const int64_t slot =
        first_slot(p.map.seqs, piece.map.seq.k_begin, p.map.block_size_k, piece.sequence) + column +
        i;
    const T* means = static_cast<const T*>(grid.k_means);
    return reinterpret_cast<const char*>(
        means + ((batch_index * p.num_kv_heads + kv_head) * grid.k_slots + slot) * grid.row_stride);
  }
};

// Rows of the map, one mean a row of the tile.
LONGCTX_KERNEL(kScoreThreads, 2)
mean_scores_kernel(const BlockScoresParams p, const ScoresGrid grid) {
  const MapTile tile(p, grid);
  if (tile.num_rows == 0) return;
  char* shared = device::shared_memory();
  int32_t* visible = reinterpret_cast<int32_t*>(shared + tile_shared_bytes<kScoreColumns>());
  for (int i = device::thread_index(); i < kTileRows; i += kScoreThreads) {
    const int64_t end =
        i < tile.num_rows ? tile.piece.map.num_visible(p.map, tile.piece.row + i) : 0;
    visible[i] = static_cast<int32_t>(clamp_index(end - tile.column, 0, kScoreColumns));
  }
  const float* q_means = static_cast<const float*>(grid.q_means);
  const int64_t first_mean = (tile.batch_index * p.num_q_heads + tile.head) * p.map.num_q_blocks +
                             tile.piece.map.first_row + tile.piece.row;
  const auto q_row_at = [&](int i, int) {
    return i < tile.num_rows
               ? reinterpret_cast<const char*>(q_means + (first_mean + i) * grid.row_stride)
               : nullptr;
  };
  const auto k_row_at = [&](int i, int) { return tile.k_mean<float>(p, grid, i); };
  ScoreTile<float, kScoreColumns> scores;
  multiply_rows(scores, shared, 1, static_cast<int>(p.head_dim * sizeof(float)), q_row_at, true,
                k_row_at, true);
  const float scale = static_cast<float>(p.softmax_scale);
  scores.for_each([&](int row, int column, float s) {
    if (column < visible[row]) tile.scores(p, row)[tile.column + column] = s * scale;
  });
}

// Rows of the map: the maximum over their queries, a query a row of the tile.
template <class T>
LONGCTX_KERNEL(kScoreThreads, 2)
max_scores_kernel(const BlockScoresParams p, const ScoresGrid grid) {
  const MapTile tile(p, grid);
  if (tile.num_rows == 0) return;
  char* shared = device::shared_memory();
  int32_t* visible = reinterpret_cast<int32_t*>(shared + tile_shared_bytes<kScoreColumns>());
  const SequenceMap& map = tile.piece.map;
  const int64_t first = tile.piece.row * p.map.block_size_q;
  const int64_t num_queries = clamp_index(map.seq.q_len - first, 0, kTileRows);
  for (int i = device::thread_index(); i < kTileRows; i += kScoreThreads) {  // mask
    int64_t end = i < num_queries ? map.num_columns : 0;
    if (p.map.causal && i < num_queries) {
      const int64_t position = map.first_position + first + i;
      end = position < 0 ? 0 : position / p.map.block_size_k + 1;
    }
    visible[i] = static_cast<int32_t>(clamp_index(end - tile.column, 0, kScoreColumns));
  }
  const HeadRows q = head_rows<T>(p.q, tile.batch_index, tile.head, map.seq.q_begin + first);
  const auto q_row_at = [&](int i, int) { return i < num_queries ? q.row(i) : nullptr; };
  const auto k_row_at = [&](int i, int) { return tile.k_mean<T>(p, grid, i); };
  ScoreTile<T, kScoreColumns> scores;
  multiply_rows(scores, shared, 1, static_cast<int>(p.head_dim * sizeof(T)), q_row_at,
                grid.q_aligned, k_row_at, true);
  const float scale = static_cast<float>(p.softmax_scale);
  float* s_rows = reinterpret_cast<float*>(shared);  // [kTileRows][kMaximaStride]
  scores.for_each([&](int row, int column, float s) {
    s_rows[row * kMaximaStride + column] = column < visible[row] ? s * scale : -INFINITY;
  });
  device::sync_threads();
  const int block_size = static_cast<int>(p.map.block_size_q);
  for (int i = device::thread_index(); i < tile.num_rows * kScoreColumns; i += kScoreThreads) {
    const int row = i / kScoreColumns, column = i % kScoreColumns;
    if (tile.column + column >= map.num_visible(p.map, tile.piece.row + row)) continue;
    float top = -INFINITY;
    for (int query = row * block_size; query < (row + 1) * block_size; ++query) {
      const float s = s_rows[query * kMaximaStride + column];
      top = s > top ? s : top;
    }
    tile.scores(p, row)[tile.column + column] = top;
  }
}

// What combine() makes of all threads' values, in a fixed order. `partial` is [warps].
template <class Combine>
LONGCTX_DEVICE float reduce_block(float value, float* partial, const Combine& combine) {
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    value = combine(value, device::shuffle_xor(value, mask));
  }
  const int warp = device::warp_index();
  device::sync_threads();  // nobody still reads the last result
  if (device::lane_index() == 0) partial[warp] = value;
  device::sync_threads();
  value = partial[0];
  for (int i = 1; i < device::num_threads() / device::kWarpSize; ++i) {
    value = combine(value, partial[i]);
  }
  return value;
}

// Softmax over the visible blocks of a row, in place; what lies behind them is already 0.
LONGCTX_KERNEL(kScoreThreads, 1)
softmax_rows_kernel(const BlockScoresParams p, const int64_t row_slots) {
  constexpr float kLog2E = 1.44269504f;
  const int64_t map = device::block_index() / row_slots;
  const MapPiece piece =
      map_piece_at(p.map, map / p.num_q_heads, device::block_index() % row_slots, 1);
  if (piece.sequence < 0 || piece.row >= piece.map.num_rows) return;
  const int64_t num_visible = piece.map.num_visible(p.map, piece.row);
  if (num_visible == 0) return;
  float* row =
      p.scores + (map * p.map.num_q_blocks + piece.map.first_row + piece.row) * p.map.num_k_blocks;
  float* partial = reinterpret_cast<float*>(device::shared_memory());
  const int64_t begin = device::thread_index();
  float top = -INFINITY;
  for (int64_t j = begin; j < num_visible; j += kScoreThreads) top = row[j] > top ? row[j] : top;
  top = reduce_block(top, partial, [](float a, float b) { return a > b ? a : b; });
  const float reference = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
  for (int64_t j = begin; j < num_visible; j += kScoreThreads) {
    sum += device::exp2_fast((row[j] - reference) * kLog2E);
  }
  sum = reduce_block(sum, partial, [](float a, float b) { return a + b; });
  const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
  for (int64_t j = begin; j < num_visible; j += kScoreThreads) {
    row[j] = device::exp2_fast((row[j] - reference) * kLog2E) * factor;
  }
}

}  // namespace longctx::cuda
