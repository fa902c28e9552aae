// Chunks of consecutive key rows, for ops that score keys and have no values.
#pragma once
#include <algorithm>
#include <cstdint>

#include "longctx/params.h"
#include "strip_engine.h"

namespace longctx::cpu {

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline const char* row_address(const TensorView& tensor, int64_t element_size, int64_t batch,
                               int64_t head, int64_t row) {
  return static_cast<const char*>(tensor.data) +
         (batch * tensor.batch_stride + head * tensor.head_stride + row * tensor.seq_stride) *
             element_size;
}

// Slot i is the row at `rows` + i * stride elements and stands at key position `first` + i.
inline void set_dense_chunk(KeyChunk* chunk, const char* rows, int64_t stride, int64_t element_size,
                            int64_t first, int64_t count) {
  chunk->num_keys = count;
  chunk->k_stride = stride;
  chunk->v_stride = 0;
  for (int64_t slot = 0; slot < chunk->num_slots(); ++slot) {
    const int64_t i = std::min(slot, count - 1);
    chunk->k_rows[slot] = rows + i * stride * element_size;
    chunk->v_rows[slot] = nullptr;
    chunk->positions[slot] = first + i;
  }
  chunk->contiguous16 = static_cast<uint32_t>((uint64_t{1} << (count / 16)) - 1);
  chunk->upcoming = {};
}

// Engines compute float64 in float64; what is built on their tiles here is float32.
inline float* as_float(DType dtype, void* tile, int64_t count) {
  float* narrow = static_cast<float*>(tile);
  if (dtype == DType::kFloat64) {
    const double* wide = static_cast<const double*>(tile);
    for (int64_t i = 0; i < count; ++i) {
      double x;  // element i is read before float i, which lies at or before it, is written
      __builtin_memcpy(&x, wide + i, sizeof(x));
      const float y = static_cast<float>(x);
      __builtin_memcpy(narrow + i, &y, sizeof(y));
    }
  }
  return narrow;
}

}  // namespace longctx::cpu
