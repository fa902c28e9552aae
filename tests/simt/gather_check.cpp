#include "gather_check.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "cuda/kernels.h"

namespace longctx::simt_tests {
namespace {

class GatherTest {
 public:
  explicit GatherTest(const GatherCase& c) : c_(c), rng_(5) {
    q_ = Tensor(c.dtype, c.batch, c.num_q_heads, c.seqlen_q, c.head_dim, c.layout);
    q_.fill_normal(rng_);
    make_pages();
    make_lists();
    make_rope();
    for (int64_t i = 0; c.with_tree && i < c.seqlen_q * c.seqlen_q; ++i) {
      const int64_t token = i / c.seqlen_q, other = i % c.seqlen_q;
      tree_.push_back(static_cast<char>(other <= token && (token + other) % 2 == 0));
    }
  }

  void run() {
    in_every_mode([&] { check(); });
  }

 private:
  int64_t used(int64_t b) const { return c_.seqused_k.empty() ? c_.seqlen_k : c_.seqused_k[b]; }
  int64_t list(int64_t b, int64_t index_head, int64_t token) const {
    return (b * c_.index_heads + index_head) * list_tokens() + (c_.shared_tokens ? 0 : token);
  }
  int64_t list_tokens() const { return c_.shared_tokens ? 1 : c_.seqlen_q; }
  // Where key j of batch entry b stands in k_ and v_.
  std::pair<int64_t, int64_t> place(int64_t b, int64_t key) const {
    if (c_.page_size == 0) return {b, key};
    const int64_t max_pages = c_.seqlen_k / c_.page_size;
    return {page_table_[b * max_pages + key / c_.page_size], key % c_.page_size};
  }

  // The last page of each entry does not exist.
  void make_pages() {
    if (c_.page_size > 0) {
      page_table_.resize(c_.batch * c_.seqlen_k / c_.page_size);
      std::iota(page_table_.begin(), page_table_.end(), 0);
      std::shuffle(page_table_.begin(), page_table_.end(), rng_);
      for (int64_t b = 1; b <= c_.batch; ++b) {
        page_table_[b * c_.seqlen_k / c_.page_size - 1] = b % 2 == 0 ? -1 : 1000;
      }
    }
    const int64_t rows = c_.page_size > 0 ? c_.page_size : c_.seqlen_k;
    const int64_t batch = c_.page_size > 0 ? c_.batch * c_.seqlen_k / c_.page_size : c_.batch;
    k_ = Tensor(c_.dtype, batch, c_.num_kv_heads, rows, c_.head_dim, c_.layout);
    v_ = Tensor(c_.dtype, batch, c_.num_kv_heads, rows, c_.head_dim_v, c_.layout);
    k_.fill_normal(rng_);
    v_.fill_normal(rng_);
  }

  // Different blocks in any order, some of them -1 or past the keys.
  void make_lists() {
    const int64_t lists = c_.batch * c_.index_heads * list_tokens();
    const int64_t blocks = c_.seqlen_k / c_.block_size_k + 2;
    std::vector<int32_t> order(static_cast<size_t>(std::max(blocks, c_.num_entries)));
    std::normal_distribution<float> normal;
    for (int64_t l = 0; l < lists; ++l) {
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.begin() + blocks, rng_);
      for (int64_t e = 0; e < c_.num_entries; ++e) {
        indices_.push_back(e % 7 == 3 || e >= blocks ? -1 : order[e]);
        if (c_.with_bias) {
          bias_.push_back(e % 5 == 2 ? -std::numeric_limits<float>::infinity() : normal(rng_));
        }
        if (c_.rotary_dim > 0) k_positions_.push_back(static_cast<int32_t>(rng_() % 60));
      }
      if (c_.with_counts) {
        counts_.push_back(static_cast<int32_t>(rng_() % (c_.num_entries + 3)) - 1);
      }
    }
  }

