#include "linear_check.h"

#include <gtest/gtest.h>

#include "cuda/kernels.h"
#include "longctx/sequence.h"

namespace longctx::simt_tests {
namespace {

// What the op returns, in float64, by loops over pairs of tokens.
class LinearProblem {
 public:
  explicit LinearProblem(const LinearCase& c)
      : c(c),
        q(c.dtype, c.batch, c.num_q_heads, c.seqlen_q, c.head_dim, c.layout),
        k(c.dtype, c.batch, c.num_kv_heads, c.seqlen_k, c.head_dim, c.layout),
        v(c.dtype, c.batch, c.num_kv_heads, c.seqlen_k, c.head_dim_v, c.layout) {
    std::mt19937 rng(11);
    std::normal_distribution<double> normal;
    const auto fill = [&](Tensor& tensor) {
      tensor.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
        const double value = normal(rng) * c.size;
        // A sum of weights far from 0.
        tensor.set(b, h, row, d, c.normalize ? std::fabs(value) : value);
      });
    };
    fill(q);
    fill(k);
    v.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
      v.set(b, h, row, d, normal(rng) * c.size);
    });
    if (c.decay != Decay::kNone) {
      const int64_t count =
          c.decay == Decay::kPerHead ? c.num_q_heads : c.batch * c.num_q_heads * c.seqlen_k;
      for (int64_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(-c.decay_size * std::fabs(normal(rng)));
        log_decay.push_back(i % 5 == 4 ? 0.0f : i % 67 == 3 ? -INFINITY : value);
      }
    }
    if (c.initial_state) {
      initial.resize(static_cast<size_t>(c.num_seqs() * c.num_q_heads * state_size()));
      for (float& x : initial) {
        const double value = normal(rng);
        x = static_cast<float>(c.normalize ? std::fabs(value) : value);
      }
    }
  }

  int64_t state_size() const { return c.head_dim * c.state_dim(); }

  LinearAttentionParams params() {
    LinearAttentionParams p;
    p.dtype = c.dtype;
    p.seqs.batch = c.batch;
    p.seqs.num_seqs = c.num_seqs();
    p.seqs.seqlen_q = c.seqlen_q;
    p.seqs.seqlen_k = c.seqlen_k;
    p.seqs.cu_seqlens_q = p.seqs.cu_seqlens_k = data_or_null(c.cu_seqlens);
    if (c.rows) p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    p.log_decay = {data_or_null(log_decay), false, c.decay == Decay::kPerToken};
    p.initial_state = data_or_null(initial);
    p.num_q_heads = c.num_q_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    p.causal = c.causal;
    p.reverse = c.reverse;
    p.normalize = c.normalize;
    p.wide_out = c.wide_out;
    p.scale = kScale;
    p.eps = kEps;
    p.num_segments = c.num_segments;
    return p;
  }

  // One (sequence, head): the sums of log decays before each token and behind the last one.
  std::vector<double> sums(const Sequence& seq, int64_t head) const {
    const LogDecay decay{data_or_null(log_decay), false, c.decay == Decay::kPerToken};
    const int64_t length = std::max(seq.q_len, seq.k_len);
    std::vector<double> sums(1, 0.0);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t token = c.decay == Decay::kPerToken ? seq.k_begin + i : 0;
      sums.push_back(sums.back() +
                     log_decay_at(decay, seq.batch_index, c.num_q_heads, head, c.seqlen_k, token));
    }
    return sums;
  }

  // Element (d, column) of k v^T of a token.
  double added(const Sequence& seq, int64_t head, int64_t token, int64_t d, int64_t column) const {
    const int64_t kv_head = head / (c.num_q_heads / c.num_kv_heads), row = seq.k_begin + token;
    return k.get(seq.batch_index, kv_head, row, d) *
           (column < c.head_dim_v ? v.get(seq.batch_index, kv_head, row, column) : 1.0);
  }

  double initial_at(int64_t sequence, int64_t head, int64_t element) const {
    if (initial.empty()) return 0;
    return initial[(sequence * c.num_q_heads + head) * state_size() + element];
  }

  // The state behind the first `count` tokens; reversed, the state before the last `count`.
  std::vector<double> state(const Sequence& seq, int64_t sequence, int64_t head,
                            int64_t count) const {
    const std::vector<double> g = sums(seq, head);
    const int64_t n = seq.k_len;
    const double carry = std::exp(c.reverse ? g[n] - g[n - count] : g[count]);
    std::vector<double> state;
    for (int64_t element = 0; element < state_size(); ++element) {
      state.push_back(carry * initial_at(sequence, head, element));
    }
    for (int64_t t = c.reverse ? n - count : 0; t < (c.reverse ? n : count); ++t) {
      const double weight = std::exp(c.reverse ? g[t + 1] - g[n - count] : g[count] - g[t + 1]);
      for (int64_t element = 0; element < state_size(); ++element) {
        state[element] +=
            weight * added(seq, head, t, element / c.state_dim(), element % c.state_dim());
      }
    }
    return state;
  }

  std::vector<double> row(const Sequence& seq, int64_t sequence, int64_t head, int64_t i) const {
    const std::vector<double> g = sums(seq, head);
    std::vector<double> row(static_cast<size_t>(c.state_dim()));
    const auto query = [&](int64_t d) { return q.get(seq.batch_index, head, seq.q_begin + i, d); };
    const double from_state = std::exp(c.reverse ? g[seq.k_len] - g[i + 1] : g[i + 1]);
    for (int64_t d = 0; d < c.head_dim; ++d) {
      for (int64_t e = 0; e < c.state_dim(); ++e) {
        row[e] += from_state * query(d) * initial_at(sequence, head, d * c.state_dim() + e);
      }
    }
    const int64_t kv_head = head / (c.num_q_heads / c.num_kv_heads);
    for (int64_t j = 0; j < seq.k_len; ++j) {
      if (c.causal && (c.reverse ? j < i : j > i)) continue;
      double score = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        score += query(d) * k.get(seq.batch_index, kv_head, seq.k_begin + j, d);
      }
      score *= std::exp(-std::fabs(g[i + 1] - g[j + 1]));
      for (int64_t e = 0; e < c.state_dim(); ++e) {
        row[e] +=
            score * (e < c.head_dim_v ? v.get(seq.batch_index, kv_head, seq.k_begin + j, e) : 1.0);
      }
    }
    const double scale = c.normalize ? kScale / (row.back() + kEps) : kScale;
    for (double& x : row) x *= scale;
    row.resize(static_cast<size_t>(c.head_dim_v));
    return row;
  }

  static constexpr double kScale = 0.25, kEps = 0.5;
  LinearCase c;
  Tensor q, k, v;
  std::vector<float> log_decay;
  std::vector<float> initial;
};

