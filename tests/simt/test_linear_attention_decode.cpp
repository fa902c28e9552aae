#include <gtest/gtest.h>

#include "cuda/kernels.h"
#include "tensors.h"

namespace longctx::simt_tests {
namespace {

struct Decode {
  DType dtype = DType::kFloat32;
  int64_t batch = 2;
  int64_t num_q_heads = 2;
  int64_t num_kv_heads = 1;
  int64_t num_tokens = 1;
  int64_t head_dim = 16;
  int64_t head_dim_v = 16;
  bool normalize = false;
  bool per_token = false;
  Layout layout = Layout::kHeadsFirst;        // of q, k, v and out
  Layout state_layout = Layout::kHeadsFirst;  // of the pool
  int64_t num_slots = 2;
  std::vector<int32_t> state_indices;
  std::vector<int32_t> commit;
};

// Loops over the formula; `state` is what the call is given and what it should leave.
class Exact {
 public:
  Exact(const Decode& c, const Tensor& q, const Tensor& k, const Tensor& v,
        const std::vector<float>& log_decay, const LinearAttentionDecodeParams& params)
      : c_(c), q_(q), k_(k), v_(v), log_decay_(log_decay), params_(params) {}

  // visit_out(b, h, t, column, value, error) and visit_state(slot, h, d, column, value).
  template <class VisitOut, class VisitState>
  void run(const Tensor& state, const VisitOut& visit_out, const VisitState& visit_state) const {
    for (int64_t b = 0; b < c_.batch; ++b) {
      const int64_t slot = c_.state_indices.empty() ? b : c_.state_indices[b];
      const bool present = slot >= 0 && slot < c_.num_slots;
      for (int64_t h = 0; h < c_.num_q_heads; ++h) {
        if (present) {
          step(b, h, slot, state, visit_out, visit_state);
          continue;
        }
        for (int64_t t = 0; t < c_.num_tokens; ++t) {
          for (int64_t e = 0; e < c_.head_dim_v; ++e) visit_out(b, h, t, e, 0.0, 0.0);
        }
      }
    }
  }

 private:
  template <class VisitOut, class VisitState>
  void step(int64_t b, int64_t h, int64_t slot, const Tensor& state, const VisitOut& visit_out,
            const VisitState& visit_state) const {
    const int64_t kv_head = h / (c_.num_q_heads / c_.num_kv_heads);
    const int64_t kept = c_.commit.empty() ? c_.num_tokens : c_.commit[b];
    const int64_t columns = params_.state_dim();
    std::vector<double> s(c_.head_dim * columns);
    const auto each = [&](const auto& visit) {
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        for (int64_t e = 0; e < columns; ++e) visit(d, e, s[d * columns + e]);
      }
    };
    each([&](int64_t d, int64_t e, double& x) { x = state.get(slot, h, d, e); });
    const auto tell_state = [&] {
      each([&](int64_t d, int64_t e, double x) { visit_state(slot, h, d, e, x); });
    };
    if (kept <= 0) tell_state();
    for (int64_t t = 0; t < c_.num_tokens; ++t) {
      const double decay = std::exp(log_decay_at(b, h, t));
      each([&](int64_t d, int64_t e, double& x) {
        const double value = e < c_.head_dim_v ? v_.get(b, kv_head, t, e) : 1.0;
        x = (decay == 0 ? 0.0 : decay * x) + k_.get(b, kv_head, t, d) * value;
      });
      std::vector<double> sums(columns), magnitudes(columns);
      each([&](int64_t d, int64_t e, double x) {
        sums[e] += q_.get(b, h, t, d) * x;
        magnitudes[e] += std::fabs(q_.get(b, h, t, d) * x);
      });
      for (int64_t e = 0; e < c_.head_dim_v; ++e) {
        const double scale =
            c_.normalize ? params_.scale / (sums[columns - 1] + params_.eps) : params_.scale;
        visit_out(b, h, t, e, scale * sums[e], std::fabs(scale) * magnitudes[e]);
      }
      if (t + 1 == kept || (t + 1 == c_.num_tokens && kept > c_.num_tokens)) tell_state();
    }
  }