  void make_rope() {
    if (c_.rotary_dim == 0) return;
    const int64_t half = c_.rotary_dim / 2;
    for (int64_t position = 0; position < kPositions; ++position) {
      for (int64_t d = 0; d < 2 * half; ++d) {
        const double angle = position * std::pow(100.0, -static_cast<double>(d % half) / half);
        cos_sin_.push_back(static_cast<float>(d < half ? std::cos(angle) : std::sin(angle)));
      }
    }
    for (int64_t i = 0; c_.with_q_positions && i < c_.batch * c_.seqlen_q; ++i) {
      q_positions_.push_back(static_cast<int32_t>(50 + i));
    }
  }

  GatherAttentionParams params(Tensor& out, Tensor& lse) {
    GatherAttentionParams p;
    p.dtype = c_.dtype;
    p.seqs.batch = p.seqs.num_seqs = c_.batch;
    p.seqs.seqlen_q = c_.seqlen_q;
    p.seqs.seqlen_k = c_.seqlen_k;
    p.seqs.seqused_k = data_or_null(c_.seqused_k);
    p.q = q_.view();
    p.k = k_.view();
    p.v = v_.view();
    p.out = out.view();
    p.lse = lse.data();
    if (c_.page_size > 0) {
      p.pages = {page_table_.data(), c_.seqlen_k / c_.page_size, k_.size(0), c_.page_size};
    }
    const int64_t tokens = list_tokens(), lists = c_.index_heads * tokens;
    const auto rows = [&](const auto& values) {
      using T = typename std::decay_t<decltype(values)>::value_type;
      return RowsView<T>{data_or_null(values), lists * c_.num_entries, tokens * c_.num_entries,
                         c_.shared_tokens ? 0 : c_.num_entries};
    };
    p.indices = rows(indices_);
    p.bias = rows(bias_);
    p.counts = {data_or_null(counts_), lists, tokens, c_.shared_tokens ? 0 : 1};
    p.tree_mask = {reinterpret_cast<const bool*>(data_or_null(tree_)), 0, 0, c_.seqlen_q};
    p.rope.cos_sin = data_or_null(cos_sin_);
    p.rope.max_positions = kPositions;
    p.rope.rotary_dim = c_.rotary_dim;
    p.rope.k_positions = rows(k_positions_);
    p.rope.k_position_step = c_.k_position_step;
    p.rope.q_positions = {data_or_null(q_positions_), c_.seqlen_q, 0, 1};
    p.num_entries = c_.num_entries;
    p.index_heads = c_.index_heads;
    p.index_tokens = tokens;
    p.block_size_k = c_.block_size_k;
    p.num_first = c_.num_first;
    p.num_last = c_.num_last;
    p.num_q_heads = c_.num_q_heads;
    p.num_kv_heads = c_.num_kv_heads;
    p.head_dim = c_.head_dim;
    p.head_dim_v = c_.head_dim_v;
    p.softmax_scale = kScale;
    p.softcap = c_.softcap;
    return p;
  }