// The error of every element beside the root mean square of all that belong together.
void expect_near(DType dtype, const std::vector<double>& got, const std::vector<double>& expected,
                 const std::string& what) {
  ASSERT_EQ(got.size(), expected.size());
  double squares = 0, errors = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    squares += expected[i] * expected[i];
    errors += (got[i] - expected[i]) * (got[i] - expected[i]);
  }
  const double tolerance = dtype == DType::kBFloat16  ? 5e-3
                           : dtype == DType::kFloat16 ? 1.5e-3
                                                      : 1e-5;
  const double bound = tolerance * std::sqrt(squares);
  EXPECT_LE(std::sqrt(errors), bound) << what;
  const double rms = std::sqrt(squares / static_cast<double>(got.size()));
  for (size_t i = 0; i < got.size() && !testing::Test::HasFailure(); ++i) {
    expect_close(got[i], expected[i], 12 * tolerance * rms, what + " " + std::to_string(i));
  }
}

}  // namespace

void check_linear(const LinearCase& c) {
  LinearProblem problem(c);
  const int64_t maps = c.num_seqs() * c.num_q_heads, size = problem.state_size();
  struct Expected {
    std::vector<double> out, final_state;
    std::vector<std::vector<double>> chunks;
  };
  std::vector<Expected> expected(static_cast<size_t>(maps));
  const SequenceParams seqs = problem.params().seqs;
  for (int64_t s = 0; s < c.num_seqs(); ++s) {
    const Sequence seq = sequence_at(seqs, s);
    for (int64_t head = 0; head < c.num_q_heads; ++head) {
      Expected& e = expected[s * c.num_q_heads + head];
      if (c.rows) {
        for (int64_t i = 0; i < seq.q_len; ++i) {
          for (const double x : problem.row(seq, s, head, i)) e.out.push_back(x);
        }
        e.final_state = problem.state(seq, s, head, seq.k_len);
        continue;
      }
      for (int64_t first = 0; first < seq.k_len; first += kLinearChunk) {
        const int64_t count =
            c.reverse ? seq.k_len - first : std::min<int64_t>(first + kLinearChunk, seq.k_len);
        e.chunks.push_back(problem.state(seq, s, head, count));
      }
    }
  }
  in_every_mode([&] {
    Tensor out(c.wide_out ? DType::kFloat32 : c.dtype, c.batch, c.num_q_heads,
               c.rows ? c.seqlen_q : 0, c.head_dim_v);
    std::vector<float> final_state(static_cast<size_t>(c.rows ? maps * size : 0), NAN);
    std::vector<float> chunks(
        static_cast<size_t>(c.rows ? 0 : c.batch * c.num_q_heads * c.num_chunks() * size), NAN);
    LinearAttentionParams params = problem.params();
    if (c.rows) {
      params.out = out.view();
      params.final_state = final_state.data();
    } else {
      params.chunk_states = chunks.data();
      params.num_chunks = c.num_chunks();
    }
    cuda::run_linear_attention_cuda(params);
    out.expect_gaps_untouched();
    int64_t chunk_row = 0;
    for (int64_t s = 0; s < c.num_seqs(); ++s) {
      const Sequence seq = sequence_at(seqs, s);
      if (c.cu_seqlens.empty()) chunk_row = 0;
      int64_t num_chunks = 0;
      for (int64_t head = 0; head < c.num_q_heads; ++head) {
        const int64_t map = s * c.num_q_heads + head;
        const Expected& e = expected[map];
        const std::string which = " of head " + std::to_string(map);
        const auto slice = [&](const std::vector<float>& from, int64_t index) {
          return std::vector<double>(from.begin() + index * size,
                                     from.begin() + (index + 1) * size);
        };
        if (c.rows) {
          std::vector<double> got;
          for (int64_t i = 0; i < seq.q_len; ++i) {
            for (int64_t d = 0; d < c.head_dim_v; ++d) {
              got.push_back(out.get(seq.batch_index, head, seq.q_begin + i, d));
            }
          }
          expect_near(c.dtype, got, e.out, "out" + which);
          expect_near(c.dtype, slice(final_state, map), e.final_state, "final_state" + which);
        }
        num_chunks = static_cast<int64_t>(e.chunks.size());
        for (int64_t i = 0; i < num_chunks; ++i) {
          const int64_t first = (seq.batch_index * c.num_q_heads + head) * c.num_chunks();
          expect_near(c.dtype, slice(chunks, first + chunk_row + i), e.chunks[i],
                      "chunk " + std::to_string(i) + which);
        }
      }
      chunk_row += num_chunks;
    }
    if (c.cu_seqlens.empty()) return;
    // What no sequence owns is zero.
    for (int64_t head = 0; head < c.num_q_heads; ++head) {
      for (int64_t i = 0; c.rows && i < c.seqlen_q; ++i) {
        if (i < c.cu_seqlens.back()) continue;
        for (int64_t d = 0; d < c.head_dim_v; ++d) EXPECT_EQ(out.get(0, head, i, d), 0.0);
      }
      for (int64_t i = chunk_row; !c.rows && i < c.num_chunks(); ++i) {
        for (int64_t at = 0; at < size; ++at) {
          EXPECT_EQ(chunks[(head * c.num_chunks() + i) * size + at], 0.0f);
        }
      }
    }
  });
}

