// page_scores and token_scores without torch, one thread, bf16, 2 heads of keys. Arguments: rows
// (pages or keys) / query heads of a kv head. Each iteration reads another summary, so that none is
// in the L2 cache; bytes are what is read of it. read_all does nothing but read: what the memory
// allows.
#include <benchmark/benchmark.h>

#include <vector>

#include "cpu/kernels.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kKvHeads = 2, kDim = 128;
// Summaries of 8 MiB at 8192 pages; together they exceed a L2 cache, not a large L3.
constexpr int64_t kTurns = 6;

void page_scores(benchmark::State& state) {
  const int64_t num_pages = state.range(0), group_size = state.range(1);
  Tensor<BFloat16> q(kKvHeads * group_size, 1, kDim);
  Tensor<BFloat16> summary(kTurns * kKvHeads, num_pages, 2 * kDim);
  std::vector<float> scores(kKvHeads * num_pages);
  PageScoresParams params;
  params.dtype = DType::kBFloat16;
  params.batch = params.seqlen_q = 1;
  params.q = q.view();
  params.num_pages = num_pages;
  params.num_q_heads = kKvHeads * group_size;
  params.summary_heads = kKvHeads;
  params.head_dim = kDim;
  params.softmax_scale = 0.088;
  params.head_reduce = HeadReduce::kGroupMax;
  params.scores = scores.data();
  int64_t turn = 0;
  for (auto _ : state) {
    params.summary = summary.view();
    params.summary.data = static_cast<BFloat16*>(params.summary.data) +
                          turn++ % kTurns * kKvHeads * params.summary.head_stride;
    run_page_scores_cpu(params);
    benchmark::DoNotOptimize(scores.data());
  }
  state.SetBytesProcessed(state.iterations() * kKvHeads * num_pages * 2 * kDim * 2);
}

void token_scores(benchmark::State& state) {
  const int64_t num_keys = state.range(0), group_size = state.range(1);
  Tensor<BFloat16> q(kKvHeads * group_size, 1, kDim), k(kKvHeads, num_keys, kDim);
  std::vector<float> scores(kKvHeads * num_keys);
  TokenScoresParams params;
  params.dtype = DType::kBFloat16;
  params.seqs = one_sequence(1, num_keys);
  params.q = q.view();
  params.k = k.view();
  params.num_scores = num_keys;
  params.num_q_heads = kKvHeads * group_size;
  params.num_kv_heads = kKvHeads;
  params.head_dim = kDim;
  params.softmax_scale = 0.088;
  params.head_reduce = HeadReduce::kGroupMax;
  params.scores = scores.data();
  for (auto _ : state) {
    run_token_scores_cpu(params);
    benchmark::DoNotOptimize(scores.data());
  }
  state.SetBytesProcessed(state.iterations() * kKvHeads * num_keys * kDim * 2);
}

// As many bytes as a summary of so many pages, or twice as many keys.
void read_all(benchmark::State& state) {
  const int64_t words = kKvHeads * state.range(0) * 2 * kDim / 4;
  const std::vector<uint64_t> data(kTurns * words, 1);
  int64_t turn = 0;
  for (auto _ : state) {
    const uint64_t* from = data.data() + turn++ % kTurns * words;
    uint64_t sum = 0;
    for (int64_t i = 0; i < words; i += 8) {
      __builtin_prefetch(from + i + 4096, 0, 2);
      sum += from[i];
    }
    benchmark::DoNotOptimize(sum);
  }
  state.SetBytesProcessed(state.iterations() * words * 8);
}

BENCHMARK(page_scores)->ArgNames({"pages", "group"})->ArgsProduct({{8192, 65536}, {1, 4, 8}});
BENCHMARK(token_scores)->ArgNames({"keys", "group"})->ArgsProduct({{1 << 17}, {1, 4, 8}});
BENCHMARK(read_all)->ArgName("pages")->Arg(8192)->Arg(65536);

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