  double log_decay_at(int64_t b, int64_t h, int64_t t) const {
    if (log_decay_.empty()) return 0;
    return log_decay_[c_.per_token ? (b * c_.num_q_heads + h) * c_.num_tokens + t : h];
  }

  const Decode& c_;
  const Tensor &q_, &k_, &v_;
  const std::vector<float>& log_decay_;
  const LinearAttentionDecodeParams& params_;
};

void check(const Decode& c) {
  std::mt19937 rng(11);
  Tensor q(c.dtype, c.batch, c.num_q_heads, c.num_tokens, c.head_dim, c.layout);
  Tensor k(c.dtype, c.batch, c.num_kv_heads, c.num_tokens, c.head_dim, c.layout);
  Tensor v(c.dtype, c.batch, c.num_kv_heads, c.num_tokens, c.head_dim_v, c.layout);
  LinearAttentionDecodeParams params;
  params.dtype = c.dtype;
  params.batch = c.batch;
  params.num_slots = c.num_slots;
  params.num_tokens = c.num_tokens;
  params.num_q_heads = c.num_q_heads;
  params.num_kv_heads = c.num_kv_heads;
  params.head_dim = c.head_dim;
  params.head_dim_v = c.head_dim_v;
  params.normalize = c.normalize;
  params.scale = 0.5;
  params.eps = 0.25;
  Tensor state(DType::kFloat32, c.num_slots, c.num_q_heads, c.head_dim, params.state_dim(),
               c.state_layout);
  q.fill_normal(rng);
  k.fill_normal(rng);
  v.fill_normal(rng);
  state.fill_normal(rng);
  if (c.normalize) {  // a sum of weights far from 0
    for (Tensor* tensor : {&q, &k, &state}) {
      tensor->for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
        tensor->set(b, h, row, d, std::fabs(tensor->get(b, h, row, d)));
      });
    }
  }
  // Among them none at all, one that forgets, and one that fades slowly.
  const int64_t decays = c.num_q_heads * (c.per_token ? c.batch * c.num_tokens : 1);
  std::vector<float> log_decay(decays);
  for (int64_t i = 0; i < decays; ++i) {
    log_decay[i] = i % 5 == 4 ? -INFINITY : -0.3f * static_cast<float>(i % 4);
  }
  params.log_decay.data = log_decay.data();
  params.log_decay.per_token = c.per_token;
  params.state_indices = data_or_null(c.state_indices);
  params.commit = data_or_null(c.commit);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  const Exact exact(c, q, k, v, log_decay, params);

  in_every_mode([&] {
    Tensor out(c.dtype, c.batch, c.num_q_heads, c.num_tokens, c.head_dim_v, c.layout);
    Tensor changed = state, expected = state;
    params.out = out.view();
    params.state = changed.view();
    cuda::run_linear_attention_decode_cuda(params);

    const auto check_out = [&](int64_t b, int64_t h, int64_t t, int64_t e, double value,
                               double magnitude) {
      const double tolerance =
          unit(c.dtype) * std::fabs(value) + 64 * unit(DType::kFloat32) * magnitude;
      expect_close(out.get(b, h, t, e), value, tolerance, "out");
    };
    exact.run(state, check_out, [&](int64_t slot, int64_t h, int64_t d, int64_t e, double value) {
      expected.set(slot, h, d, e, value);
    });
    // Slots that no entry names keep their bits.
    expected.for_each([&](int64_t slot, int64_t h, int64_t d, int64_t e) {
      const double value = expected.get(slot, h, d, e);
      const double tolerance =
          value == state.get(slot, h, d, e)
              ? 0
              : 8 * unit(DType::kFloat32) * (static_cast<double>(c.num_tokens) + std::fabs(value));
      expect_close(changed.get(slot, h, d, e), value, tolerance, "state");
    });
    out.expect_gaps_untouched();
    changed.expect_gaps_untouched();
  });
}

