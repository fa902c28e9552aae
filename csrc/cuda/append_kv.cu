#include "cuda/append_kv.cuh"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

NewRowsGrid new_rows_grid(const TensorView& cache, const TensorView& rows, int64_t dim,
                          int64_t num_new, int64_t element_bytes) {
  NewRowsGrid grid;
  grid.wide = word_bytes(row_bits(cache, dim, element_bytes) |
                         row_bits(rows, dim, element_bytes)) == kMaxWordBytes;
  const int64_t words = grid.wide ? dim * element_bytes / kMaxWordBytes : dim;
  grid.words = static_cast<int32_t>(words);
  grid.lanes = lanes_of(words, device::kWarpSize);
  const int64_t rows_at_once = rows_of_chunk(grid.lanes);
  grid.chunks = (num_new + rows_at_once - 1) / rows_at_once;
  return grid;
}

template <class T>
void append(const AppendKVParams& p) {
  const int64_t maps = p.batch * p.num_kv_heads;
  if (maps == 0) return;
  constexpr int64_t kBytes = sizeof(T);
  AppendKVGrid grid;
  grid.k = new_rows_grid(p.k_cache, p.k, p.head_dim, p.num_entries, kBytes);
  grid.v = new_rows_grid(p.v_cache, p.v, p.head_dim_v, p.num_entries, kBytes);
  if (p.has_summary && p.num_entries > 0) {
    grid.pages = (p.num_entries - 1 + p.summary.page_size - 1) / p.summary.page_size + 1;
    grid.summary.k_aligned = rows_aligned(p.k_cache, kBytes) && rows_aligned(p.k, kBytes);
    grid.summary.summary_aligned =
        rows_aligned(p.summary.summary, kBytes) && p.head_dim * kBytes % 16 == 0;
  }
  const int64_t items = grid.pages + grid.k.chunks + grid.v.chunks;
  grid.blocks = items == 0 ? 1 : (items + kAppendWarps - 1) / kAppendWarps;
  launch("append_kv", &append_kv_kernel<T>, dim3(static_cast<unsigned>(maps * grid.blocks)),
         kAppendWarps * device::kWarpSize, 0, p, grid);
}

}  // namespace

void run_append_kv_cuda(const AppendKVParams& p) {
  SequenceParams seqs;
  seqs.seqlen_k = p.seqlen_k;
  require_supported("append_kv", p.dtype, p.head_dim, seqs, "k_cache");
  switch (p.dtype) {
    case DType::kBFloat16:
      return append<__nv_bfloat16>(p);
    case DType::kFloat16:
      return append<__half>(p);
    default:
      return append<float>(p);
  }
}

}  // namespace longctx::cuda
