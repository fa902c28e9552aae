// select_blocks without torch: rows of softmax-like scores, one thread. Items are scores read.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace {

using namespace longctx;

void select(benchmark::State& state, SelectMethod method, bool per_row, float value) {
  const int64_t blocks = state.range(0);
  std::mt19937 generator(0);
  std::normal_distribution<float> logits(0.0f, 3.0f);
  std::vector<float> scores(static_cast<size_t>(blocks * blocks));
  for (float& score : scores) score = std::exp(logits(generator));
  std::vector<int64_t> indptr(static_cast<size_t>(blocks + 1));
  std::vector<int32_t> indices(scores.size());

  SelectBlocksParams params;
  params.map.seqs.batch = params.map.seqs.num_seqs = 1;
  params.map.seqs.seqlen_q = params.map.seqs.seqlen_k = blocks * params.map.block_size_q;
  params.map.num_q_blocks = params.map.num_k_blocks = blocks;
  params.scores = scores.data();
  params.scores_row_stride = blocks;
  params.heads = 1;
  params.method = method;
  params.per_row = per_row;
  params.value = value;
  params.num_first = params.num_local = 1;
  params.max_blocks_per_row = blocks;
  params.block_indptr = indptr.data();
  params.block_indices = indices.data();
  params.capacity = static_cast<int64_t>(indices.size());
  for (auto _ : state) {
    cpu::run_select_blocks_cpu(params);
    benchmark::DoNotOptimize(indices.data());
  }
  state.SetItemsProcessed(state.iterations() * blocks * (blocks + 1) / 2);
}

constexpr auto kSizes = [](auto* bench) { bench->Arg(64)->Arg(256)->Arg(1024)->Arg(2048); };

BENCHMARK_CAPTURE(select, top_k_row, SelectMethod::kTopK, true, 32.0f)->Apply(kSizes);
BENCHMARK_CAPTURE(select, top_k_head, SelectMethod::kTopK, false, 4096.0f)->Apply(kSizes);
BENCHMARK_CAPTURE(select, cumulative_row, SelectMethod::kCumulative, true, 0.9f)->Apply(kSizes);
BENCHMARK_CAPTURE(select, cumulative_head, SelectMethod::kCumulative, false, 0.9f)->Apply(kSizes);
BENCHMARK_CAPTURE(select, threshold, SelectMethod::kThreshold, true, 0.5f)->Apply(kSizes);
BENCHMARK_CAPTURE(select, relative, SelectMethod::kRelative, true, 0.1f)->Apply(kSizes);

}  // namespace

BENCHMARK_MAIN();
