// Which calls the Hopper path takes.
#include "cuda/sm90/attention.h"
#include "cuda/sm90/tensor_map.h"

namespace longctx::cuda::sm90 {

bool supports(const AttentionParams& p, const BlockList* blocks, const DeviceLimits& device,
              const char** why_not) {
  constexpr int kSharedBytes = 227 * 1024;
  constexpr int64_t kMaxHeadDim = 256;
  constexpr int64_t kMinBlockK = 64;
  const auto refuse = [why_not](const char* reason) {
    *why_not = reason;
    return false;
  };
  const SequenceParams& seqs = p.seqs;
  if (device.compute_major != 9 || device.compute_minor != 0 ||
      device.shared_memory_per_block < kSharedBytes) {
    return refuse("the device is not of compute capability 9.0");
  }
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return refuse("the dtype is not bfloat16 or float16");
  }
  if (p.head_dim > kMaxHeadDim || p.head_dim_v > kMaxHeadDim) return refuse("head_dim above 256");
  if (seqs.seqlen_k == 0) return refuse("there are no keys");
  if (!tensor_map_fits(p.q, seqs.batch, p.num_q_heads, seqs.seqlen_q, p.head_dim) ||
      !tensor_map_fits(p.k, seqs.batch, p.num_kv_heads, seqs.seqlen_k, p.head_dim) ||
      !tensor_map_fits(p.v, seqs.batch, p.num_kv_heads, seqs.seqlen_k, p.head_dim_v)) {
    return refuse("an address or stride of q, k or v is not a multiple of 16 bytes that TMA takes");
  }
  // Results are stored in pairs.
  const int64_t out_strides = p.out.batch_stride | p.out.head_stride | p.out.seq_stride;
  if (p.head_dim_v % 2 != 0 || out_strides % 2 != 0 ||
      reinterpret_cast<uintptr_t>(p.out.data) % 4 != 0) {
    return refuse("rows of out do not start at multiples of 4 bytes");
  }
  if (blocks != nullptr && blocks->block_size_k < kMinBlockK) {
    return refuse("block_size_k below 64");
  }
  return true;
}

}  // namespace longctx::cuda::sm90