void check_linear_resumes(const LinearCase& c) {
  LinearProblem problem(c);
  in_every_mode([&] {
    constexpr int64_t kSplit = 64;
    std::vector<float> final_states[2];
    Tensor outs[2];
    for (const bool split : {false, true}) {
      Tensor& out = outs[split];
      out = Tensor(c.dtype, 1, 1, c.seqlen_q, c.head_dim_v);
      std::vector<float> state(problem.initial), next(state.size());
      for (int64_t first = 0; first < c.seqlen_q;) {
        const int64_t end = split && first == 0 ? kSplit : c.seqlen_q;
        LinearAttentionParams p = problem.params();
        const auto skip = [&](TensorView view) {
          view.data =
              static_cast<char*>(view.data) + first * view.seq_stride * element_bytes(c.dtype);
          return view;
        };
        p.q = skip(p.q), p.k = skip(p.k), p.v = skip(p.v), p.out = skip(out.view());
        p.seqs.seqlen_q = p.seqs.seqlen_k = end - first;
        p.log_decay.data = problem.log_decay.data() + first;
        p.initial_state = state.data();
        p.final_state = next.data();
        cuda::run_linear_attention_cuda(p);
        state = next;
        first = end;
      }
      final_states[split] = state;
    }
    EXPECT_EQ(std::memcmp(final_states[0].data(), final_states[1].data(),
                          final_states[0].size() * sizeof(float)),
              0);
    outs[0].for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
      EXPECT_EQ(outs[0].get(b, h, row, d), outs[1].get(b, h, row, d));
    });
  });
}

}  // namespace longctx::simt_tests