TEST(linear_attention_decode, float32) {
  Decode c;
  c.head_dim = c.head_dim_v = 128;
  check(c);
}
TEST(linear_attention_decode, bfloat16_over_a_wide_state) {
  Decode c;
  c.dtype = DType::kBFloat16;
  c.batch = c.num_slots = 1;
  c.head_dim = 256;
  c.head_dim_v = 80;
  c.layout = c.state_layout = Layout::kRowsFirst;
  check(c);
}
TEST(linear_attention_decode, float16_of_many_tokens) {  // more than between two barriers
  Decode c;
  c.dtype = DType::kFloat16;
  c.num_tokens = 19;
  c.head_dim = 96;
  c.head_dim_v = 40;
  c.per_token = true;
  c.num_q_heads = 6;
  c.num_kv_heads = 3;
  check(c);
}
TEST(linear_attention_decode, odd_strides) {
  Decode c;
  c.dtype = DType::kBFloat16;
  c.num_tokens = 3;
  c.head_dim = 33;
  c.head_dim_v = 37;
  c.layout = c.state_layout = Layout::kOdd;
  check(c);
}
TEST(linear_attention_decode, one_column) {
  Decode c;
  c.head_dim = c.head_dim_v = 1;
  c.num_tokens = 2;
  check(c);
}
TEST(linear_attention_decode, slots_and_commit) {
  Decode c;
  c.batch = 5;
  c.num_slots = 7;
  c.num_tokens = 10;
  c.head_dim = c.head_dim_v = 24;
  c.state_indices = {6, -1, 2, 7, 0};
  c.commit = {0, 3, 1, 2, 9};
  check(c);
  c.commit = {-4, 3, 10, 2, 11};  // as 0 and all
  check(c);
}
TEST(linear_attention_decode, normalized) {
  Decode c;
  c.dtype = DType::kBFloat16;
  c.batch = 3;
  c.num_slots = 5;
  c.num_tokens = 4;
  c.head_dim = 64;
  c.head_dim_v = 72;
  c.normalize = true;
  c.per_token = true;
  c.state_indices = {4, -1, 1};
  c.commit = {1, 2, 4};
  check(c);
}
TEST(linear_attention_decode, what_is_forgotten_is_not_read) {
  std::vector<float> log_decay = {-INFINITY};
  Tensor q(DType::kFloat32, 1, 1, 1, 4), out(DType::kFloat32, 1, 1, 1, 4);
  Tensor state(DType::kFloat32, 1, 1, 4, 4);  // NaN
  for (int64_t d = 0; d < 4; ++d) q.set(0, 0, 0, d, 1 + d);
  LinearAttentionDecodeParams params;
  params.q = params.k = params.v = q.view();
  params.out = out.view();
  params.state = state.view();
  params.batch = params.num_slots = params.num_tokens = 1;
  params.num_q_heads = params.num_kv_heads = 1;
  params.head_dim = params.head_dim_v = 4;
  params.log_decay.data = log_decay.data();
  cuda::run_linear_attention_decode_cuda(params);
  for (int64_t d = 0; d < 4; ++d) {
    EXPECT_EQ(out.get(0, 0, 0, d), 30 * (1 + d));
    for (int64_t e = 0; e < 4; ++e) EXPECT_EQ(state.get(0, 0, d, e), (1 + d) * (1 + e));
  }
}
TEST(linear_attention_decode, nothing) {
  Decode c;
  c.num_tokens = 0;
  check(c);
  c.num_tokens = 1;
  c.batch = c.num_slots = 0;
  check(c);
}
TEST(linear_attention_decode, what_is_not_supported) {
  LinearAttentionDecodeParams params;
  params.head_dim = 300;
  EXPECT_THROW(cuda::run_linear_attention_decode_cuda(params), std::invalid_argument);
  params.head_dim = 64;
  params.dtype = DType::kFloat64;
  EXPECT_THROW(cuda::run_linear_attention_decode_cuda(params), std::invalid_argument);
}

}  // namespace
}  // namespace longctx::simt_tests
