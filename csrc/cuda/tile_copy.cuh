// Tiles of 16-bit rows in shared memory, and the copies that fill and empty them.
// A row is padded to whole panels of 128 bytes. Its 16-byte chunk c stands at c ^ row % 8, so that
// neither a copy (eight chunks of a row) nor a matrix load (one chunk of eight rows) meets a bank
// twice.
#pragma once
#include "cuda/visit.cuh"
#include "device/copy.cuh"
#include "longctx/params.h"

namespace longctx::cuda {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kCols>
struct TileRows {
  static constexpr int kRowBytes = (kCols + 63) / 64 * 128;
  static constexpr int kChunks = kCols / kChunk;
  LONGCTX_DEVICE static int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row % 8) * 16;
  }
};

// A tensor's rows as a kernel reads them.
struct SourceRows {
  int32_t dim = 0;
  // All addresses and dims are multiples of 16 bytes; else single elements are loaded.
  bool aligned = false;
  uint32_t row_bytes = 0;  // from a row to the next, where aligned
  int64_t row_stride = 0;  // the same, in elements
};

// `chunk` elements are 16 bytes.
inline SourceRows source_rows(const TensorView& view, int64_t dim, int chunk) {
  const auto elements = static_cast<uint64_t>(view.batch_stride) |
                        static_cast<uint64_t>(view.head_stride) |
                        static_cast<uint64_t>(view.seq_stride) | static_cast<uint64_t>(dim);
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  const int64_t row_bytes = view.seq_stride * (16 / chunk);
  const bool short_rows = row_bytes >= 0 && row_bytes <= UINT32_MAX;  // one multiplication each
  return {static_cast<int32_t>(dim), elements % chunk == 0 && address % 16 == 0 && short_rows,
          static_cast<uint32_t>(row_bytes), view.seq_stride};
}

struct alignas(16) Chunk {
  uint16_t elements[kChunk];
};

// Columns [chunk * 8, chunk * 8 + 8) of a row; zeros past its end, or everywhere if `live` is
// false.
LONGCTX_DEVICE void copy_elements(char* target, const uint16_t* row, int chunk, int dim,
                                  bool live) {
  Chunk loaded;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int column = chunk * kChunk + i;
    loaded.elements[i] = live && column < dim ? row[column] : uint16_t{0};
  }
  *reinterpret_cast<Chunk*>(target) = loaded;
}

// Copies rows into `tile` [kRows, kCols], the first `dim` columns of each and zeros
// behind. All `kThreads` threads take part. Tile row i is row position(i), an int32, from `first`;
// if that is negative, zeros.
template <int kCols, int kThreads, int kRows, class Position>
LONGCTX_DEVICE void copy_rows(char* tile, const uint16_t* first_row, const SourceRows& source,
                              int dim, const Position& position_of) {
  using Rows = TileRows<kCols>;
  // Threads that share a row: as many as divide its chunks, at most 16. A thread's rows are then a
  // multiple of 8 apart, and its chunk stands at the same place in each.
  constexpr int kLanes = Rows::kChunks % 16 == 0 ? 16 : Rows::kChunks % 8 == 0 ? 8 : 4;
  constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0 && Rows::kChunks % kLanes == 0);
  const int thread = device::opaque(device::thread_index());
  const int lane = thread % kLanes, own = thread / kLanes;
  if (source.aligned) {
    const char* first = reinterpret_cast<const char*>(first_row + lane * kChunk);
#pragma unroll
    for (int row = own, i = 0; i < kRows / kRowStep; row += kRowStep, ++i) {
      const int32_t position = position_of(row);
      const char* from = first + uint64_t{static_cast<uint32_t>(position)} * source.row_bytes;
#pragma unroll
      for (int chunk = lane, j = 0; j < Rows::kChunks / kLanes; chunk += kLanes, ++j) {
        const bool live = position >= 0 && chunk * kChunk < dim;
        device::copy_async_16(tile + Rows::offset(own, chunk) + i * kRowStep * Rows::kRowBytes,
                              from + j * kLanes * 16, live ? 16 : 0);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = own; row < kRows; row += kRowStep) {
    const int32_t position = position_of(row);
#pragma unroll 1
    for (int chunk = lane; chunk < Rows::kChunks; chunk += kLanes) {
      copy_elements(tile + Rows::offset(row, chunk), first_row + position * source.row_stride,
                    chunk, dim, position >= 0);
    }
  }
}

// Copies the key rows that `keys` names into `tile` [kTileKeys, kCols], zeros for dead slots.
// `first_key` is the row of the sequence's first key.
template <int kCols, int kThreads, int kTileKeys>
LONGCTX_DEVICE void copy_keys(char* tile, const KeyTile<kTileKeys>& keys, const uint16_t* first_key,
                              const SourceRows& source) {
  copy_rows<kCols, kThreads, kTileKeys>(tile, first_key, source, source.dim,
                                        [&keys](int row) { return keys.positions[row]; });
}

// A warp copies its own kRows rows into `tile` [kRows, kCols]. Lane r brings the address of row
// r % kRows, null for zeros.
template <int kCols, int kRows>
LONGCTX_DEVICE void copy_own_rows(char* tile, const uint16_t* own_row, const SourceRows& source) {
  using Rows = TileRows<kCols>;
#pragma unroll 1
  for (int i = device::lane_index(); i < kRows * Rows::kChunks; i += device::kWarpSize) {
    const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
    const auto address = device::shuffle(reinterpret_cast<int64_t>(own_row), row);
    const auto* from = reinterpret_cast<const uint16_t*>(address);
    char* target = tile + Rows::offset(row, chunk);
    if (source.aligned) {
      const bool live = from != nullptr && chunk * kChunk < source.dim;
      device::copy_async_16(target, from + chunk * kChunk, live ? 16 : 0);
    } else {
      copy_elements(target, from, chunk, source.dim, from != nullptr);
    }
  }
}

// The way back: a warp writes `tile` [kRows, kCols] to its own rows. Lane r brings the address of
// row r % kRows, null for none.
template <int kCols, int kRows>
LONGCTX_DEVICE void write_own_rows(const char* tile, uint16_t* own_row, const SourceRows& target) {
  using Rows = TileRows<kCols>;
#pragma unroll 1
  for (int i = device::lane_index(); i < kRows * Rows::kChunks; i += device::kWarpSize) {
    const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
    const auto address = device::shuffle(reinterpret_cast<int64_t>(own_row), row);
    auto* to = reinterpret_cast<uint16_t*>(address) + chunk * kChunk;
    const int left = target.dim - chunk * kChunk;
    if (address == 0 || left <= 0) continue;
    const auto& from = *reinterpret_cast<const Chunk*>(tile + Rows::offset(row, chunk));
    if (target.aligned) {
      *reinterpret_cast<Chunk*>(to) = from;
    } else {
      for (int e = 0; e < kChunk && e < left; ++e) to[e] = from.elements[e];
    }
  }
}

}  // namespace longctx::cuda
