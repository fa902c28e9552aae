// topk_select without torch, one thread: 8 rows, the best 2048. Arguments: scores in a row, kind of
// row. `read` is the floor: the same bytes, only compared.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/topk_kernels.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kRows = 8, kBest = 2048;

enum Kind { kRandom, kAscending, kDescending, kConstant, kTies, kNaN };

template <class T>
std::vector<T> scores(int64_t n, int64_t kind) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> row(static_cast<size_t>(n));
  std::vector<T> all;
  for (int64_t r = 0; r < kRows; ++r) {
    for (float& x : row) {
      x = kind == kConstant ? 1.0f : kind == kNaN ? __builtin_nanf("") : normal(rng);
      if (kind == kTies) x = __builtin_roundf(x);
    }
    if (kind == kAscending) std::sort(row.begin(), row.end());
    if (kind == kDescending) std::sort(row.begin(), row.end(), std::greater<>());
    for (const float x : row) {
      all.emplace_back();
      narrow(x, all.back());
    }
  }
  return all;
}

template <class T>
void topk(benchmark::State& state, Isa isa) {
  const Isa before = active_isa();
  force_isa(isa);
  const int64_t n = state.range(0);
  const std::vector<T> rows = scores<T>(n, state.range(1));
  std::vector<int32_t> indices(kRows * kBest), counts(kRows);
  TopKSelectParams params;
  params.scores.dtype = dtype_of<T>();
  params.scores.data = rows.data();
  params.scores.n = n;
  params.scores.num_rows = params.scores.sizes[0] = kRows;
  params.scores.num_dims = 1;
  params.scores.strides[0] = n;
  params.k = kBest;
  params.indices = indices.data();
  params.counts = counts.data();
  for (auto _ : state) {
    run_topk_select_cpu(params);
    benchmark::DoNotOptimize(indices.data());
  }
  state.SetBytesProcessed(state.iterations() * kRows * n * static_cast<int64_t>(sizeof(T)));
  force_isa(before);
}

void read(benchmark::State& state) {
  const int64_t n = kRows * state.range(0);
  const std::vector<uint32_t> row(static_cast<size_t>(n), 1);
  std::vector<uint32_t> keys(2 * kListSlack);
  std::vector<int32_t> indices(2 * kListSlack);
  ScoreList list{keys.data(), indices.data(), kListSlack, 0};
  const BitRange none =
      bits_from_key(infinity_key(float_format(DType::kFloat32)), float_format(DType::kFloat32));
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        choose_topk_kernels(active_isa()).scan32(row.data(), 0, n, none, list));
  }
  state.SetBytesProcessed(state.iterations() * n * 4);
}

constexpr auto kAll = [](auto* bench) {
  for (const int64_t n : {1 << 13, 1 << 17, 1 << 20}) {
    for (const int64_t kind : {kRandom, kAscending, kDescending, kConstant, kTies, kNaN}) {
      bench->Args({n, kind});
    }
  }
};
constexpr auto kRandomOnly = [](auto* bench) {
  for (const int64_t n : {1 << 17, 1 << 20}) bench->Args({n, kRandom});
};

void float32(benchmark::State& state, Isa isa) { topk<float>(state, isa); }
void bfloat16(benchmark::State& state, Isa isa) { topk<BFloat16>(state, isa); }
void float16(benchmark::State& state, Isa isa) { topk<Float16>(state, isa); }

BENCHMARK(read)->Arg(1 << 13)->Arg(1 << 17)->Arg(1 << 20);
BENCHMARK_CAPTURE(float32, best, detected_isa())->Apply(kAll);
BENCHMARK_CAPTURE(bfloat16, best, detected_isa())->Apply(kRandomOnly);
BENCHMARK_CAPTURE(float16, best, detected_isa())->Apply(kRandomOnly);
BENCHMARK_CAPTURE(float32, generic, Isa::kGeneric)->Apply(kRandomOnly);
BENCHMARK_CAPTURE(float32, avx2, Isa::kAvx2)->Apply(kRandomOnly);

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
