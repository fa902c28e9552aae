#include "cuda/compact_kv.cuh"
#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace longctx::cuda {
namespace {

constexpr int kLeastSliceBytes = 64;  // narrower ones would read half of what memory hands out

// As many slices as there are blocks that run at a time.
int slice_lanes(int64_t rows, const CompactKVGrid& grid, int word) {
  const int64_t at_a_time = int64_t{kCompactBlocks} * device_limits().num_multiprocessors;
  const auto blocks = [&](int lanes) {
    return rows * ((grid.k_words + lanes - 1) / lanes + (grid.v_words + lanes - 1) / lanes);
  };
  int lanes =
      lanes_of(grid.k_words > grid.v_words ? grid.k_words : grid.v_words, device::kWarpSize);
  while (lanes / 2 * word >= kLeastSliceBytes && blocks(lanes / 2) <= at_a_time) lanes /= 2;
  return lanes;
}

void compact(const char* op, CompactKVParams p, const CompactLayers& layers, int64_t num_layers,
             int word) {
  const int64_t bytes = element_bytes(p.dtype), rows = p.batch * p.num_kv_heads * num_layers;
  CompactKVGrid grid;
  grid.k_words = p.head_dim * bytes / word;
  grid.v_words = p.head_dim_v * bytes / word;
  grid.lanes = slice_lanes(rows, grid, word);
  grid.k_slices = (grid.k_words + grid.lanes - 1) / grid.lanes;
  grid.v_slices = (grid.v_words + grid.lanes - 1) / grid.lanes;
  if (grid.k_slices + grid.v_slices == 0) grid.k_slices = 1;  // for the lengths
  static_assert(sizeof(p) + sizeof(layers) + sizeof(grid) + sizeof(int) <= 4096);
  with_word(word, [&](auto of_type) {
    launch(op, &compact_kv_kernel<decltype(of_type)>,
           dim3(static_cast<unsigned>(rows * (grid.k_slices + grid.v_slices))), kCompactThreads,
           sizeof(KeptKeys), p, layers, grid, static_cast<int>(bytes));
  });
}

}  // namespace

void run_compact_kv_cuda(const CompactKVParams& params) {
  CompactKVParams p = params;
  if (p.batch == 0) return;
  const bool in_order = p.indices.data == nullptr && p.pages.page_table == nullptr;
  if (p.num_entries == 0 || in_order) {  // no row moves: lengths alone
    p.num_layers = 1;
    p.head_dim = p.head_dim_v = 0;
  }
  const int64_t bytes = element_bytes(p.dtype);
  uint64_t bits = 0;
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    bits |= row_bits(p.k_cache[layer], p.head_dim, bytes) |
            row_bits(p.v_cache[layer], p.head_dim_v, bytes);
  }
  const char* op = p.of_draft ? "truncate_kv" : "compact_kv";
  for (int64_t first = 0; first < p.num_layers; first += kLayersAtOnce) {
    const int64_t left = p.num_layers - first, count = left < kLayersAtOnce ? left : kLayersAtOnce;
    CompactLayers layers;
    for (int64_t i = 0; i < count; ++i) {
      layers.k[i] = params.k_cache[first + i];
      layers.v[i] = params.v_cache[first + i];
    }
    compact(op, p, layers, count, word_bytes(bits));
    p.lengths = nullptr;  // they are those of every layer
  }
}

}  // namespace longctx::cuda
