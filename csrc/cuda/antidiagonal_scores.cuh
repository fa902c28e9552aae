// Block scores from antidiagonals (XAttention, arXiv 2503.16428): `stride` neighbouring queries in
// reverse order and `stride` neighbouring keys are one long row each, whose product is the sum over
// an antidiagonal of their square. So [n / stride, stride * head_dim] products replace q k^T, at
// 1 / stride of its cost.
//
// Tiles of the products are independent: each leaves, per query group and key block, the logarithm
// of the sum of exponentials (the sum itself without softmax), the states. A second kernel then
// knows a group's whole denominator and sums the shares of a map row. The states of a head are
// (n / stride) * (n / block_size_k) floats; the launcher works in slabs that bound them.
//
// Floor, per head: 2 * seqlen_q * seqlen_k * head_dim / stride FLOPs (half of it when causal and
// square), tensor cores limit it; q and k are read once and the states written once and read three
// times (128k keys, stride 16, blocks of 128, causal: 137 GFLOP beside 64 MB and 16 MB of states).
#pragma once
#include "cuda/score_tile.cuh"
#include "cuda/slots.cuh"
#include "longctx/mask.h"

namespace longctx::cuda {

constexpr int kGroupColumns = 128;  // key groups of a tile
constexpr int kGroupThreads = ScoreTile<float, kGroupColumns>::kThreads;
constexpr int kMaxPiece = 64;
constexpr int kGroupStride = kGroupColumns + 1;
constexpr int kRowThreads = 128;
constexpr int64_t kGroupSharedBytes =
    tile_shared_bytes<kGroupColumns>() + kTileRows * static_cast<int64_t>(sizeof(int32_t));
static_assert(kGroupSharedBytes <= kLeastSharedMemory);

// A tile has kTileRows query groups: whole rows of the map. A state covers a key block, or half of
// one that has more than kMaxPiece groups.
struct GroupGrid {
  float* states = nullptr;  // [units of the slab, kTileRows, num_pieces]
  int64_t first_unit = 0;   // of the slab; a unit is one head's tile of rows
  int64_t row_slots = 0;    // units of a head
  int64_t unit_rows = 0;    // rows of the map in a unit, at most
  int64_t column_tiles = 0;
  int64_t num_pieces = 0;
  int piece = 0;  // key groups of a state
  bool q_aligned = false;
  bool k_aligned = false;

  LONGCTX_HD int64_t tile_map_rows(const BlockScoresParams& p) const {
    return kTileRows * p.stride / p.map.block_size_q;
  }
};

// Query groups and key groups of one sequence.
struct Groups {
  const BlockScoresParams& p;
  const SequenceMap& map;

  LONGCTX_DEVICE int64_t groups(int64_t length) const { return (length + p.stride - 1) / p.stride; }
  LONGCTX_DEVICE int64_t q_count(int64_t group) const {
    return clamp_index(map.seq.q_len - group * p.stride, 0, p.stride);
  }
  // Query group `group` sees key groups [0, num_seen).
  LONGCTX_DEVICE int64_t num_seen(int64_t group) const {
    const int64_t k_groups = groups(map.seq.k_len);
    if (!p.map.causal) return k_groups;
    const int64_t last = map.first_position + group * p.stride + q_count(group) - 1;
    return last < 0 ? 0 : clamp_index(last / p.stride + 1, 0, k_groups);
  }
  // Query groups of a map row: [first, last).
  LONGCTX_DEVICE Interval row_groups(int64_t row) const {
    const int64_t size = p.map.block_size_q / p.stride;
    const int64_t end = groups(map.seq.q_len);
    return {row * size, (row + 1) * size < end ? (row + 1) * size : end};
  }
};

// The tile of rows that a unit stands for.
struct GroupTile {
  MapPiece piece;
  int64_t batch_index;
  int64_t head;
  int64_t first_group;
  int num_groups = 0;  // 0: nothing to do

