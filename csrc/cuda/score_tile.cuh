// Tiles of s = q k^T for ops that look at the scores themselves: 128 rows of q by 64 or 128 of k,
// accumulated over slices of 128 bytes of the rows, so that one instance serves every head_dim.
// 16-bit operands meet in tensor cores; float32 takes plain products but deals the scores out to
// the threads in the same way. Slices arrive by asynchronous copies, zero-filled past the end of a
// row and where there is no row.
#pragma once
#include "device/mma.cuh"
#include "longctx/params.h"

namespace longctx::cuda {

constexpr int kTileRows = 128;
constexpr int kSliceBytes = 128;  // of a row
constexpr int kStages = 3;        // slices under way or in use

constexpr int64_t kLeastSharedMemory = 99 * 1024;  // of a block, on consumer cards

constexpr int64_t slice_bytes(int rows) { return int64_t{rows} * kSliceBytes; }

// 16 bytes of a slice. The order of a row's chunks depends on the row, so that neither products nor
// copies meet in the same banks.
LONGCTX_DEVICE char* slice_chunk(char* slice, int row, int chunk) {
  return slice + row * kSliceBytes + ((chunk ^ row) & 7) * 16;
}
LONGCTX_DEVICE const char* slice_chunk(const char* slice, int row, int chunk) {
  return slice + row * kSliceBytes + ((chunk ^ row) & 7) * 16;
}

// The rows of one head, as bytes.
struct HeadRows {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes
  LONGCTX_DEVICE const char* row(int64_t index) const { return data + index * stride; }
};

template <class T>
LONGCTX_DEVICE HeadRows head_rows(const TensorView& tensor, int64_t batch, int64_t head,
                                  int64_t first_row) {
  const T* data = static_cast<const T*>(tensor.data) + batch * tensor.batch_stride +
                  head * tensor.head_stride + first_row * tensor.seq_stride;
  return {reinterpret_cast<const char*>(data), tensor.seq_stride * static_cast<int64_t>(sizeof(T))};
}

// Whether every row starts at a multiple of 16 bytes; else rows are loaded element by element.
inline bool rows_are_aligned(const TensorView& tensor, int64_t batch, int64_t heads, int64_t seqlen,
                             int64_t element_size) {
  const int64_t strides = (batch > 1 ? tensor.batch_stride : 0) |
                          (heads > 1 ? tensor.head_stride : 0) |
                          (seqlen > 1 ? tensor.seq_stride : 0);
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && strides * element_size % 16 == 0;
}

// Bytes [first_byte, first_byte + kSliceBytes) of num_rows rows of row_bytes. row_at(i) is the
// address of row i, or null for a row of zeros. All threads of the block call this.
template <class T, class RowAt>
LONGCTX_DEVICE void load_slice(char* slice, int num_rows, const RowAt& row_at, int first_byte,
                               int row_bytes, bool aligned) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int chunk = device::thread_index() % 8;
  const int begin = first_byte + 16 * chunk;
  const int left = row_bytes - begin < 16 ? row_bytes - begin : 16;
  for (int i = device::thread_index() / 8; i < num_rows; i += device::num_threads() / 8) {
    const char* row = left > 0 ? row_at(i) : nullptr;
    char* target = slice_chunk(slice, i, chunk);
    if (aligned) {
      device::copy_async_16(target, row == nullptr ? nullptr : row + begin,
                            row == nullptr ? 0 : left);
      continue;
    }
    const T* elements = row == nullptr ? nullptr : reinterpret_cast<const T*>(row + begin);
    for (int e = 0; e < kElements; ++e) {
      T x{};
      if (row != nullptr && e * static_cast<int>(sizeof(T)) < left) x = elements[e];
      reinterpret_cast<T*>(target)[e] = x;
    }
  }
}

// Runs use(step, stage) for each of the steps, whose slices load(step, stage) has asked for
// kStages - 1 steps earlier. All threads of the block call this; afterwards no copy is under way.
//
//   step       i - 2       i - 1        i          i + 1
//   load       slice i     slice i + 1  ...
//   wait                                slice i
//   barrier                             slice i is there, the stage of i - 1 is free
//   use                                 slice i    slice i + 1
template <class Load, class Use>
LONGCTX_DEVICE void for_each_slice(int num_steps, const Load& load, const Use& use) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) load(step, step);
    device::commit_copies();
  }
  for (int step = 0, stage = 0; step < num_steps;
       ++step, stage = stage + 1 < kStages ? stage + 1 : 0) {
    device::wait_copies<kStages - 2>();
    device::sync_threads();
    const int ahead = step + kStages - 1;
    if (ahead < num_steps) load(ahead, stage == 0 ? kStages - 1 : stage - 1);
    device::commit_copies();
    use(step, stage);
  }
  device::wait_copies<0>();
  device::sync_threads();
}