  struct Key {
    int64_t index;
    int64_t position;
    double bias;
    int64_t entry;  // num_entries: forced
  };
  // Where a token stands, if rotated.
  int64_t q_position(int64_t b, int64_t token) const {
    if (c_.rotary_dim == 0) return 0;
    return q_positions_.empty() ? used(b) - c_.seqlen_q + token
                                : q_positions_[b * c_.seqlen_q + token];
  }
  std::vector<Key> selected(int64_t b, int64_t head, int64_t token) const {
    if (q_position(b, token) < 0 || q_position(b, token) >= kPositions) return {};
    const int64_t diagonal = used(b) - c_.seqlen_q;
    const int64_t visible = std::max<int64_t>(0, diagonal + token + 1);
    const int64_t first = std::min(c_.num_first, visible);
    const int64_t last = std::max(first, visible - c_.num_last);
    const int64_t l = list(b, head * c_.index_heads / c_.num_q_heads, token);
    const int64_t entries =
        c_.with_counts ? std::clamp<int64_t>(counts_[l], 0, c_.num_entries) : c_.num_entries;
    std::vector<Key> keys;
    for (int64_t e = 0; e < entries; ++e) {
      const int64_t block = indices_[l * c_.num_entries + e];
      for (int64_t i = 0; block >= 0 && i < c_.block_size_k; ++i) {
        const int64_t key = block * c_.block_size_k + i;
        if (key < first || key >= last) continue;
        const double bias = c_.with_bias ? bias_[l * c_.num_entries + e] : 0.0;
        const int64_t position =
            c_.rotary_dim > 0 ? k_positions_[l * c_.num_entries + e] + i * c_.k_position_step : 0;
        if (bias != -kInf) keys.push_back({key, position, bias, e});
      }
    }
    // The last keys stand as far before a token as they lie; in a tree, at their own tokens or
    // before the first.
    for (int64_t key = 0; key < first; ++key) keys.push_back({key, key, 0.0, c_.num_entries});
    for (int64_t key = last; key < visible; ++key) {
      const int64_t anchor = !c_.with_tree ? token : std::max<int64_t>(0, key - diagonal);
      keys.push_back({key, q_position(b, anchor) - (diagonal + anchor - key), 0.0, c_.num_entries});
    }
    const auto gone = [&](const Key& key) {
      if (c_.with_tree && key.index >= diagonal &&
          tree_[token * c_.seqlen_q + key.index - diagonal] == 0) {
        return true;
      }
      if (c_.rotary_dim > 0 && (key.position < 0 || key.position >= kPositions)) return true;
      const int64_t batch = place(b, key.index).first;
      return batch < 0 || batch >= k_.size(0);
    };
    keys.erase(std::remove_if(keys.begin(), keys.end(), gone), keys.end());
    return keys;
  }

  // Element d of a row at a position, rotated and rounded as operands of 16-bit products are.
  double rotated(const Tensor& x, int64_t b, int64_t h, int64_t row, int64_t d,
                 int64_t position) const {
    const double own = x.get(b, h, row, d);
    if (d >= c_.rotary_dim) return own;
    const int64_t half = c_.rotary_dim / 2;
    const float* angles = cos_sin_.data() + position * c_.rotary_dim;
    const double cos = angles[d % half], sin = angles[half + d % half];
    const double other = x.get(b, h, row, d < half ? d + half : d - half);
    const double value = own * cos + (d < half ? -other : other) * sin;
    char bits[8];
    store(c_.dtype, bits, value);
    return load(c_.dtype, bits);
  }

  void check() {
    Tensor out(c_.dtype, c_.batch, c_.num_q_heads, c_.seqlen_q, c_.head_dim_v, c_.layout);
    Tensor lse(DType::kFloat32, c_.batch, c_.num_q_heads, c_.seqlen_q, 1);
    GatherAttentionParams p = params(out, lse);
    const int64_t lists = c_.batch * c_.index_heads * list_tokens(), parts = c_.num_entries + 1;
    const int64_t rows = c_.batch * c_.num_q_heads * c_.seqlen_q;
    Tensor mass(DType::kFloat32, 1, 1, lists, parts);
    Tensor block_out(c_.dtype, 1, parts, rows, c_.head_dim_v),
        block_lse(DType::kFloat32, 1, 1, parts, rows);
    if (c_.with_results) {
      p.key_mass = static_cast<float*>(mass.data());
      p.block_out = block_out.data();
      p.block_lse = block_lse.data();
    }
    cuda::run_gather_attention_cuda(p);
    out.expect_gaps_untouched();
    if (c_.with_workspace) check_workspace(p, out, lse);
    std::vector<double> masses(static_cast<size_t>(lists * parts));
    int64_t row = 0;
    lse.for_each([&](int64_t b, int64_t h, int64_t token, int64_t) {
      const std::vector<Key> keys = selected(b, h, token);
      const double row_lse = lse.get(b, h, token, 0);
      check_row(b, h, token, keys, row_lse, [&](int64_t d) { return out.get(b, h, token, d); });
      for (int64_t e = 0; c_.with_results && e < parts; ++e) {
        std::vector<Key> of_entry;
        std::copy_if(keys.begin(), keys.end(), std::back_inserter(of_entry),
                     [e](const Key& key) { return key.entry == e; });
        const double entry_lse = block_lse.get(0, 0, e, row);
        check_row(b, h, token, of_entry, entry_lse,
                  [&](int64_t d) { return block_out.get(0, e, row, d); });
        if (of_entry.empty()) continue;
        const int64_t l = list(b, h * c_.index_heads / c_.num_q_heads, token);
        masses[l * parts + e] += std::exp(entry_lse - row_lse);
      }
      ++row;
    });
    if (!c_.with_results) return;
    mass.for_each([&](int64_t, int64_t, int64_t l, int64_t e) {
      expect_close(mass.get(0, 0, l, e), masses[l * parts + e], 1e-4, "mass");
    });
  }

