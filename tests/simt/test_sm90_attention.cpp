// The Hopper kernel on CPU fibers, beside attention written out in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "cuda/sm90/attention.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Case {
  DType dtype = DType::kBFloat16;
  int64_t batch = 1, q_heads = 1, kv_heads = 1, seqlen_q = 128, seqlen_k = 128;
  int64_t head_dim = 64, head_dim_v = 64;
  Layout layout = Layout::kHeadsFirst;
  bool causal = true;
  int64_t window_left = -1, window_right = -1, num_sink_tokens = 0;
  double scale = 0.125, softcap = 0;
  bool sinks = false;
  bool ranges = false;
  std::vector<int32_t> seqused_k, cu_seqlens_q, cu_seqlens_k;
  int64_t heads_per_item = 1, block_rows = 128, num_splits = 1;
  // Block list: keep(head, query block, key block).
  int64_t block_size_k = 0, block_size_q = 128, pattern_heads = 1;
  std::function<bool(int64_t, int64_t, int64_t)> keep;
};

struct Span {
  int64_t batch, q_begin, q_len, k_begin, k_len;
};

std::vector<Span> spans(const Case& c) {
  std::vector<Span> result;
  if (c.cu_seqlens_q.empty()) {
    for (int64_t b = 0; b < c.batch; ++b) {
      result.push_back({b, 0, c.seqlen_q, 0, c.seqused_k.empty() ? c.seqlen_k : c.seqused_k[b]});
    }
    return result;
  }
  for (size_t s = 0; s + 1 < c.cu_seqlens_q.size(); ++s) {
    result.push_back({0, c.cu_seqlens_q[s], c.cu_seqlens_q[s + 1] - c.cu_seqlens_q[s],
                      c.cu_seqlens_k[s], c.cu_seqlens_k[s + 1] - c.cu_seqlens_k[s]});
  }
  return result;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Problem {
 public:
  explicit Problem(const Case& shape)
      : c(shape),
        q(c.dtype, c.batch, c.q_heads, c.seqlen_q, c.head_dim, c.layout),
        k(c.dtype, c.batch, c.kv_heads, c.seqlen_k, c.head_dim, c.layout),
        v(c.dtype, c.batch, c.kv_heads, c.seqlen_k, c.head_dim_v, c.layout) {
    std::mt19937 rng(11);
    q.fill_normal(rng);
    k.fill_normal(rng);
    v.fill_normal(rng);
    std::normal_distribution<float> normal;
    for (int64_t h = 0; h < c.q_heads; ++h) sink.push_back(normal(rng));
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t row = 0; row < c.seqlen_q; ++row) {  // two ranges, the last sometimes reversed
        const auto at = static_cast<int32_t>(row * c.seqlen_k / c.seqlen_q);
        for (const int32_t x : {at / 3, at / 2, at - 20, at + 1 + static_cast<int32_t>(row % 30) - 9}) {
          ranges.push_back(x);
        }
      }
    }
    unseen_is_nan();
    make_list();
  }

  // Keys and values that no row may see.
  void unseen_is_nan() {
    std::vector<bool> used(static_cast<size_t>(c.batch * c.seqlen_k));
    for (const Span& s : spans(c)) {
      for (int64_t i = 0; i < s.k_len; ++i) {
        for (int64_t row = 0; row < s.q_len; ++row) {
          if (visible(s, row, i)) used[s.batch * c.seqlen_k + s.k_begin + i] = true;
        }
      }
    }
    const auto wipe = [&](Tensor& t) {
      t.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
        if (!used[b * c.seqlen_k + row]) t.set(b, h, row, d, kNaN);
      });
    };
    wipe(k);
    wipe(v);
  }

  bool visible(const Span& s, int64_t row, int64_t key) const {
    const int64_t at = row + s.k_len - s.q_len;
    if (key >= s.k_len || (c.causal && key > at)) return false;
    const bool left = c.window_left < 0 || key >= at - c.window_left;
    const bool right = c.window_right < 0 || key <= at + c.window_right;
    if (!(left && right) && key >= c.num_sink_tokens) return false;
    if (!c.ranges) return true;
    const int32_t* r = &ranges[(s.batch * c.seqlen_q + s.q_begin + row) * 4];
    const int64_t place = key + s.k_begin;
    return (place >= r[0] && place < r[1]) || (place >= r[2] && place < r[3]);
  }

  // With entries to be skipped: -1, past the end, not ascending.
  void make_list() {
    if (c.block_size_k == 0) return;
    for (int64_t h = 0; h < c.pattern_heads; ++h) {
      for (const Span& s : spans(c)) {
        if (s.batch > 0) break;
        for (int64_t i = 0; i < ceil_div(s.q_len, c.block_size_q); ++i) {
          indptr.push_back(static_cast<int64_t>(indices.size()));
          int32_t last = -1;
          for (int64_t j = 0; j < ceil_div(s.k_len, c.block_size_k); ++j) {
            if (!c.keep(h, i, j)) continue;
            if (last >= 0 && j % 3 == 0) indices.push_back(last);
            last = static_cast<int32_t>(j);
            indices.push_back(last);
          }
          indices.push_back(static_cast<int32_t>(ceil_div(s.k_len, c.block_size_k)) + 5);
          indices.push_back(-1);
        }
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }

  AttentionParams params() {
    AttentionParams p;
    p.dtype = c.dtype;
    p.seqs.batch = c.batch;
    p.seqs.num_seqs = c.cu_seqlens_q.empty() ? c.batch : c.cu_seqlens_q.size() - 1;
    p.seqs.seqlen_q = c.seqlen_q;
    p.seqs.seqlen_k = c.seqlen_k;
    p.seqs.cu_seqlens_q = data_or_null(c.cu_seqlens_q);
    p.seqs.cu_seqlens_k = data_or_null(c.cu_seqlens_k);
    p.seqs.seqused_k = data_or_null(c.seqused_k);
    p.mask.causal = c.causal;
    p.mask.window_size_left = c.window_left;
    p.mask.window_size_right = c.window_right;
    p.mask.num_sink_tokens = c.num_sink_tokens;
    if (c.ranges) {
      p.mask.key_ranges = ranges.data();
      p.mask.num_key_ranges = 2;
      p.mask.key_ranges_batch_stride = c.seqlen_q * 4;
      p.mask.key_ranges_range_stride = 2;
      p.mask.key_ranges_row_stride = 4;
    }
    p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    p.sinks = c.sinks ? sink.data() : nullptr;
    p.num_q_heads = c.q_heads;
    p.num_kv_heads = c.kv_heads;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    p.softmax_scale = c.scale;
    p.softcap = c.softcap;
    return p;
  }
  BlockList list() const {
    BlockList blocks;
    blocks.block_indptr = indptr.data();
    blocks.block_indices = indices.data();
    blocks.capacity = static_cast<int64_t>(indices.size());
    blocks.pattern_heads = c.pattern_heads;
    blocks.num_q_blocks = static_cast<int64_t>(indptr.size()) / c.pattern_heads - 1;
    blocks.block_size_q = c.block_size_q;
    blocks.block_size_k = c.block_size_k;
    return blocks;
  }

  // out and lse of every row, from the formula.
  void reference(std::vector<double>& out, std::vector<double>& lse) const {
    out.assign(static_cast<size_t>(c.batch * c.q_heads * c.seqlen_q * c.head_dim_v), kNaN);
    lse.assign(static_cast<size_t>(c.batch * c.q_heads * c.seqlen_q), kNaN);
    const int64_t group = c.q_heads / c.kv_heads;
    for (const Span& s : spans(c)) {
      for (int64_t h = 0; h < c.q_heads; ++h) {
        for (int64_t row = 0; row < s.q_len; ++row) {
          std::vector<double> logits(static_cast<size_t>(s.k_len), -kInf);
          double top = -kInf;
          for (int64_t key = 0; key < s.k_len; ++key) {
            if (!visible(s, row, key)) continue;
            if (c.keep && !c.keep(h * c.pattern_heads / c.q_heads, row / c.block_size_q,
                                  key / c.block_size_k)) {
              continue;
            }
            double dot = 0;
            for (int64_t d = 0; d < c.head_dim; ++d) {
              dot += q.get(s.batch, h, s.q_begin + row, d) *
                     k.get(s.batch, h / group, s.k_begin + key, d);
            }
            dot *= c.scale;
            logits[key] = c.softcap > 0 ? c.softcap * std::tanh(dot / c.softcap) : dot;
            top = std::max(top, logits[key]);
          }
          const int64_t index = (s.batch * c.q_heads + h) * c.seqlen_q + s.q_begin + row;
          double sum = 0;
          for (const double x : logits) sum += x == -kInf ? 0 : std::exp(x - top);
          lse[index] = sum == 0 ? -kInf : top + std::log(sum);
          const double denominator = sum + (c.sinks && sum > 0 ? std::exp(sink[h] - top) : 0);
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            double acc = 0;
            for (int64_t key = 0; key < s.k_len; ++key) {
              if (logits[key] == -kInf) continue;
              acc += std::exp(logits[key] - top) / denominator *
                     v.get(s.batch, h / group, s.k_begin + key, d);
            }
            out[index * c.head_dim_v + d] = acc;
          }
        }
      }
    }
  }

  Case c;
  Tensor q, k, v;
  std::vector<float> sink;
  std::vector<int32_t> ranges;  // [batch, seqlen_q, 2, 2]
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
};

