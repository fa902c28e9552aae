#include "cuda/gather_kv.cuh"
#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace longctx::cuda {

void run_gather_kv_cuda(const GatherKVParams& p) {
  const int64_t lists = p.batch * p.num_kv_heads;
  if (lists == 0 || p.num_entries == 0) return;
  const int64_t bytes = element_bytes(p.dtype);
  const auto contiguous = [&](void* data, int64_t dim) { return TensorView{data, 0, 0, dim}; };
  const int word =
      word_bytes(row_bits(p.k, p.head_dim, bytes) | row_bits(p.v, p.head_dim_v, bytes) |
                 row_bits(contiguous(p.k_out, p.head_dim), p.head_dim, bytes) |
                 row_bits(contiguous(p.v_out, p.head_dim_v), p.head_dim_v, bytes));
  GatherKVGrid grid;
  grid.k_words = p.head_dim * bytes / word;
  grid.v_words = p.head_dim_v * bytes / word;
  const int64_t words = grid.k_words > grid.v_words ? grid.k_words : grid.v_words;
  grid.lanes = lanes_of(words, device::kWarpSize);
  const int64_t entries = gathered_entries(grid.lanes);
  grid.pieces = (p.num_entries + entries - 1) / entries;
  with_word(word, [&](auto of_type) {
    launch("gather_kv", &gather_kv_kernel<decltype(of_type)>,
           dim3(static_cast<unsigned>(2 * lists * grid.pieces)), kGatherThreads, 0, p, grid,
           static_cast<int>(bytes));
  });
}

}  // namespace longctx::cuda
