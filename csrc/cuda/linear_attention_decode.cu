#include "cuda/kernels.h"
#include "cuda/linear_attention_decode.cuh"
#include "cuda/runtime.h"
#include "cuda/score_tile.cuh"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "linear_attention_decode";

template <class T, int kRows>
void decode_columns(const LinearAttentionDecodeParams& p, DecodeLaunch columns) {
  constexpr int64_t kFloat = sizeof(float);
  const bool vectors = columns.num_columns % kDecodeOwn == 0 && columns.first_column == 0 &&
                       rows_are_aligned(p.state, p.num_slots, p.num_q_heads, p.head_dim, kFloat);
  const auto kernel = vectors ? &linear_attention_decode_kernel<T, kRows, true>
                              : &linear_attention_decode_kernel<T, kRows, false>;
  columns.num_slices =
      static_cast<uint32_t>((columns.num_columns + kDecodeColumns - 1) / kDecodeColumns);
  columns.num_heads = static_cast<uint32_t>(p.num_q_heads);
  columns.group_size = static_cast<uint32_t>(p.num_q_heads / p.num_kv_heads);
  const int64_t blocks = p.batch * p.num_q_heads * columns.num_slices;
  launch(kOp, kernel, dim3(static_cast<unsigned>(blocks)), kDecodeThreads,
         DecodeShared<kRows * kDecodeRowGroups>::bytes(columns.tokens), p, columns);
}

template <class T, int kRows>
void decode(const LinearAttentionDecodeParams& p) {
  DecodeLaunch columns;
  columns.tokens =
      static_cast<int32_t>(p.num_tokens < kDecodeTokens ? p.num_tokens : kDecodeTokens);
  const int64_t outputs = p.normalize ? p.batch * p.num_q_heads * p.num_tokens : 0;
  const Workspace denominators(outputs * static_cast<int64_t>(sizeof(float)));
  columns.denominators = denominators.as<float>();
  if (p.normalize) {
    DecodeLaunch z = columns;
    z.first_column = p.head_dim_v;
    z.num_columns = 1;
    z.of_z = true;
    decode_columns<T, kRows>(p, z);
  }
  columns.num_columns = p.head_dim_v;
  decode_columns<T, kRows>(p, columns);
}

template <class T>
void decode(const LinearAttentionDecodeParams& p) {
  if (p.head_dim <= 64) return decode<T, 64 / kDecodeRowGroups>(p);
  if (p.head_dim <= 128) return decode<T, 128 / kDecodeRowGroups>(p);
  decode<T, 256 / kDecodeRowGroups>(p);
}

}  // namespace

void run_linear_attention_decode_cuda(const LinearAttentionDecodeParams& p) {
  SequenceParams seqs;
  seqs.seqlen_q = seqs.seqlen_k = p.num_tokens;
  require_supported(kOp, p.dtype, p.head_dim, seqs);
  if (p.batch == 0 || p.num_tokens == 0) return;
  switch (p.dtype) {
    case DType::kBFloat16:
      return decode<__nv_bfloat16>(p);
    case DType::kFloat16:
      return decode<__half>(p);
    default:
      return decode<float>(p);
  }
}

}  // namespace longctx::cuda
