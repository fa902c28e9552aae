// The attention kernels without torch: time, and FLOP/s counted from the visible (query, key)
// pairs. Arguments: L / head_dim / num_kv_heads (8 query heads) / density in percent (100: dense) /
// threads.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/strip_engine.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kQueryHeads = 8;
constexpr int64_t kBlock = 128;

int64_t threads = 1;

void run_on_threads(int64_t n, RangeBody body, void* context) {
  std::vector<std::thread> workers;
  for (int64_t i = 1; i < n; ++i) workers.emplace_back([=] { body(i, i + 1, context); });
  body(0, 1, context);
  for (std::thread& worker : workers) worker.join();
}

// Causal rows that keep each earlier block with probability `density` and always their own.
struct RandomBlocks {
  RandomBlocks(int64_t heads, int64_t seqlen, double density) {
    std::mt19937 rng(11);
    std::bernoulli_distribution keep(density);
    for (int64_t head = 0; head < heads; ++head) {
      indptr.push_back(static_cast<int64_t>(indices.size()));
      for (int64_t row = 0; row < seqlen / kBlock; ++row) {
        for (int64_t block = 0; block < row; ++block) {
          if (!keep(rng)) continue;
          indices.push_back(static_cast<int32_t>(block));
          pairs += kBlock * kBlock;
        }
        indices.push_back(static_cast<int32_t>(row));
        pairs += kBlock * (kBlock + 1) / 2;
        indptr.push_back(static_cast<int64_t>(indices.size()));
      }
    }
  }
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
  double pairs = 0;  // (query, key) pairs of all pattern heads
};

template <class T>
void attention(benchmark::State& state) {
  const int64_t seqlen = state.range(0), head_dim = state.range(1), num_kv_heads = state.range(2);
  const bool dense = state.range(3) == 100;
  threads = state.range(4);
  Tensor<T> q(kQueryHeads, seqlen, head_dim), k(num_kv_heads, seqlen, head_dim),
      v(num_kv_heads, seqlen, head_dim), out(kQueryHeads, seqlen, head_dim);
  std::vector<float> lse(kQueryHeads * seqlen);
  const RandomBlocks blocks(num_kv_heads, seqlen, static_cast<double>(state.range(3)) / 100.0);

  BlockSparseAttentionParams params;
  params.dtype = dtype_of<T>();
  params.seqs.batch = params.seqs.num_seqs = 1;
  params.seqs.seqlen_q = params.seqs.seqlen_k = seqlen;
  params.mask.causal = true;
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = out.view();
  params.lse = lse.data();
  params.num_q_heads = kQueryHeads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = params.head_dim_v = head_dim;
  params.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  params.blocks.block_indptr = blocks.indptr.data();
  params.blocks.block_indices = blocks.indices.data();
  params.blocks.capacity = static_cast<int64_t>(blocks.indices.size());
  params.blocks.pattern_heads = num_kv_heads;
  params.blocks.num_q_blocks = seqlen / kBlock;
  params.blocks.block_size_q = params.blocks.block_size_k = kBlock;

  for (auto _ : state) {
    if (dense) {
      run_attention_cpu(params);
    } else {
      run_block_sparse_attention_cpu(params);
    }
    benchmark::ClobberMemory();
  }
  const double pairs = dense ? 0.5 * static_cast<double>(seqlen * (seqlen + 1) * kQueryHeads)
                             : blocks.pairs * static_cast<double>(kQueryHeads / num_kv_heads);
  state.counters["FLOP/s"] = benchmark::Counter(4.0 * static_cast<double>(head_dim) * pairs,
                                                benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel(choose_engine(params.dtype, active_isa()).name);
}

void cases(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"L", "D", "kv", "density", "threads"});
  for (const int64_t head_dim : {64, 128}) {
    for (const int64_t density : {100, 10}) bench->Args({8192, head_dim, 8, density, 1});
  }
  bench->Args({8192, 128, 2, 10, 1})->Args({8192, 128, 8, 100, 2});
  bench->Unit(benchmark::kMillisecond)->UseRealTime();
}

BENCHMARK(attention<BFloat16>)->Apply(cases);
BENCHMARK(attention<Float16>)->Apply(cases);
BENCHMARK(attention<float>)->Apply(cases);

}  // namespace
}  // namespace longctx::cpu

int main(int argc, char** argv) {
  using namespace longctx::cpu;
  set_thread_pool({[] { return threads; }, run_on_threads});
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