void launch(const Case& c, const AttentionParams& p, const BlockList* blocks,
            const cuda::AttentionPlan& plan) {
  const int64_t dim = std::max(c.head_dim, c.head_dim_v);
  if (c.dtype == DType::kFloat16) {
    ASSERT_LE(dim, 64);
    cuda::sm90::launch_attention<__half, 64>(p, blocks, plan);
  } else if (dim <= 64) {
    cuda::sm90::launch_attention<__nv_bfloat16, 64>(p, blocks, plan);
  } else if (dim <= 128) {
    cuda::sm90::launch_attention<__nv_bfloat16, 128>(p, blocks, plan);
  } else {
    cuda::sm90::launch_attention<__nv_bfloat16, 256>(p, blocks, plan);
  }
}

void check(const Case& c) {
  Problem problem(c);
  std::vector<double> expected, expected_lse;
  problem.reference(expected, expected_lse);
  in_every_mode([&] {
    simt::mode.hopper = true;
    Tensor out(c.dtype, c.batch, c.q_heads, c.seqlen_q, c.head_dim_v, c.layout);
    Tensor lse(DType::kFloat32, c.batch, c.q_heads, c.seqlen_q, 1);
    AttentionParams p = problem.params();
    p.out = out.view();
    p.lse = lse.data();
    const BlockList blocks = problem.list();
    const BlockList* list = c.block_size_k > 0 ? &blocks : nullptr;
    const char* why_not = "";
    ASSERT_TRUE(cuda::sm90::supports(p, list, cuda::device_limits(), &why_not)) << why_not;

    cuda::AttentionPlan plan;
    plan.op = "attention";
    plan.grid.block_rows = list != nullptr ? c.block_size_q : c.block_rows;
    plan.grid.blocks_per_seq = ceil_div(c.seqlen_q, plan.grid.block_rows) +
                               static_cast<int64_t>(c.cu_seqlens_q.size());
    plan.grid.heads_per_item = c.heads_per_item;
    plan.grid.head_groups = c.q_heads / c.heads_per_item;
    plan.grid.groups_at_a_time = c.batch * plan.grid.head_groups;
    plan.grid.num_splits = c.num_splits;
    const int64_t rows = c.batch * c.q_heads * c.seqlen_q;
    std::vector<float> part_out(static_cast<size_t>(c.num_splits * rows * c.head_dim_v), NAN);
    std::vector<float> part_lse(static_cast<size_t>(c.num_splits * rows), NAN);
    if (c.num_splits > 1) plan.partials = {part_out.data(), part_lse.data()};
    launch(c, p, list, plan);

    const double size = 4;  // of the largest values
    const auto expect_row = [&](int64_t b, int64_t h, int64_t row) {
      const int64_t index = (b * c.q_heads + h) * c.seqlen_q + row;
      if (std::isnan(expected_lse[index])) return;  // in no sequence
      double got_lse = 0;
      std::vector<double> got(static_cast<size_t>(c.head_dim_v));
      if (c.num_splits == 1) {
        got_lse = lse.get(b, h, row, 0);
        for (int64_t d = 0; d < c.head_dim_v; ++d) got[d] = out.get(b, h, row, d);
      } else {
        double total = 0;
        for (int64_t s = 0; s < c.num_splits; ++s) total += std::exp(part_lse[s * rows + index]);
        got_lse = std::log(total);
        for (int64_t s = 0; s < c.num_splits; ++s) {
          const double weight = std::exp(part_lse[s * rows + index]);
          if (weight == 0) continue;
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            got[d] += weight / total * part_out[(s * rows + index) * c.head_dim_v + d];
          }
        }
      }
      expect_close(got_lse, expected_lse[index], 2e-5, "lse");
      for (int64_t d = 0; d < c.head_dim_v; ++d) {
        expect_close(got[d], expected[index * c.head_dim_v + d], size * unit(c.dtype), "out");
      }
    };
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.q_heads; ++h) {
        for (int64_t row = 0; row < c.seqlen_q; ++row) {
          expect_row(b, h, row);
          if (testing::Test::HasFailure()) {
            FAIL() << "batch " << b << " head " << h << " row " << row;
          }
        }
      }
    }
    out.expect_gaps_untouched();
  });
}

