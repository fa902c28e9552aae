#include <gtest/gtest.h>

#include "block_map_case.h"
#include "cuda/kernels.h"

namespace longctx::simt_tests {
namespace {

struct Scores {
  MapCase map;
  DType dtype = DType::kFloat16;
  int64_t num_q_heads = 2, num_kv_heads = 1, head_dim = 64;
  Layout layout = Layout::kHeadsFirst;
  BlockScoreMethod method = BlockScoreMethod::kMean;
  bool softmax = true;
  int64_t stride = 8;
};

using Matrix = std::vector<std::vector<double>>;  // [rows][columns]

void softmax_rows(Matrix& logits) {
  for (std::vector<double>& row : logits) {
    double sum = 0;
    for (const double x : row) sum += std::exp(x);
    for (double& x : row) x = sum > 0 ? std::exp(x) / sum : 0;
  }
}

double product(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum / std::sqrt(static_cast<double>(a.size()));
}

// The means of `size` rows each; a short last block divides by its own length.
Matrix means(const Matrix& rows, int64_t size) {
  Matrix result;
  for (size_t first = 0; first < rows.size(); first += static_cast<size_t>(size)) {
    const size_t end = std::min(rows.size(), first + static_cast<size_t>(size));
    result.emplace_back(rows[first].size());
    for (size_t row = first; row < end; ++row) {
      for (size_t d = 0; d < rows[row].size(); ++d) {
        result.back()[d] += rows[row][d] / static_cast<double>(end - first);
      }
    }
  }
  return result;
}

Matrix filled(int64_t rows, int64_t columns) {
  return Matrix(static_cast<size_t>(rows),
                std::vector<double>(static_cast<size_t>(columns), -kInf));
}

// Mean score of the antidiagonal of every square of `stride` queries and keys.
Matrix antidiagonals(const Scores& c, const Matrix& q, const Matrix& k, int64_t first_position) {
  const auto q_len = static_cast<int64_t>(q.size()), k_len = static_cast<int64_t>(k.size());
  Matrix logits = filled(MapCase::blocks(q_len, c.stride), MapCase::blocks(k_len, c.stride));
  for (int64_t q_begin = 0; q_begin < q_len; q_begin += c.stride) {
    const int64_t q_end = std::min(q_len, q_begin + c.stride);
    for (int64_t k_begin = 0; k_begin < k_len; k_begin += c.stride) {
      if (c.map.causal && k_begin > first_position + q_end - 1) continue;
      const int64_t pairs = std::min({q_end - q_begin, k_len - k_begin, c.stride});
      double sum = 0;
      for (int64_t i = 0; i < pairs; ++i) sum += product(q[q_end - 1 - i], k[k_begin + i]);
      logits[q_begin / c.stride][k_begin / c.stride] = sum / static_cast<double>(pairs);
    }
  }
  return logits;
}

// Squares -> blocks: probabilities are averaged over the groups of queries that see any key, logits
// over the squares that are seen.
Matrix sum_squares(const Scores& c, const Matrix& logits, int64_t rows, int64_t columns) {
  Matrix values = logits;
  if (c.softmax) softmax_rows(values);
  const auto seen = [](double x) { return x > -kInf; };
  Matrix sums(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(columns)));
  Matrix counts = sums;
  std::vector<double> groups(static_cast<size_t>(rows));
  for (size_t n = 0; n < logits.size(); ++n) {
    const size_t i = n * c.stride / c.map.block_size_q;
    groups[i] += std::any_of(logits[n].begin(), logits[n].end(), seen);
    for (size_t m = 0; m < logits[n].size(); ++m) {
      if (!seen(logits[n][m])) continue;
      const size_t j = m * c.stride / c.map.block_size_k;
      sums[i][j] += values[n][m];
      ++counts[i][j];
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    for (size_t j = 0; j < sums[i].size(); ++j) {
      if (c.softmax) {
        sums[i][j] /= std::max(groups[i], 1.0);
      } else {
        sums[i][j] = counts[i][j] > 0 ? sums[i][j] / counts[i][j] : -kInf;
      }
    }
  }
  return sums;
}

// What one head of one sequence gives; q and k are its rows.
Matrix expected_scores(const Scores& c, const Matrix& q, const Matrix& k, int64_t first_position) {
  const int64_t rows = MapCase::blocks(static_cast<int64_t>(q.size()), c.map.block_size_q);
  const int64_t columns = MapCase::blocks(static_cast<int64_t>(k.size()), c.map.block_size_k);
  if (c.method == BlockScoreMethod::kAntidiagonal) {
    return sum_squares(c, antidiagonals(c, q, k, first_position), rows, columns);
  }
  Matrix result = filled(rows, columns);
  const Matrix k_means = means(k, c.map.block_size_k);
  const bool of_means = c.method == BlockScoreMethod::kMean;
  const Matrix queries = of_means ? means(q, c.map.block_size_q) : q;
  for (int64_t row = 0; row < static_cast<int64_t>(queries.size()); ++row) {
    const int64_t block = of_means ? row : row / c.map.block_size_q;
    const int64_t last_position =
        first_position + (of_means ? (row + 1) * c.map.block_size_q - 1 : row);
    for (int64_t j = 0; j < columns; ++j) {
      if (c.map.causal && j * c.map.block_size_k > last_position) continue;
      result[block][j] = std::max(result[block][j], product(queries[row], k_means[j]));
    }
  }
  if (c.softmax) softmax_rows(result);
  return result;
}

void check(const Scores& c) {
  std::mt19937 rng(1);
  Tensor q(c.dtype, c.map.batch, c.num_q_heads, c.map.seqlen_q, c.head_dim, c.layout);
  Tensor k(c.dtype, c.map.batch, c.num_kv_heads, c.map.seqlen_k, c.head_dim, c.layout);
  q.fill_normal(rng);
  k.fill_normal(rng);
  if (!c.map.seqused_k.empty()) {
    k.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
      if (row >= c.map.seqused_k[b]) k.set(b, h, row, d, kNaN);
    });
  }
  const int64_t rows = c.map.num_q_blocks(), columns = c.map.num_k_blocks();
  std::vector<double> expected(static_cast<size_t>(c.map.batch * c.num_q_heads * rows * columns),
                               c.softmax ? 0.0 : -kInf);
  for (const MapSequence& seq : map_sequences(c.map)) {
    for (int64_t head = 0; head < c.num_q_heads; ++head) {
      const auto matrix = [&](const Tensor& tensor, int64_t h, int64_t begin, int64_t length) {
        Matrix result(static_cast<size_t>(length));
        for (int64_t row = 0; row < length; ++row) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            result[row].push_back(tensor.get(seq.batch_index, h, begin + row, d));
          }
        }
        return result;
      };
      const Matrix scores =
          expected_scores(c, matrix(q, head, seq.q_begin, seq.q_len),
                          matrix(k, head * c.num_kv_heads / c.num_q_heads, seq.k_begin, seq.k_len),
                          seq.first_position);
      for (size_t i = 0; i < scores.size(); ++i) {
        for (size_t j = 0; j < scores[i].size(); ++j) {
          expected[((seq.batch_index * c.num_q_heads + head) * rows + seq.first_row +
                    static_cast<int64_t>(i)) *
                       columns +
                   static_cast<int64_t>(j)] = scores[i][j];
        }
      }
    }
  }
  in_every_mode([&] {
    std::vector<float> scores(expected.size(), NAN);
    BlockScoresParams params;
    params.dtype = c.dtype;
    params.map = c.map.params();
    params.q = q.view();
    params.k = k.view();
    params.method = c.method;
    params.softmax = c.softmax;
    params.stride = c.stride;
    params.scores = scores.data();
    params.num_q_heads = c.num_q_heads;
    params.num_kv_heads = c.num_kv_heads;
    params.head_dim = c.head_dim;
    params.softmax_scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
    cuda::run_block_scores_cuda(params);
    for (size_t i = 0; i < expected.size(); ++i) {
      // Means are rounded to the type of the operands where tensor cores multiply them.
      const double tolerance = 4 * std::fmax(unit(c.dtype), 0x1p-18);
      expect_close(scores[i], expected[i], tolerance, "score " + std::to_string(i));
    }
  });
}

