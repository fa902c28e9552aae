// Rows of keys, or what stands for keys: where they lie, and eight elements of them at a time.
#pragma once
#include "cuda/columns.cuh"
#include "device/thread.cuh"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

constexpr int kEight = 8;  // elements of a lane

// Null where the page that should hold the key does not exist.
template <class T>
LONGCTX_DEVICE const T* key_row(const TensorView& k, const PagesParams& pages, int64_t batch,
                                int64_t head, int64_t key) {
  const T* data = static_cast<const T*>(k.data) + head * k.head_stride;
  if (pages.page_table == nullptr) return data + batch * k.batch_stride + key * k.seq_stride;
  const int64_t page = pages.page_table[batch * pages.max_pages + key / pages.page_size];
  if (page < 0 || page >= pages.num_pages) return nullptr;
  return data + page * k.batch_stride + key % pages.page_size * k.seq_stride;
}

// Elements [first, first + 8) of a row of `dim`, zeros behind its end; `aligned`: rows start at
// multiples of 16 bytes, `first` is a multiple of 8.
template <class T>
LONGCTX_DEVICE void load_eight(const T* row, int first, int dim, bool aligned, float (&x)[kEight]) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  if (aligned && first + kEight <= dim) {
#pragma unroll
    for (int i = 0; i < kEight; i += kCount) {
      const auto part = *reinterpret_cast<const Columns<T, kCount>*>(row + first + i);
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[i + e] = device::widen(part.values[e]);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    x[e] = first + e < dim ? device::widen(row[first + e]) : 0.0f;
  }
}

template <class T>
LONGCTX_DEVICE void store_eight(const float (&x)[kEight], T* row, int first, int dim,
                                bool aligned) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  if (aligned && first + kEight <= dim) {
#pragma unroll
    for (int i = 0; i < kEight; i += kCount) {
      Columns<T, kCount> part;
#pragma unroll
      for (int e = 0; e < kCount; ++e) device::narrow(x[i + e], part.values[e]);
      *reinterpret_cast<Columns<T, kCount>*>(row + first + i) = part;
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    if (first + e < dim) device::narrow(x[e], row[first + e]);
  }
}

// Whether every row of a tensor starts at a multiple of 16 bytes.
inline bool rows_aligned(const TensorView& view, int64_t element_bytes) {
  const auto multiple = [&](int64_t stride) { return stride * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && multiple(view.batch_stride) &&
         multiple(view.head_stride) && multiple(view.seq_stride);
}

}  // namespace longctx::cuda