TEST(sm90_attention, causal) {
  Case c;
  c.seqlen_q = c.seqlen_k = 300;
  check(c);
}

TEST(sm90_attention, head_dim_128) {
  Case c;
  c.seqlen_q = 70;
  c.seqlen_k = 460;
  c.head_dim = c.head_dim_v = 128;
  c.layout = Layout::kRowsFirst;
  c.q_heads = 2;
  check(c);
}

TEST(sm90_attention, head_dim_256) {
  Case c;
  c.seqlen_q = 40;
  c.seqlen_k = 200;
  c.head_dim = c.head_dim_v = 256;
  c.scale = 0.0625;
  check(c);
}

TEST(sm90_attention, odd_head_dims) {
  Case c;
  c.seqlen_q = 33;
  c.seqlen_k = 140;
  c.head_dim = 72;
  c.head_dim_v = 24;
  check(c);
  c.head_dim = 40;
  c.head_dim_v = 104;
  check(c);
}

TEST(sm90_attention, float16_window_softcap_sinks) {
  Case c;
  c.dtype = DType::kFloat16;
  c.seqlen_q = 150;
  c.seqlen_k = 520;
  c.window_left = 90;
  c.num_sink_tokens = 3;
  c.softcap = 2;
  c.sinks = true;
  check(c);
}