// A thread's share of the scores of one tile: [kTileRows, kColumns] by 2 * kColumns threads. Warps
// lie as two rows of kColumns / 32 columns of squares of 64 x 32; within it 4 x 4 products of
// 16 x 8, dealt out as mma.cuh says.
template <class T, int kColumns>
struct ScoreTile {
  static constexpr int kThreads = 2 * kColumns;
  float s[4][4][4];  // [16 rows][8 columns][row + 8 * (i / 2), column + i % 2]

  LONGCTX_DEVICE static int warp_row() { return device::thread_index() / device::kWarpSize % 2; }
  LONGCTX_DEVICE static int warp_column() { return device::thread_index() / device::kWarpSize / 2; }
  LONGCTX_DEVICE static int row(int m, int i) {
    return 64 * warp_row() + 16 * m + 8 * (i / 2) + device::lane_index() / 4;
  }
  LONGCTX_DEVICE static int column(int n, int i) {
    return 32 * warp_column() + 8 * n + 2 * (device::lane_index() % 4) + i % 2;
  }

  LONGCTX_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
  }

  // s += q k^T over one slice: of q [kTileRows, kSliceBytes], of k [kColumns, kSliceBytes].
  LONGCTX_DEVICE void add_slice(const char* q, const char* k) {
    if constexpr (sizeof(T) == 2) {
      add_products(q, k);
    } else {
      add_float_products(q, k);
    }
  }

  // visit(row, column, score) for each of the thread's scores, row by row.
  template <class Visit>
  LONGCTX_DEVICE void for_each(const Visit& visit) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = half; i < half + 2; ++i) visit(row(m, i), column(n, i), s[m][n][i]);
        }
      }
    }
  }

 private:
  LONGCTX_DEVICE void add_products(const char* q, const char* k) {
    const int lane = device::lane_index();
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // of 16 elements: two chunks
      uint32_t k_part[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = 32 * warp_column() + 16 * n + lane / 16 * 8 + lane % 8;
        device::load_matrices(k_part[n], slice_chunk(k, row, 2 * step + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t q_part[4];
        const int row = 64 * warp_row() + 16 * m + lane % 16;
        device::load_matrices(q_part, slice_chunk(q, row, 2 * step + lane / 16));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          device::multiply_add(T(), s[m][n], q_part, k_part[n / 2][n % 2 * 2],
                               k_part[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }

  LONGCTX_DEVICE void add_float_products(const char* q, const char* k) {
    const auto load = [](const char* slice, int row, int chunk) {
      return *reinterpret_cast<const float4*>(slice_chunk(slice, row, chunk));
    };
    for (int chunk = 0; chunk < 8; ++chunk) {
      float4 q_part[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        q_part[m][0] = load(q, row(m, 0), chunk);
        q_part[m][1] = load(q, row(m, 2), chunk);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 k_part = load(k, column(n, i), chunk);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            add_float_product(q_part[m][0], k_part, s[m][n][i]);
            add_float_product(q_part[m][1], k_part, s[m][n][2 + i]);
          }
        }
      }
    }
  }

  LONGCTX_DEVICE static void add_float_product(const float4& a, const float4& b, float& sum) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  }
};

// Shared memory of one tile whose slices of q and k both go by.
template <int kColumns>
constexpr int64_t tile_shared_bytes() {
  return kStages * (slice_bytes(kTileRows) + slice_bytes(kColumns));
}

// scores = q k^T over num_parts rows each: part j of row i is q_row_at(i, j) and k_row_at(i, j),
// row_bytes long; null for zeros. `shared` is free again afterwards.
template <class T, int kColumns, class QRowAt, class KRowAt>
LONGCTX_DEVICE void multiply_rows(ScoreTile<T, kColumns>& scores, char* shared, int num_parts,
                                  int row_bytes, const QRowAt& q_row_at, bool q_aligned,
                                  const KRowAt& k_row_at, bool k_aligned) {
  char* q = shared;
  char* k = shared + kStages * slice_bytes(kTileRows);
  int part = 0, first_byte = 0;  // to load
  const auto load = [&](int, int stage) {
    load_slice<T>(
        q + stage * slice_bytes(kTileRows), kTileRows, [&](int i) { return q_row_at(i, part); },
        first_byte, row_bytes, q_aligned);
    load_slice<T>(
        k + stage * slice_bytes(kColumns), kColumns, [&](int i) { return k_row_at(i, part); },
        first_byte, row_bytes, k_aligned);
    first_byte += kSliceBytes;
    if (first_byte >= row_bytes) {
      first_byte = 0;
      ++part;
    }
  };
  scores.clear();
  for_each_slice(
      num_parts * ((row_bytes + kSliceBytes - 1) / kSliceBytes), load, [&](int, int stage) {
        scores.add_slice(q + stage * slice_bytes(kTileRows), k + stage * slice_bytes(kColumns));
      });
}

}  // namespace longctx::cuda