Scores sized(DType dtype, int64_t seqlen_q, int64_t seqlen_k) {
  Scores c;
  c.dtype = dtype;
  c.head_dim = dtype == DType::kBFloat16 ? 128 : 64;
  c.map.seqlen_q = seqlen_q;
  c.map.seqlen_k = seqlen_k;
  return c;
}

class block_score_methods : public testing::TestWithParam<BlockScoreMethod> {};

TEST_P(block_score_methods, bfloat16_softmax) {
  Scores c = sized(DType::kBFloat16, 150, 210);
  c.method = GetParam();
  check(c);
}
TEST_P(block_score_methods, float16_logits) {
  Scores c = sized(DType::kFloat16, 90, 130);
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.map.block_size_k = 64;
  c.method = GetParam();
  c.softmax = false;
  check(c);
}
TEST_P(block_score_methods, float32_all_keys) {
  Scores c = sized(DType::kFloat32, 70, 77);
  c.map.causal = false;
  c.method = GetParam();
  check(c);
}
TEST_P(block_score_methods, packed) {
  Scores c = sized(DType::kFloat16, 100, 120);
  c.method = GetParam();
  c.map.cu_seqlens_q = {0, 0, 33, 33, 34, 100};
  c.map.cu_seqlens_k = {0, 5, 40, 40, 60, 120};
  check(c);
}
TEST_P(block_score_methods, seqused_k) {
  Scores c = sized(DType::kFloat16, 40, 130);
  c.method = GetParam();
  c.map.batch = 3;
  c.map.seqused_k = {130, 0, 51};
  check(c);
}
TEST_P(block_score_methods, unaligned_rows) {
  Scores c = sized(DType::kFloat16, 45, 75);
  c.method = GetParam();
  c.head_dim = 33;
  c.layout = Layout::kOdd;
  check(c);
}
TEST_P(block_score_methods, q_offset) {
  Scores c = sized(DType::kFloat16, 48, 160);
  c.method = GetParam();
  c.layout = Layout::kRowsFirst;
  c.map.has_q_offset = true;
  c.map.q_offset = 50;
  check(c);
}
TEST_P(block_score_methods, rows_that_see_nothing) {
  Scores c = sized(DType::kFloat16, 130, 30);
  c.method = GetParam();
  check(c);
}
std::string method_name(const testing::TestParamInfo<BlockScoreMethod>& info) {
  constexpr const char* kNames[] = {"mean", "max_mean", "antidiagonal"};
  return kNames[static_cast<int>(info.param)];
}
INSTANTIATE_TEST_SUITE_P(method, block_score_methods,
                         testing::Values(BlockScoreMethod::kMean, BlockScoreMethod::kMaxMean,
                                         BlockScoreMethod::kAntidiagonal),
                         method_name);

TEST(block_scores, no_key) { check(sized(DType::kFloat16, 40, 0)); }
TEST(block_scores, no_query) { check(sized(DType::kFloat16, 0, 40)); }
TEST(block_scores, one_of_each) { check(sized(DType::kBFloat16, 1, 1)); }

}  // namespace
}  // namespace longctx::simt_tests