  // With a workspace, which is zeros again: one launch less, and the same bits.
  void check_workspace(GatherAttentionParams p, const Tensor& out, const Tensor& lse) const {
    const auto launches = [&p] {
      const int64_t before = simt::num_launches;
      cuda::run_gather_attention_cuda(p);
      return simt::num_launches - before;
    };
    const int64_t apart = launches();
    Tensor same_out(c_.dtype, c_.batch, c_.num_q_heads, c_.seqlen_q, c_.head_dim_v, c_.layout);
    Tensor same_lse(DType::kFloat32, c_.batch, c_.num_q_heads, c_.seqlen_q, 1);
    std::vector<uint32_t> workspace(static_cast<size_t>(c_.batch * c_.num_q_heads * c_.seqlen_q));
    p.out = same_out.view();
    p.lse = same_lse.data();
    p.workspace = workspace.data();
    for (int again = 0; again < 2; ++again) {
      EXPECT_EQ(launches(), apart - 1);
      EXPECT_TRUE(same_out.same_bytes(out));
      EXPECT_TRUE(same_lse.same_bytes(lse));
      EXPECT_EQ(workspace, std::vector<uint32_t>(workspace.size()));
    }
  }

  template <class Out>
  void check_row(int64_t b, int64_t h, int64_t token, const std::vector<Key>& keys, double lse,
                 const Out& out) const {
    const int64_t kv_head = h * c_.num_kv_heads / c_.num_q_heads;
    const int64_t stands_at = q_position(b, token);
    double sum = 0, largest = 0;
    std::vector<double> expected(static_cast<size_t>(c_.head_dim_v));
    for (const Key& key : keys) {
      const auto [batch, row] = place(b, key.index);
      double score = 0;
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        score += rotated(q_, b, h, token, d, stands_at) *
                 rotated(k_, batch, kv_head, row, d, key.position);
      }
      score *= kScale;
      if (c_.softcap > 0) score = c_.softcap * std::tanh(score / c_.softcap);
      const double weight = std::exp(score + key.bias);
      sum += weight;
      for (int64_t d = 0; d < c_.head_dim_v; ++d) {
        const double value = v_.get(batch, kv_head, row, d);
        expected[d] += weight * value;
        largest = std::max(largest, std::fabs(value));
      }
    }
    // A rotation rounds its result where another order of the same sums may fall to the other side.
    const double operands = c_.rotary_dim > 0 ? 2 * unit(c_.dtype) : 0.0;
    expect_close(lse, keys.empty() ? -kInf : std::log(sum), 3e-5 + operands, "lse");
    const double tolerance = (2 * unit(c_.dtype) + operands + 2e-6) * largest;
    for (int64_t d = 0; d < c_.head_dim_v; ++d) {
      const double value = keys.empty() ? 0.0 : expected[d] / sum;
      expect_close(out(d), value, tolerance, "out");
    }
  }

  static constexpr int64_t kPositions = 64;
  static constexpr double kScale = 0.1;
  GatherCase c_;
  std::mt19937 rng_;
  Tensor q_, k_, v_;
  std::vector<int32_t> page_table_, indices_, counts_, k_positions_, q_positions_;
  std::vector<float> bias_, cos_sin_;
  std::vector<char> tree_;
};

}  // namespace

void check_gather(const GatherCase& c) { GatherTest(c).run(); }

}  // namespace longctx::simt_tests
