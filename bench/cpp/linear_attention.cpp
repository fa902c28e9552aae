// Linear attention without torch, one thread, 8 heads, a decay per head. Arguments: L / head_dim.
// FLOP/s count the lower triangle of pairs; bytes are q, k, v read and out written once, or, for
// decode, a state read and written.
#include <benchmark/benchmark.h>

#include <vector>

#include "cpu/kernels.h"
#include "inputs.h"
#include "longctx/decay.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kHeads = 8;

template <class T, bool reverse = false>
void linear_attention(benchmark::State& state) {
  const int64_t seqlen = state.range(0), head_dim = state.range(1);
  Tensor<T> q(kHeads, seqlen, head_dim), k(kHeads, seqlen, head_dim), v(kHeads, seqlen, head_dim),
      out(kHeads, seqlen, head_dim);
  const std::vector<float> log_decay(kHeads, -0.01f);
  std::vector<float> final_state(kHeads * head_dim * head_dim);
  LinearAttentionParams params;
  params.dtype = dtype_of<T>();
  params.seqs = one_sequence(seqlen, seqlen);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = out.view();
  params.log_decay.data = log_decay.data();
  params.final_state = final_state.data();
  params.reverse = reverse;
  params.num_q_heads = params.num_kv_heads = kHeads;
  params.head_dim = params.head_dim_v = head_dim;
  for (auto _ : state) {
    run_linear_attention_cpu(params);
    benchmark::DoNotOptimize(final_state.data());
  }
  const double tokens = static_cast<double>(state.iterations() * kHeads * seqlen);
  const double flops = head_dim * (2.0 * kLinearChunk + 4.0 * head_dim);
  state.counters["FLOP/s"] = benchmark::Counter(tokens * flops, benchmark::Counter::kIsRate);
  state.SetBytesProcessed(static_cast<int64_t>(tokens) * 4 * head_dim * sizeof(T));
}

template <class T>
void linear_attention_decode(benchmark::State& state) {
  const int64_t heads = state.range(0), head_dim = state.range(1);
  Tensor<T> q(heads, 1, head_dim), k(heads, 1, head_dim), v(heads, 1, head_dim),
      out(heads, 1, head_dim);
  const std::vector<float> log_decay(heads, -0.01f);
  std::vector<float> states(heads * head_dim * head_dim);
  LinearAttentionDecodeParams params;
  params.dtype = dtype_of<T>();
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = out.view();
  params.log_decay.data = log_decay.data();
  params.state = {states.data(), heads * head_dim * head_dim, head_dim * head_dim, head_dim};
  params.batch = params.num_slots = params.num_tokens = 1;
  params.num_q_heads = params.num_kv_heads = heads;
  params.head_dim = params.head_dim_v = head_dim;
  for (auto _ : state) {
    run_linear_attention_decode_cpu(params);
    benchmark::DoNotOptimize(states.data());
  }
  state.SetBytesProcessed(state.iterations() * heads * head_dim * head_dim * 8);
}

constexpr auto kShapes = [](auto* bench) {
  bench->ArgNames({"L", "D"})->Args({1024, 128})->Args({8192, 64})->Args({8192, 128});
};
BENCHMARK(linear_attention<BFloat16>)->Apply(kShapes);
BENCHMARK(linear_attention<Float16>)->Apply(kShapes);
BENCHMARK(linear_attention<float>)->Apply(kShapes);
BENCHMARK(linear_attention<BFloat16, true>)->Apply(kShapes);
BENCHMARK(linear_attention<float, true>)->Apply(kShapes);
BENCHMARK(linear_attention_decode<BFloat16>)->ArgNames({"heads", "D"})->Args({64, 128});
BENCHMARK(linear_attention_decode<float>)->ArgNames({"heads", "D"})->Args({64, 128});

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
