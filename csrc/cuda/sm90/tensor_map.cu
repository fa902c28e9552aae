#include <stdexcept>
#include <string>

#include "cuda/runtime.h"
#include "cuda/sm90/tensor_map.h"

namespace longctx::cuda::sm90 {
namespace {

constexpr int kElementBytes = 2;
constexpr int kBoxColumns = 64;

// Of the dims from the inner one out; strides in bytes, of all but the inner dim.
struct Extents {
  uint64_t lengths[4];
  uint64_t strides[3];
};

Extents extents(const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen, int64_t dim) {
  const int64_t lengths[4] = {dim, seqlen, heads, batch};
  const int64_t strides[3] = {view.seq_stride, view.head_stride, view.batch_stride};
  Extents result;
  uint64_t packed = static_cast<uint64_t>(dim * kElementBytes);
  for (int i = 0; i < 4; ++i) result.lengths[i] = static_cast<uint64_t>(lengths[i]);
  for (int i = 0; i < 3; ++i) {
    // A dim of length 1 is never stepped along: whatever its stride, TMA gets one that it takes.
    result.strides[i] = lengths[i + 1] > 1 ? static_cast<uint64_t>(strides[i] * kElementBytes)
                                           : (packed + 15) / 16 * 16;
    packed = result.strides[i] * result.lengths[i + 1];
  }
  return result;
}

}  // namespace

bool tensor_map_fits(const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen,
                     int64_t dim) {
  constexpr uint64_t kMaxLength = uint64_t{1} << 31, kMaxStride = uint64_t{1} << 40;
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  const Extents e = extents(view, batch, heads, seqlen, dim);
  for (const uint64_t length : e.lengths) {
    if (length == 0 || length >= kMaxLength) return false;
  }
  for (const uint64_t stride : e.strides) {
    if (stride == 0 || stride % 16 != 0 || stride >= kMaxStride) return false;
  }
  return true;
}

#ifndef LONGCTX_SIMT

namespace {

// libcuda is not linked against: a machine that only builds has none.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  constexpr unsigned kSince = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("longctx: the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

TensorMap tensor_map(DType dtype, const TensorView& view, int64_t batch, int64_t heads,
                     int64_t seqlen, int64_t dim, int64_t box_rows) {
  static const auto encode = encode_function();
  const Extents e = extents(view, batch, heads, seqlen, dim);
  const cuuint64_t lengths[4] = {e.lengths[0], e.lengths[1], e.lengths[2], e.lengths[3]};
  const cuuint64_t strides[3] = {e.strides[0], e.strides[1], e.strides[2]};
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, view.data, lengths, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("longctx: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

TensorMap tensor_map(DType, const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen,
                     int64_t dim, int64_t box_rows) {
  const Extents e = extents(view, batch, heads, seqlen, dim);
  TensorMap map;
  map.data = static_cast<const char*>(view.data);
  for (int i = 0; i < 4; ++i) map.lengths[i] = static_cast<int64_t>(e.lengths[i]);
  for (int i = 0; i < 3; ++i) map.strides[i] = static_cast<int64_t>(e.strides[i]);
  map.box_rows = box_rows;
  return map;
}

#endif  // LONGCTX_SIMT

}  // namespace longctx::cuda::sm90
