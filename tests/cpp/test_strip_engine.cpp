// Every strip engine this machine can run, against loops in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/reduced_float.h"
#include "cpu/strip_engine.h"
#include "longctx/mask.h"

namespace longctx::cpu {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

size_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Relative rounding error of a result in `dtype`.
double unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    default:
      return 0x1p-23;
  }
}

// A row-major matrix in `dtype` whose elements read and write as double.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t cols)
      : dtype_(dtype), cols_(cols), bytes_(rows * cols * element_size(dtype) + 1) {}

  void set(int64_t row, int64_t col, double value) {
    char* p = at(row, col);
    switch (dtype_) {
      case DType::kFloat64:
        return store(p, value);
      case DType::kFloat32:
        return store(p, static_cast<float>(value));
      case DType::kBFloat16: {
        BFloat16 x;
        narrow(static_cast<float>(value), x);
        return store(p, x);
      }
      case DType::kFloat16: {
        Float16 x;
        narrow(static_cast<float>(value), x);
        return store(p, x);
      }
    }
  }
  double get(int64_t row, int64_t col) const {
    const char* p = const_cast<Matrix*>(this)->at(row, col);
    switch (dtype_) {
      case DType::kFloat64:
        return load<double>(p);
      case DType::kFloat32:
        return load<float>(p);
      case DType::kBFloat16:
        return widen(load<BFloat16>(p));
      default:
        return widen(load<Float16>(p));
    }
  }
  void fill_random(std::mt19937& rng, int64_t rows, double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols_; ++j) set(i, j, normal(rng));
    }
  }
  void fill_row(int64_t row, double value) {
    for (int64_t j = 0; j < cols_; ++j) set(row, j, value);
  }
  void* row(int64_t r) { return at(r, 0); }

 private:
  char* at(int64_t row, int64_t col) {
    return bytes_.data() + (row * cols_ + col) * element_size(dtype_);
  }
  template <class T>
  static void store(char* p, T x) {
    std::memcpy(p, &x, sizeof(x));
  }
  template <class T>
  static T load(const char* p) {
    T x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  DType dtype_;
  int64_t cols_;
  std::vector<char> bytes_;
};

// 64-byte aligned memory, filled with NaN so that reading what was not written shows.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes + 64, static_cast<char>(0xff)) {}
  void* get() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<char> bytes_;
};

using Sees = bool (*)(int64_t row, int64_t key);
bool sees_all(int64_t, int64_t) { return true; }
bool sees_causal(int64_t row, int64_t key) { return key <= row + 300; }
// Rows 3 and 17 see nothing, some keys are seen by nobody, the rest is irregular.
bool sees_irregular(int64_t row, int64_t key) {
  if (row == 3 || row == 17 || key % 7 == 2 || (key >= 64 && key < 128)) return false;
  return (row * 31 + key * 17) % 5 != 0;
}
bool sees_nothing(int64_t, int64_t) { return false; }

struct Case {
  const char* name;
  int64_t num_keys;
  int64_t head_dim;
  int64_t head_dim_v;
  int num_rows;
  Sees sees;
  double softcap = 0.0;
  bool sink = false;
  double q_scale = 1.0;
};

const Case kCases[] = {
    {"OneKey", 1, 64, 64, 32, sees_all},
    {"FullTiles", 512, 64, 64, 32, sees_all},
    {"HeadDim128", 384, 128, 128, 32, sees_causal},
    {"SeveralChunks", 1200, 64, 96, 32, sees_causal},
    {"OddHeadDims", 77, 33, 17, 13, sees_irregular},
    {"TinyHeadDims", 45, 1, 3, 1, sees_irregular},
    {"WideValues", 100, 40, 200, 32, sees_causal},
    {"Irregular", 700, 72, 80, 32, sees_irregular},
    {"Nothing", 96, 64, 64, 32, sees_nothing},
    {"Softcap", 333, 64, 64, 32, sees_causal, 20.0},
    {"SoftcapSmallScores", 333, 64, 64, 32, sees_causal, 20.0, false, 0.01},
    {"Sink", 333, 64, 64, 32, sees_irregular, 0.0, true},
    {"SinkSoftcap", 65, 80, 64, 31, sees_irregular, 5.0, true},
    {"Sharp", 600, 64, 64, 32, sees_causal, 0.0, false, 30.0},
};

struct EngineCase {
  Isa isa;
  DType dtype;
};

std::vector<EngineCase> engine_cases() {
  std::vector<EngineCase> cases;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (isa > detected_isa()) continue;
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      cases.push_back({isa, dtype});
    }
  }
  return cases;
}

std::string engine_case_name(const testing::TestParamInfo<EngineCase>& info) {
  const char* isas[] = {"Generic", "Avx2", "Avx512", "Amx"};
  const char* dtypes[] = {"Float32", "Float64", "BFloat16", "Float16"};
  return std::string(isas[static_cast<int>(info.param.isa)]) +
         dtypes[static_cast<int>(info.param.dtype)];
}

