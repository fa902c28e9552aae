#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/summarize_pages.cuh"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

template <class T>
void summarize(const char* op, const SummarizePagesParams& p) {
  const int64_t maps = p.seqs.batch * p.heads;
  if (maps == 0 || p.num_pages == 0) return;
  SummaryGrid grid;
  grid.block_has_page = p.page_size >= kLongPage;
  const int warps = grid.block_has_page ? kLongPageParts : kSummaryWarps;
  const int64_t of_block = grid.block_has_page ? 1 : kSummaryWarps;  // pages
  grid.blocks = (p.num_pages + of_block - 1) / of_block;
  // Where an update begins is known on the device alone: as many blocks as run at a time share its
  // pages.
  const int64_t at_a_time = (int64_t{8} * device_limits().num_multiprocessors + maps - 1) / maps;
  if (p.update && grid.blocks > at_a_time) grid.blocks = at_a_time;
  grid.k_aligned = rows_aligned(p.k, sizeof(T));
  grid.queries_aligned = rows_aligned(p.queries, sizeof(T));
  grid.summary_aligned =
      rows_aligned(p.summary, sizeof(T)) && p.head_dim * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  launch(op, &summarize_pages_kernel<T>, dim3(static_cast<unsigned>(maps * grid.blocks)),
         warps * device::kWarpSize, grid.block_has_page ? kPagePartsBytes : 0, p, grid);
}

}  // namespace

void run_summarize_pages_cuda(const SummarizePagesParams& p) {
  const char* op = p.update ? "update_pages" : "summarize_pages";
  require_supported(op, p.dtype, p.head_dim, p.seqs, "k");
  switch (p.dtype) {
    case DType::kBFloat16:
      return summarize<__nv_bfloat16>(op, p);
    case DType::kFloat16:
      return summarize<__half>(op, p);
    default:
      return summarize<float>(op, p);
  }
}

}  // namespace longctx::cuda
