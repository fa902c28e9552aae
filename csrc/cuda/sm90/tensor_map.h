// Tensor maps: what TMA knows of a [batch, heads, seqlen, dim] tensor of 16-bit elements.
#pragma once
#include "longctx/params.h"

#ifndef LONGCTX_SIMT
#include <cuda.h>
#else
#include "hopper.h"
#endif

namespace longctx::cuda::sm90 {

#ifndef LONGCTX_SIMT
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

// Whether TMA can read the tensor: base and strides in multiples of 16 bytes, strides below 2^40
// bytes and lengths below 2^31. A stride is not looked at where the tensor has length 1.
bool tensor_map_fits(const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen,
                     int64_t dim);

// Boxes of `box_rows` rows (at most 256) x 64 columns, with the 128-byte swizzle.
TensorMap tensor_map(DType dtype, const TensorView& view, int64_t batch, int64_t heads,
                     int64_t seqlen, int64_t dim, int64_t box_rows);

}  // namespace longctx::cuda::sm90
