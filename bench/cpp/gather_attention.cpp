// gather_attention without torch, one thread, bf16, 2 kv heads, 2048 keys a head. Arguments: keys
// to choose from / query heads of a kv head / keys of an entry. Each iteration chooses other keys,
// so that none are in the cache; bytes are the rows of K and V that are read. read_rows does
// nothing but read such rows: what the memory allows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "inputs.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kKvHeads = 2, kDim = 128, kKept = 2048, kTurns = 256;
constexpr int64_t kRowBytes = kDim * sizeof(BFloat16);

// [kTurns][kKvHeads][kKept / block_size] ascending block numbers.
std::vector<int32_t> choose(int64_t num_keys, int64_t block_size) {
  std::mt19937 rng(3);
  std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(num_keys / block_size - 1));
  const int64_t entries = kKept / block_size;
  std::vector<int32_t> chosen(kTurns * kKvHeads * entries);
  for (int32_t& entry : chosen) entry = any(rng);
  for (int64_t i = 0; i < kTurns * kKvHeads; ++i) {
    std::sort(chosen.begin() + i * entries, chosen.begin() + (i + 1) * entries);
  }
  return chosen;
}

void gather_attention(benchmark::State& state) {
  const int64_t num_keys = state.range(0), group_size = state.range(1), block_size = state.range(2);
  Tensor<BFloat16> q(kKvHeads * group_size, 1, kDim), out(kKvHeads * group_size, 1, kDim);
  Tensor<BFloat16> k(kKvHeads, num_keys, kDim), v(kKvHeads, num_keys, kDim);
  std::vector<float> lse(kKvHeads * group_size);
  const std::vector<int32_t> chosen = choose(num_keys, block_size);
  GatherAttentionParams params;
  params.dtype = DType::kBFloat16;
  params.seqs = one_sequence(1, num_keys);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = out.view();
  params.lse = lse.data();
  params.num_entries = kKept / block_size;
  params.index_heads = params.num_kv_heads = kKvHeads;
  params.block_size_k = block_size;
  params.num_q_heads = kKvHeads * group_size;
  params.head_dim = params.head_dim_v = kDim;
  params.softmax_scale = 0.088;
  int64_t turn = 0;
  for (auto _ : state) {
    const int32_t* indices = chosen.data() + turn++ % kTurns * kKvHeads * params.num_entries;
    params.indices = {indices, 0, params.num_entries, params.num_entries};
    run_gather_attention_cpu(params);
    benchmark::DoNotOptimize(lse.data());
  }
  state.SetBytesProcessed(state.iterations() * kKvHeads * kKept * 2 * kRowBytes);
}

void read_rows(benchmark::State& state) {
  const int64_t num_keys = state.range(0);
  constexpr int64_t kAhead = 32;
  const std::vector<uint64_t> rows(2 * kKvHeads * num_keys * kRowBytes / 8, 1);
  const std::vector<int32_t> chosen = choose(num_keys, 1);
  const auto row = [&](int64_t head, int64_t tensor, int32_t key) {
    return rows.data() + ((head * 2 + tensor) * num_keys + key) * (kRowBytes / 8);
  };
  int64_t turn = 0;
  for (auto _ : state) {
    uint64_t sum = 0;
    for (int64_t head = 0; head < kKvHeads; ++head) {
      const int32_t* keys = chosen.data() + (turn % kTurns * kKvHeads + head) * kKept;
      for (int64_t i = 0; i < kKept; ++i) {
        for (int64_t tensor = 0; tensor < 2; ++tensor) {
          const uint64_t* ahead = row(head, tensor, keys[std::min(i + kAhead, kKept - 1)]);
          const uint64_t* here = row(head, tensor, keys[i]);
          for (int64_t line = 0; line < kRowBytes / 64; ++line) {
            __builtin_prefetch(ahead + line * 8, 0, 2);
            sum += here[line * 8];
          }
        }
      }
    }
    ++turn;
    benchmark::DoNotOptimize(sum);
  }
  state.SetBytesProcessed(state.iterations() * kKvHeads * kKept * 2 * kRowBytes);
}

BENCHMARK(gather_attention)
    ->ArgNames({"keys", "group", "block"})
    ->ArgsProduct({{1 << 17, 1 << 20}, {1, 4, 8}, {1, 16}});
BENCHMARK(read_rows)->ArgName("keys")->Arg(1 << 17)->Arg(1 << 20);

}  // namespace
}  // namespace longctx::cpu

BENCHMARK_MAIN();
