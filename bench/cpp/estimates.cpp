// attention_mass, block_scores and merge_states without torch, bfloat16, 8 query and 2 kv heads,
// head_dim 128. Argument: sequence length. Bytes are inputs read once.
#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kQueryHeads = 8, kKvHeads = 2, kHeadDim = 128, kBlock = 128;
const double kScale = 1.0 / std::sqrt(static_cast<double>(kHeadDim));

template <class Params>
void set_heads(Params& params) {
  params.dtype = DType::kBFloat16;
  params.num_q_heads = kQueryHeads;
  params.num_kv_heads = kKvHeads;
  params.head_dim = kHeadDim;
  params.softmax_scale = kScale;
}

// The last block of queries against all keys, by key.
void attention_mass(benchmark::State& state) {
  const int64_t seqlen = state.range(0);
  Tensor<BFloat16> q(kQueryHeads, kBlock, kHeadDim), k(kKvHeads, seqlen, kHeadDim);
  const std::vector<float> lse(kQueryHeads * kBlock, std::log(static_cast<float>(seqlen)));
  std::vector<float> mass(kQueryHeads * seqlen);
  AttentionMassParams params;
  set_heads(params);
  params.seqs = one_sequence(kBlock, seqlen);
  params.mask.causal = true;
  params.q = q.view();
  params.k = k.view();
  params.lse = lse.data();
  params.key_mass = mass.data();
  params.num_diagonals = kBlock + seqlen - 1;
  for (auto _ : state) {
    run_attention_mass_cpu(params);
    benchmark::DoNotOptimize(mass.data());
  }
  state.SetBytesProcessed(state.iterations() * kKvHeads * seqlen * kHeadDim * 2);
}

void block_scores(benchmark::State& state, BlockScoreMethod method) {
  const int64_t seqlen = state.range(0), blocks = seqlen / kBlock;
  Tensor<BFloat16> q(kQueryHeads, seqlen, kHeadDim), k(kKvHeads, seqlen, kHeadDim);
  std::vector<float> scores(kQueryHeads * blocks * blocks);
  BlockScoresParams params;
  set_heads(params);
  params.map.seqs = one_sequence(seqlen, seqlen);
  params.map.num_q_blocks = params.map.num_k_blocks = blocks;
  params.q = q.view();
  params.k = k.view();
  params.method = method;
  params.scores = scores.data();
  for (auto _ : state) {
    run_block_scores_cpu(params);
    benchmark::DoNotOptimize(scores.data());
  }
  state.SetBytesProcessed(state.iterations() * (kQueryHeads + kKvHeads) * seqlen * kHeadDim * 2);
}

void merge_states(benchmark::State& state) {
  constexpr int64_t kStates = 4;
  const int64_t rows = kQueryHeads * state.range(0);
  Tensor<BFloat16> out(kStates * kQueryHeads, state.range(0), kHeadDim);
  Tensor<BFloat16> merged(kQueryHeads, state.range(0), kHeadDim);
  const std::vector<float> lse(kStates * rows, 1.0f);
  std::vector<float> merged_lse(rows);
  MergeStatesParams params;
  params.dtype = DType::kBFloat16;
  params.out = out.view().data;
  params.lse = lse.data();
  params.merged_out = merged.view().data;
  params.merged_lse = merged_lse.data();
  params.num_states = kStates;
  params.rows = rows;
  params.dim = kHeadDim;
  for (auto _ : state) {
    run_merge_states_cpu(params);
    benchmark::DoNotOptimize(merged_lse.data());
  }
  state.SetBytesProcessed(state.iterations() * (kStates + 1) * rows * kHeadDim * 2);
}

constexpr auto kLengths = [](auto* bench) { bench->Arg(8192)->Arg(32768); };
BENCHMARK(attention_mass)->Apply(kLengths);
BENCHMARK_CAPTURE(block_scores, mean, BlockScoreMethod::kMean)->Apply(kLengths);
BENCHMARK_CAPTURE(block_scores, max_mean, BlockScoreMethod::kMaxMean)->Apply(kLengths);
BENCHMARK_CAPTURE(block_scores, antidiagonal, BlockScoreMethod::kAntidiagonal)->Apply(kLengths);
BENCHMARK(merge_states)->Apply(kLengths);

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