  LONGCTX_DEVICE GroupTile(const BlockScoresParams& p, const GroupGrid& grid, int64_t unit) {
    const int64_t slot = unit % grid.row_slots;
    head = unit / grid.row_slots % p.num_q_heads;
    batch_index = unit / grid.row_slots / p.num_q_heads;
    piece = map_piece_at(p.map, batch_index, slot, grid.tile_map_rows(p));
    first_group = piece.row * p.map.block_size_q / p.stride;
    if (piece.sequence < 0) return;
    const Groups groups{p, piece.map};
    num_groups = static_cast<int>(
        clamp_index(groups.groups(piece.map.seq.q_len) - first_group, 0, kTileRows));
  }
};

template <class T>
LONGCTX_KERNEL(kGroupThreads, sizeof(T) == 2 ? 2 : 1)
antidiagonal_states_kernel(const BlockScoresParams p, const GroupGrid grid) {
  constexpr double kLog2E = 1.4426950408889634;
  const int64_t unit = device::block_index() / grid.column_tiles;
  const int64_t column = device::block_index() % grid.column_tiles * kGroupColumns;
  const GroupTile tile(p, grid, grid.first_unit + unit);
  const Groups groups{p, tile.piece.map};
  if (tile.num_groups == 0) return;
  if (groups.num_seen(tile.first_group + tile.num_groups - 1) <= column) return;
  const Sequence& seq = tile.piece.map.seq;
  char* shared = device::shared_memory();
  int32_t* seen = reinterpret_cast<int32_t*>(shared + tile_shared_bytes<kGroupColumns>());
  for (int i = device::thread_index(); i < kTileRows; i += kGroupThreads) {
    const int64_t end = i < tile.num_groups ? groups.num_seen(tile.first_group + i) : 0;
    seen[i] = static_cast<int32_t>(clamp_index(end - column, 0, kGroupColumns));
  }

  // Long rows of reversed queries; what a short group lacks is zero.
  const int stride = static_cast<int>(p.stride);
  const int last_count = static_cast<int>(groups.q_count(tile.first_group + tile.num_groups - 1));
  const auto q_count = [&](int i) { return i + 1 < tile.num_groups ? stride : last_count; };
  const int num_keys =
      static_cast<int>(clamp_index(seq.k_len - column * p.stride, 0, kGroupColumns * p.stride));
  const HeadRows q =
      head_rows<T>(p.q, tile.batch_index, tile.head, seq.q_begin + tile.first_group * p.stride);
  const HeadRows k = head_rows<T>(p.k, tile.batch_index, tile.head * p.num_kv_heads / p.num_q_heads,
                                  seq.k_begin + column * p.stride);
  const auto q_row_at = [&](int i, int part) -> const char* {
    if (i >= tile.num_groups || part >= q_count(i)) return nullptr;
    return q.row(i * stride + q_count(i) - 1 - part);
  };
  const auto k_row_at = [&](int i, int part) -> const char* {
    return i * stride + part < num_keys ? k.row(i * stride + part) : nullptr;
  };
  ScoreTile<T, kGroupColumns> scores;
  multiply_rows(scores, shared, stride, static_cast<int>(p.head_dim * sizeof(T)), q_row_at,
                grid.q_aligned, k_row_at, grid.k_aligned);

  // The scale counts on `stride` pairs; the last group of queries or keys may have fewer.
  const double scale = p.softmax_scale / static_cast<double>(p.stride);
  const float factor = static_cast<float>(p.softmax ? scale * kLog2E : scale);
  const float hidden = p.softmax ? -INFINITY : 0.0f;
  float* s_rows = reinterpret_cast<float*>(shared);  // [kTileRows][kGroupStride]
  scores.for_each([&](int row, int i, float s) {
    s *= factor;
    const int k_count = num_keys - i * stride;
    const int pairs = q_count(row) < k_count ? q_count(row) : k_count;
    if (pairs < stride && pairs > 0) s *= static_cast<float>(stride) / static_cast<float>(pairs);
    s_rows[row * kGroupStride + i] = i < seen[row] ? s : hidden;  // mask
  });
  device::sync_threads();

  // A thread reduces half a row of the tile.
  const int row = device::thread_index() % kTileRows;
  const int half = device::thread_index() / kTileRows * kMaxPiece;
  if (row >= tile.num_groups) return;
  const float* s = s_rows + row * kGroupStride + half;
  float* states =
      grid.states + (unit * kTileRows + row) * grid.num_pieces + (column + half) / grid.piece;
  for (int begin = 0; begin < kMaxPiece; begin += grid.piece, ++states) {
    float top = -INFINITY, sum = 0.0f;
    for (int i = begin; i < begin + grid.piece && p.softmax; ++i) top = s[i] > top ? s[i] : top;
    const float reference = top == -INFINITY ? 0.0f : top;
    for (int i = begin; i < begin + grid.piece; ++i) {
      sum += p.softmax ? device::exp2_fast(s[i] - reference) : s[i];
    }
    *states = p.softmax ? reference + log2f(sum) : sum;
  }
}

struct RowShared {
  float reference[kTileRows];  // per query group: the largest state
  float factor[kTileRows];     // 1 / its denominator beyond that
};

// The mean over the groups of a map row that see a key. A block of threads a row.
LONGCTX_KERNEL(kRowThreads, 4)
antidiagonal_rows_kernel(const BlockScoresParams p, const GroupGrid grid) {
  const int64_t unit = device::block_index() / grid.unit_rows;
  const GroupTile tile(p, grid, grid.first_unit + unit);
  const int64_t row = tile.piece.row + device::block_index() % grid.unit_rows;
  const Groups groups{p, tile.piece.map};
  const Interval own = groups.row_groups(row);
  if (tile.num_groups == 0 || own.begin >= own.end) return;
  const int num_groups = static_cast<int>(own.end - own.begin);
  const int64_t block_groups = p.map.block_size_k / p.stride;
  const int64_t columns = (groups.num_seen(own.end - 1) + block_groups - 1) / block_groups;
  const int64_t pieces = block_groups / grid.piece;  // of a column
  const float* states =
      grid.states + (unit * kTileRows + own.begin - tile.first_group) * grid.num_pieces;
  float* scores = p.scores + ((tile.batch_index * p.num_q_heads + tile.head) * p.map.num_q_blocks +
                              tile.piece.map.first_row + row) *
                                 p.map.num_k_blocks;
  RowShared* shared = reinterpret_cast<RowShared*>(device::shared_memory());

  // the denominators: a warp a group
  const int warp = device::warp_index(), lane = device::lane_index();
  for (int g = warp; g < num_groups && p.softmax; g += kRowThreads / device::kWarpSize) {
    const float* state = states + g * grid.num_pieces;
    float top = -INFINITY, sum = 0.0f;
    for (int64_t i = lane; i < columns * pieces; i += device::kWarpSize) {
      top = state[i] > top ? state[i] : top;
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      const float other = device::shuffle_xor(top, mask);
      top = other > top ? other : top;
    }
    const float reference = top == -INFINITY ? 0.0f : top;
    for (int64_t i = lane; i < columns * pieces; i += device::kWarpSize) {
      sum += device::exp2_fast(state[i] - reference);
    }
    for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
      sum += device::shuffle_xor(sum, mask);
    }
    if (lane == 0) {
      shared->reference[g] = reference;
      shared->factor[g] = sum > 0.0f ? 1.0f / sum : 0.0f;
    }
  }
  device::sync_threads();

  int64_t num_seeing = 0;
  for (int64_t g = own.begin; g < own.end; ++g) num_seeing += groups.num_seen(g) > 0;
  for (int64_t column = device::thread_index(); column < columns; column += kRowThreads) {
    float sum = 0.0f;
    int64_t num_pairs = 0;  // of a query group and a key group of the column that are seen
    for (int g = 0; g < num_groups; ++g) {
      const float* state = states + g * grid.num_pieces + column * pieces;
      for (int64_t i = 0; i < pieces; ++i) {
        sum += p.softmax ? device::exp2_fast(state[i] - shared->reference[g]) * shared->factor[g]
                         : state[i];
      }
      if (!p.softmax) {
        const int64_t seen = groups.num_seen(own.begin + g) - column * block_groups;
        num_pairs += clamp_index(seen, 0, block_groups);
      }
    }
    const int64_t divisor = p.softmax ? num_seeing : num_pairs;
    if (divisor > 0) scores[column] = sum / static_cast<float>(divisor);
  }
}

}  // namespace longctx::cuda