TEST(sm90_attention, not_causal_negative_scale) {
  Case c;
  c.causal = false;
  c.seqlen_q = 20;
  c.seqlen_k = 333;
  c.window_right = 200;
  c.scale = -0.2;
  check(c);
}

TEST(sm90_attention, grouped_heads) {
  Case c;
  c.q_heads = 6;
  c.kv_heads = 2;
  c.heads_per_item = 3;
  c.block_rows = 40;
  c.seqlen_q = 90;
  c.seqlen_k = 170;
  check(c);
}

TEST(sm90_attention, more_queries_than_keys) {
  Case c;
  c.seqlen_q = 200;
  c.seqlen_k = 60;
  c.sinks = true;
  check(c);
}

TEST(sm90_attention, static_cache) {
  Case c;
  c.batch = 3;
  c.seqlen_q = 5;
  c.seqlen_k = 300;
  c.seqused_k = {130, 0, 300};
  c.q_heads = 4;
  c.heads_per_item = 4;
  c.block_rows = 8;
  check(c);
}

TEST(sm90_attention, packed) {
  Case c;
  c.cu_seqlens_q = {0, 70, 70, 90, 260};
  c.cu_seqlens_k = {0, 130, 150, 150, 400};
  c.seqlen_q = 265;
  c.seqlen_k = 405;
  c.q_heads = 2;
  c.heads_per_item = 2;
  c.block_rows = 64;
  check(c);
}

TEST(sm90_attention, key_ranges) {
  Case c;
  c.ranges = true;
  c.causal = false;
  c.seqlen_q = 140;
  c.seqlen_k = 600;
  check(c);
}

TEST(sm90_attention, splits) {
  Case c;
  c.seqlen_q = 60;
  c.seqlen_k = 700;
  c.num_splits = 3;
  check(c);
}

TEST(sm90_attention, blocks_of_64) {
  Case c;
  c.seqlen_q = c.seqlen_k = 500;
  c.block_size_k = 64;
  c.block_size_q = 64;
  c.keep = [](int64_t, int64_t i, int64_t j) { return (i * 5 + j * 3) % 4 < 2; };
  check(c);
}

TEST(sm90_attention, blocks_of_128_per_kv_head) {
  Case c;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.heads_per_item = 2;
  c.pattern_heads = 2;
  c.seqlen_q = 130;
  c.seqlen_k = 600;
  c.block_size_k = 128;
  c.block_size_q = 32;
  c.num_splits = 2;
  c.keep = [](int64_t h, int64_t i, int64_t j) { return (h + i + j) % 2 == 0; };
  check(c);
}

TEST(sm90_attention, blocks_of_128_head_dim_256) {
  Case c;
  c.head_dim = c.head_dim_v = 256;
  c.scale = 0.0625;
  c.seqlen_q = 64;
  c.seqlen_k = 400;
  c.block_size_k = 128;
  c.block_size_q = 64;
  c.keep = [](int64_t, int64_t, int64_t j) { return j != 1; };
  check(c);
}

TEST(sm90_attention, packed_blocks) {
  Case c;
  c.cu_seqlens_q = {0, 70, 70, 200};
  c.cu_seqlens_k = {0, 130, 150, 405};
  c.seqlen_q = 200;
  c.seqlen_k = 405;
  c.block_size_k = 64;
  c.block_size_q = 128;
  c.keep = [](int64_t, int64_t, int64_t j) { return j % 2 == 0; };
  check(c);
}

}  // namespace
}  // namespace longctx::simt_tests