// One strip of queries over num_keys keys, driven the way the attention driver does it.
class Problem {
 public:
  Problem(const StripEngine& engine, DType dtype, const Case& c)
      : engine(engine),
        c(c),
        dtype(dtype),
        q(dtype, kStripRows, c.head_dim),
        k(dtype, c.num_keys, c.head_dim),
        v(dtype, c.num_keys, c.head_dim_v),
        out(dtype, kStripRows, c.head_dim_v) {
    std::mt19937 rng(1234);
    q.fill_random(rng, kStripRows, c.q_scale);
    k.fill_random(rng, c.num_keys);
    v.fill_random(rng, c.num_keys);
    shape.dtype = dtype;
    shape.head_dim = c.head_dim;
    shape.head_dim_v = c.head_dim_v;
    shape.softmax_scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    shape.scale_log2 = static_cast<float>(shape.softmax_scale * 1.4426950408889634);
    shape.softcap = c.softcap;
  }

  bool sees(int64_t row, int64_t key) const {
    return key < c.num_keys && row < c.num_rows && c.sees(row, key);
  }

  KeyChunk chunk_at(int64_t begin) {
    KeyChunk chunk;
    chunk.num_keys = std::min<int64_t>(kChunkKeys, c.num_keys - begin);
    chunk.k_stride = c.head_dim;
    chunk.v_stride = c.head_dim_v;
    for (int64_t slot = 0; slot < chunk.num_slots(); ++slot) {
      const int64_t key = begin + std::min(slot, chunk.num_keys - 1);
      chunk.k_rows[slot] = k.row(key);
      chunk.v_rows[slot] = v.row(key);
      chunk.positions[slot] = key;
    }
    for (int64_t run = 0; (run + 1) * 16 <= chunk.num_keys; ++run) {
      chunk.contiguous16 |= 1u << run;
    }
    return chunk;
  }

  ChunkMask mask_at(int64_t begin, const KeyChunk& chunk) const {
    ChunkMask mask;
    for (int64_t tile = 0; tile < chunk.num_slots() / kKeyTile; ++tile) {
      bool any = false;
      bool all = true;
      for (int64_t slot = tile * kKeyTile; slot < (tile + 1) * kKeyTile; ++slot) {
        mask.visible[slot] = 0;
        for (int r = 0; r < c.num_rows; ++r) {
          const bool visible = slot < chunk.num_keys && sees(r, begin + slot);
          mask.visible[slot] |= static_cast<uint32_t>(visible) << r;
          any |= visible;
          all &= visible;
        }
      }
      mask.tiles[tile] = static_cast<uint8_t>(all   ? Visibility::kFull
                                              : any ? Visibility::kPartial
                                                    : Visibility::kNone);
    }
    return mask;
  }

  void pack_queries(void* packed) {
    const void* rows[kStripRows];
    for (int r = 0; r < c.num_rows; ++r) rows[r] = q.row(r);
    engine.pack_queries(shape, rows, c.num_rows, packed);
  }

  double score(int64_t row, int64_t key) const {
    double s = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) s += q.get(row, d) * k.get(key, d);
    s *= shape.softmax_scale;
    return c.softcap > 0 ? c.softcap * std::tanh(s / c.softcap) : s;
  }

  const StripEngine& engine;
  const Case& c;
  DType dtype;
  StripShape shape;
  Matrix q, k, v, out;
};

double read_real(DType dtype, const void* p, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(p)[i]
                                  : static_cast<const float*>(p)[i];
}

// Tolerance on a logit: a sum of head_dim rounded products; 16-bit tiles round more.
double logit_tolerance(const Problem& problem, double magnitude) {
  const double rounding = problem.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  const double sum = rounding * (8 + std::sqrt(static_cast<double>(problem.c.head_dim)));
  const bool tiles = std::string(problem.engine.name).find("amx") != std::string::npos &&
                     problem.dtype != DType::kFloat32;
  return magnitude * (tiles ? 0x1p-8 : sum) + sum;
}

class StripEngineTest : public testing::TestWithParam<EngineCase> {
 protected:
  const StripEngine& engine() const { return choose_engine(GetParam().dtype, GetParam().isa); }

  void run_attention(Problem& problem, const float* sinks, std::vector<double>& lse) {
    Scratch queries(engine().query_bytes(problem.shape));
    Scratch packed(engine().chunk_bytes(problem.shape));
    Scratch state(engine().state_bytes(problem.shape));
    engine().begin_thread();
    problem.pack_queries(queries.get());
    engine().reset(problem.shape, state.get());
    for (int64_t begin = 0; begin < problem.c.num_keys; begin += kChunkKeys) {
      const KeyChunk chunk = problem.chunk_at(begin);
      const ChunkMask mask = problem.mask_at(begin, chunk);
      engine().pack_chunk(problem.shape, chunk, true, packed.get());
      engine().accumulate(problem.shape, queries.get(), chunk, packed.get(), mask, state.get());
    }
    void* out_rows[kStripRows];
    for (int r = 0; r < problem.c.num_rows; ++r) out_rows[r] = problem.out.row(r);
    std::vector<double> raw(kStripRows, kNaN);
    engine().finish(problem.shape, state.get(), sinks, problem.c.num_rows, out_rows, raw.data());
    engine().end_thread();
    for (int r = 0; r < problem.c.num_rows; ++r) {
      lse.push_back(read_real(GetParam().dtype, raw.data(), r));
    }
  }

  void expect_attention(Problem& problem, const float* sinks, const std::vector<double>& lse) {
    const Case& c = problem.c;
    const double subnormal = problem.dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-126;
    for (int r = 0; r < c.num_rows; ++r) {
      std::vector<double> s(c.num_keys, -kInf);
      double top = -kInf;
      double largest = 0;
      for (int64_t key = 0; key < c.num_keys; ++key) {
        if (!problem.sees(r, key)) continue;
        s[key] = problem.score(r, key);
        top = std::max(top, s[key]);
        largest = std::max(largest, std::abs(s[key]));
      }
      if (top == -kInf) {
        EXPECT_EQ(lse[r], -kInf) << c.name << " row " << r;
        for (int64_t d = 0; d < c.head_dim_v; ++d) {
          EXPECT_EQ(problem.out.get(r, d), 0) << c.name << " row " << r;
        }
        continue;
      }
      double sum = 0;
      std::vector<double> out(c.head_dim_v, 0.0);
      std::vector<double> norm(c.head_dim_v, 0.0);
      for (int64_t key = 0; key < c.num_keys; ++key) {
        const double p = std::exp(s[key] - top);
        sum += p;
        if (p == 0) continue;
        for (int64_t d = 0; d < c.head_dim_v; ++d) {
          out[d] += p * problem.v.get(key, d);
          norm[d] += p * std::abs(problem.v.get(key, d));
        }
      }
      const double logit_error = logit_tolerance(problem, largest);
      EXPECT_NEAR(lse[r], top + std::log(sum), 2 * logit_error) << c.name << " row " << r;
      const double denominator = sum + (sinks != nullptr ? std::exp(sinks[r] - top) : 0.0);
      for (int64_t d = 0; d < c.head_dim_v; ++d) {
        const double relative = 4 * logit_error + 2 * unit(problem.dtype);
        ASSERT_NEAR(problem.out.get(r, d), out[d] / denominator,
                    relative * norm[d] / denominator + subnormal)
            << c.name << " row " << r << " dim " << d;
      }
    }
  }
};

TEST_P(StripEngineTest, Attention) {
  for (const Case& c : kCases) {
    Problem problem(engine(), GetParam().dtype, c);
    std::vector<float> sinks(kStripRows);
    for (int r = 0; r < kStripRows; ++r) sinks[r] = static_cast<float>(r - 8);
    std::vector<double> lse;
    run_attention(problem, c.sink ? sinks.data() : nullptr, lse);
    expect_attention(problem, c.sink ? sinks.data() : nullptr, lse);
  }
}

TEST_P(StripEngineTest, InvisibleSlotsMayHoldAnything) {
  const Case c = {"Irregular", 300, 64, 48, 29, sees_irregular};
  Problem clean(engine(), GetParam().dtype, c);
  Problem dirty(engine(), GetParam().dtype, c);
  for (int64_t key = 0; key < c.num_keys; ++key) {
    bool seen = false;
    for (int r = 0; r < c.num_rows; ++r) seen |= clean.sees(r, key);
    if (seen) continue;
    dirty.k.fill_row(key, key % 2 == 0 ? kNaN : kInf);
    dirty.v.fill_row(key, key % 2 == 0 ? -kInf : kNaN);
  }
  std::vector<double> clean_lse, dirty_lse;
  run_attention(clean, nullptr, clean_lse);
  run_attention(dirty, nullptr, dirty_lse);
  for (int r = 0; r < c.num_rows; ++r) {
    EXPECT_EQ(clean_lse[r], dirty_lse[r]) << "row " << r;
    for (int64_t d = 0; d < c.head_dim_v; ++d) {
      ASSERT_EQ(clean.out.get(r, d), dirty.out.get(r, d)) << "row " << r << " dim " << d;
    }
  }
}

TEST_P(StripEngineTest, VisibleNaNReachesTheRowsThatSeeIt) {
  const Case c = {"Causal", 320, 64, 64, 32, sees_causal};
  Problem problem(engine(), GetParam().dtype, c);
  problem.k.fill_row(310, kNaN);  // seen from row 10 on
  std::vector<double> lse;
  run_attention(problem, nullptr, lse);
  for (int r = 0; r < c.num_rows; ++r) {
    EXPECT_EQ(std::isnan(lse[r]), r >= 10) << "row " << r;
    EXPECT_EQ(std::isnan(problem.out.get(r, 0)), r >= 10) << "row " << r;
  }
}

TEST_P(StripEngineTest, RowsThatSeeNothingStayZeroBesideNaN) {
  const Case c = {"Irregular", 200, 64, 64, 32, sees_irregular};
  Problem problem(engine(), GetParam().dtype, c);
  problem.v.fill_row(40, kNaN);
  std::vector<double> lse;
  run_attention(problem, nullptr, lse);
  for (int r : {3, 17}) {
    EXPECT_EQ(lse[r], -kInf) << "row " << r;
    for (int64_t d = 0; d < c.head_dim_v; ++d) ASSERT_EQ(problem.out.get(r, d), 0) << "row " << r;
  }
}

TEST_P(StripEngineTest, Probabilities) {
  for (const Case& c : kCases) {
    Problem problem(engine(), GetParam().dtype, c);
    const bool is_double = GetParam().dtype == DType::kFloat64;
    std::vector<double> lse(kStripRows, -kInf);
    for (int r = 0; r < c.num_rows; ++r) {
      double sum = 0;
      for (int64_t key = 0; key < c.num_keys; ++key) {
        if (r != 5 && problem.sees(r, key)) sum += std::exp(problem.score(r, key));
      }
      lse[r] = std::log(sum);
    }
    std::vector<float> lse_float(lse.begin(), lse.end());
    const void* lse_arg = is_double ? static_cast<void*>(lse.data()) : lse_float.data();
    Scratch queries(engine().query_bytes(problem.shape));
    Scratch packed(engine().chunk_bytes(problem.shape));
    engine().begin_thread();
    problem.pack_queries(queries.get());
    for (int64_t begin = 0; begin < c.num_keys; begin += kChunkKeys) {
      const KeyChunk chunk = problem.chunk_at(begin);
      const ChunkMask mask = problem.mask_at(begin, chunk);
      Scratch p_t(sizeof(double) * kChunkKeys * kStripRows);
      engine().pack_chunk(problem.shape, chunk, false, packed.get());
      engine().probabilities(problem.shape, queries.get(), chunk, packed.get(), mask, lse_arg,
                             p_t.get());
      for (int64_t slot = 0; slot < chunk.num_slots(); ++slot) {
        for (int r = 0; r < c.num_rows; ++r) {
          const double p = read_real(GetParam().dtype, p_t.get(), slot * kStripRows + r);
          if (slot >= chunk.num_keys || lse[r] == -kInf || !problem.sees(r, begin + slot)) {
            ASSERT_EQ(p, 0) << c.name << " slot " << slot << " row " << r;
          } else {
            const double s = problem.score(r, begin + slot);
            const double error = 4 * logit_tolerance(problem, std::abs(s) + std::abs(lse[r]));
            ASSERT_NEAR(p, std::exp(s - lse[r]), error * std::exp(s - lse[r]) + 1e-37)
                << c.name << " slot " << slot << " row " << r;
          }
        }
      }
    }
    engine().end_thread();
  }
}

TEST_P(StripEngineTest, Scores) {
  const Case cases[] = {{"Small", 40, 24, 8, 32, sees_all},
                        {"Softcap", 70, 64, 8, 20, sees_all, 3.0},
                        {"WideHeadDim", 64, 2048, 8, 32, sees_all}};
  for (const Case& c : cases) {
    Problem problem(engine(), GetParam().dtype, c);
    Scratch queries(engine().query_bytes(problem.shape));
    Scratch packed(engine().chunk_bytes(problem.shape));
    Scratch s_t(sizeof(double) * kChunkKeys * kStripRows);
    engine().begin_thread();
    problem.pack_queries(queries.get());
    const KeyChunk chunk = problem.chunk_at(0);
    engine().pack_chunk(problem.shape, chunk, false, packed.get());
    engine().scores(problem.shape, queries.get(), chunk, packed.get(), s_t.get());
    engine().end_thread();
    for (int64_t slot = 0; slot < chunk.num_keys; ++slot) {
      for (int r = 0; r < c.num_rows; ++r) {
        const double s = problem.score(r, slot);
        ASSERT_NEAR(read_real(GetParam().dtype, s_t.get(), slot * kStripRows + r), s,
                    logit_tolerance(problem, std::abs(s) + 1))
            << c.name << " slot " << slot << " row " << r;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, StripEngineTest, testing::ValuesIn(engine_cases()),
                         engine_case_name);

}  // namespace
}  // namespace longctx::cpu
