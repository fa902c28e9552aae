// The engine of linear attention on AMX tiles, for bf16 and, as two or three bf16 parts, fp16 and
// float32 (see amx_pack.h). Blocks of 32 x 32 results keep 2 x 2 accumulator tiles.
//   P = pairs * (Q K^T)         A = q rows as the user stores them, B = k^T
//   O = rows * (Q S) + P V      A = q, p; B = s, v; the weights act on float results
//   S = carry S + (keys K)^T V  A = k^T with its dwords taken apart and weighted, B = v
// The state is float; its bf16 form, the B operand of the next chunk, is written along with it.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "amx_pack.h"
#include "amx_products.h"
#include "linear_amx_blocks.h"
#include "linear_amx_operands.h"
#include "linear_engine.h"

namespace longctx::cpu {
namespace {

template <class In>
struct AmxLinear {
  static constexpr int kNumParts = kParts<In>;
  // Operands are made beside the products that do not need them yet: in the cache float32 took 419
  // ns a token and head instead of 481. One part leaves no room for it: bf16 was 1% to 6% slower.
  static constexpr bool kBeside = kNumParts > 1;

  static int64_t steps(const LinearShape& shape) { return (shape.head_dim + 31) / 32; }
  static int64_t blocks(const LinearShape& shape) { return (shape.state_dim() + 31) / 32; }
  static int64_t acc_stride(const LinearShape& shape) { return blocks(shape) * kSide; }

  static void end_thread() {
    longctx::cpu::end_thread();
    _mm_sfence();  // rows that were streamed past the caches
  }

  struct Packed {
    Packed(const LinearShape& shape, void* memory)
        : q(static_cast<char*>(memory)),
          k_t(q + rows_bytes(shape)),
          weighted(k_t + rows_bytes(shape)),
          v(weighted + 2 * steps(shape) * kNumParts * kHalves * kTileBytes),
          p(v + kHalves * half_bytes(shape)),
          zeros(p + kLinearChunk / 16 * kNumParts * kHalves * kTileBytes) {}
    static int64_t rows_bytes(const LinearShape& shape) {
      return kLinearChunk / 16 * kNumParts * steps(shape) * kTileBytes;
    }
    static int64_t half_bytes(const LinearShape& shape) {
      return kNumParts * 2 * blocks(shape) * kTileBytes;
    }
    char* q;         // [16 rows][part][depth step] tiles
    char* k_t;       // [32 keys][part][depth step][16 keys] tiles of 16 pairs of depth x 16 keys
    char* weighted;  // [16 of depth][part][32 keys] tiles of 16 of depth x 32 keys
    char* v;         // [32 keys][part][16 columns] tiles of 16 pairs of keys x 16 columns
    char* p;         // [16 rows][part][32 keys] tiles of 16 rows x 32 keys
    char* zeros;     // a row of q
  };
  static int64_t packed_bytes(const LinearShape& shape) {
    return 2 * Packed::rows_bytes(shape) + 2 * steps(shape) * kNumParts * kHalves * kTileBytes +
           kHalves * Packed::half_bytes(shape) +
           kLinearChunk / 16 * kNumParts * kHalves * kTileBytes + steps(shape) * 32 * sizeof(In);
  }

  struct State {
    State(const LinearShape& shape, void* memory)
        : s(static_cast<float*>(memory)),
          tiles(reinterpret_cast<char*>(s + steps(shape) * blocks(shape) * kSide * kSide)) {}
    float* s;     // [depth step][block] of [32][32]
    char* tiles;  // [depth step][part][16 columns] tiles of 16 pairs of depth x 16 columns
  };
  static int64_t state_bytes(const LinearShape& shape) {
    return steps(shape) * blocks(shape) *
           (kSide * kSide * static_cast<int64_t>(sizeof(float)) + kNumParts * 2 * kTileBytes);
  }

  static StateBlock<kNumParts> state_block(const LinearShape& shape, const State& state,
                                           int64_t step, int64_t block, float carry,
                                           const float* added) {
    StateBlock<kNumParts> result;
    result.s = state.s + (step * blocks(shape) + block) * kSide * kSide;
    result.part_stride = 2 * blocks(shape) * kTileBytes;
    result.tiles = state.tiles + step * kNumParts * result.part_stride + block * 2 * kTileBytes;
    result.added = added;
    result.carry = carry;
    result.pair = 0;
    return result;
  }

  static void load_state(const LinearShape& shape, const float* from, void* memory) {
    const State state(shape, memory);
    alignas(64) float block[kSide * kSide];
    for (int64_t step = 0; step < steps(shape); ++step) {
      for (int64_t b = 0; b < blocks(shape); ++b) {
        std::memset(block, 0, sizeof(block));
        const int64_t rows = std::min(shape.head_dim - step * kSide, kSide);
        const int64_t columns = std::min(shape.state_dim() - b * kSide, kSide);
        for (int64_t d = 0; from != nullptr && d < rows; ++d) {
          std::memcpy(block + d * kSide, from + (step * kSide + d) * shape.state_dim() + b * kSide,
                      columns * sizeof(float));
        }
        state_block(shape, state, step, b, 0.0f, block).finish();
      }
    }
  }

  static void store_state(const LinearShape& shape, const void* memory, float* to) {
    const State state(shape, const_cast<void*>(memory));
    for (int64_t d = 0; d < shape.head_dim; ++d, to += shape.state_dim()) {
      for (int64_t b = 0; b < blocks(shape); ++b) {
        const float* block = state.s + (d / kSide * blocks(shape) + b) * kSide * kSide;
        std::memcpy(to + b * kSide, block + d % kSide * kSide,
                    std::min(shape.state_dim() - b * kSide, kSide) * sizeof(float));
      }
    }
  }

  // Rows that are tiles already: bf16, full depth, a whole chunk, and close enough together not to
  // fight for the same cache sets.
  static bool in_place(const LinearShape& shape, const LinearChunk& chunk) {
    return kNumParts == 1 && shape.head_dim % kDepth == 0 && chunk.num_rows == kLinearChunk &&
           std::abs(chunk.q_stride) <= 320;
  }

  static StripShape strip_shape(const LinearShape& shape) {
    StripShape strip;
    strip.head_dim = shape.head_dim;
    strip.head_dim_v = shape.head_dim_v;
    return strip;
  }

  static void pack(const LinearShape& shape, const LinearChunk& chunk, void* memory) {
    const Packed packed(shape, memory);
    const StripShape strip = strip_shape(shape);
    const void* rows[kSide];
    if (chunk.q != nullptr && !in_place(shape, chunk)) {
      std::memset(packed.zeros, 0, shape.head_dim * sizeof(In));
      for (int64_t first = 0; first < chunk.num_rows; first += kSide) {
        for (int64_t i = 0; i < kSide; ++i) {
          const In* row = static_cast<const In*>(chunk.q) + (first + i) * chunk.q_stride;
          rows[i] = first + i < chunk.num_rows ? static_cast<const void*>(row) : packed.zeros;
        }
        const int64_t group = kNumParts * steps(shape) * kTileBytes;
        for (int half = 0; half < 2; ++half) {
          pack_key_tiles<In>(strip, rows + half * 16, packed.q + (first / 16 + half) * group);
        }
      }
    }
    if (chunk.k == nullptr) return;
    for (int64_t half = 0; half < kHalves; ++half) {
      const int64_t first = half * kSide;
      const int64_t count = std::min(std::max<int64_t>(chunk.num_keys - first, 0), kSide);
      if (count == 0) break;
      char* to = packed.k_t + half * kNumParts * steps(shape) * 2 * kTileBytes;
      const In* k = static_cast<const In*>(chunk.k) + first * chunk.k_stride;
      if (count == kSide) {
        transpose_keys<In>(k, chunk.k_stride, shape.head_dim, to);
      } else {
        for (int64_t i = 0; i < count; ++i) rows[i] = k + i * chunk.k_stride;
        pack_query_tiles<In>(strip, rows, static_cast<int>(count), to);
      }
    }
    if (!kBeside || chunk.q == nullptr) value_packing(shape, chunk, packed).finish();
  }

  // With kBeside and rows in the chunk, attend does these two.
  static ValuePacking<In> value_packing(const LinearShape& shape, const LinearChunk& chunk,
                                        const Packed& packed) {
    return {static_cast<const In*>(chunk.v),
            chunk.v_stride,
            shape.head_dim_v,
            shape.normalize,
            chunk.num_keys,
            blocks(shape),
            packed.v,
            halves_of(chunk.num_keys) * kSide};
  }
  static KeyWeighing<kNumParts> key_weighing(const LinearShape& shape, const LinearChunk& chunk,
                                             const Packed& packed, const float* weights) {
    const int64_t halves = halves_of(chunk.num_keys);
    return {packed.k_t,   weights, packed.weighted,
            steps(shape), halves,  steps(shape) * halves * KeyWeighing<kNumParts>::kPairs};
  }
  static int64_t halves_of(int64_t count) { return (count + kSide - 1) / kSide; }

  static Tiles query_tiles(const LinearShape& shape, const LinearChunk& chunk, const Packed& packed,
                           int64_t half) {
    if (in_place(shape, chunk)) {
      const int64_t row = chunk.q_stride * static_cast<int64_t>(sizeof(In));
      return {static_cast<const char*>(chunk.q) + half * kSide * row, row, 16 * row, kTileRow, 0};
    }
    const int64_t part = steps(shape) * kTileBytes;
    return {packed.q + half * 2 * kNumParts * part, kTileRow, kNumParts * part, kTileBytes, part};
  }
  static Tiles value_tiles(const LinearShape& shape, const Packed& packed, int64_t block) {
    return {packed.v + block * 2 * kTileBytes, kTileRow, kTileBytes, Packed::half_bytes(shape),
            2 * blocks(shape) * kTileBytes};
  }

  // The rows of the next chunk.
  struct Ahead {
    explicit Ahead(const LinearShape& shape, const LinearChunk* next) {
      if (next == nullptr) return;
      q = rows_of(next->q, next->q_stride, shape.head_dim, next->num_rows);
      k = rows_of(next->k, next->k_stride, shape.head_dim, next->num_keys);
      v = rows_of(next->v, next->v_stride, shape.head_dim_v, next->num_keys);
    }
    static RowPrefetch rows_of(const void* data, int64_t stride, int64_t dim, int64_t rows) {
      constexpr int64_t kBytes = sizeof(In);
      return {static_cast<const char*>(data), stride * kBytes, dim * kBytes, rows, 0};
    }
    RowPrefetch q, k, v;
  };

  static void attend(const LinearShape& shape, const LinearChunk& chunk, const void* memory,
                     const ChunkWeights<float>& weights, const void* state_memory,
                     const LinearOutput<float>& output, float* acc) {
    const Packed packed(shape, const_cast<void*>(memory));
    const State state(shape, const_cast<void*>(state_memory));
    const int64_t halves = halves_of(chunk.num_rows);
    const int64_t key_halves = weights.pairs == nullptr ? 0 : halves_of(chunk.num_keys);
    const auto seen = [&](int64_t half) {
      return weights.causal ? std::min(key_halves, half + 1) : key_halves;
    };
    alignas(64) float inter[2][kSide * kSide], intra[2][kSide * kSide];
    int turn = 0;
    Ahead ahead(shape, chunk.next);
    // p = pairs * q k^T
    const int64_t k_part = steps(shape) * 2 * kTileBytes;
    const int64_t p_rows = 2 * kNumParts * kHalves * kTileBytes;
    ScoreBlock<kNumParts> scores;
    ValuePacking<In> values;
    KeyWeighing<kNumParts> keys;
    if (kBeside && key_halves > 0) {
      values = value_packing(shape, chunk, packed);
      keys = key_weighing(shape, chunk, packed, weights.keys);
    }
    finish_stores();
    for (int64_t half = 0; half < halves; ++half) {
      for (int64_t block = 0; block < seen(half); ++block, turn ^= 1) {
        const Tiles k{packed.k_t + block * kNumParts * k_part, kTileRow, kTileBytes, 2 * kTileBytes,
                      k_part};
        multiply_block<kNumParts>(query_tiles(shape, chunk, packed, half), k, steps(shape),
                                  intra[turn], [&]() LONGCTX_ALWAYS_INLINE {
                                    scores.advance();
                                    for (int i = 0; kBeside && i < 3; ++i) values.advance();
                                    ahead.q.advance();
                                  });
        scores.finish();
        scores = {weights.pairs + half * kSide * kLinearChunk + block * kSide, intra[turn],
                  packed.p + half * p_rows + block * kTileBytes, 0};
      }
    }
    scores.finish();
    values.finish();
    finish_stores();
    // acc = rows q state + p v
    const bool direct = output.out != nullptr && output.more == nullptr && !shape.normalize;
    const int64_t part = 2 * blocks(shape) * kTileBytes;
    OutputBlock<In> rows;
    const auto between = [&]() LONGCTX_ALWAYS_INLINE {
      rows.advance();
      if (kBeside) keys.advance();
      ahead.q.advance();
      ahead.k.advance();
      ahead.k.advance();
    };
    for (int64_t block = 0; block < blocks(shape); ++block) {
      const Tiles s{state.tiles + block * 2 * kTileBytes, kTileRow, kTileBytes, kNumParts * part,
                    part};
      for (int64_t half = 0; half < halves; ++half, turn ^= 1) {
        if (weights.rows != nullptr) {
          multiply_block<kNumParts>(query_tiles(shape, chunk, packed, half), s, steps(shape),
                                    inter[turn], between);
        }
        if (seen(half) > 0) {
          const Tiles p{packed.p + half * p_rows, kTileRow, kNumParts * kHalves * kTileBytes,
                        kTileBytes, kHalves * kTileBytes};
          multiply_block<kNumParts>(p, value_tiles(shape, packed, block), seen(half), intra[turn],
                                    between);
        }
        rows.finish();
        rows.weights = weights.rows != nullptr ? weights.rows + half * kSide : nullptr;
        rows.inter = inter[turn];
        rows.intra = seen(half) > 0 ? intra[turn] : nullptr;
        rows.row = 0;
        if (direct) {
          rows.out =
              static_cast<In*>(output.out) + half * kSide * output.out_stride + block * kSide;
          rows.stride = output.out_stride;
          rows.num_rows = std::min(chunk.num_rows - half * kSide, kSide);
          rows.scale = output.scale;
          rows.stream = output.stream;
          rows.mask = depth_mask(shape.head_dim_v, block * kSide);
        } else {
          rows.acc = acc + half * kSide * acc_stride(shape) + block * kSide;
          rows.stride = acc_stride(shape);
          rows.num_rows = kSide;
        }
      }
    }
    rows.finish();
    keys.finish(steps(shape));
    if (output.out != nullptr && !direct) finish(shape, acc, chunk.num_rows, output);
  }

  static void update(const LinearShape& shape, const LinearChunk& chunk, void* memory,
                     const ChunkWeights<float>& weights, void* state_memory) {
    const Packed packed(shape, memory);
    const State state(shape, state_memory);
    const int64_t key_halves = halves_of(chunk.num_keys);
    alignas(64) float added[2][kSide * kSide];
    int turn = 0;
    StateBlock<kNumParts> sums;
    Ahead ahead(shape, chunk.next);
    KeyWeighing<kNumParts> keys;
    if (!kBeside || chunk.q == nullptr) {
      keys = key_weighing(shape, chunk, packed, weights.keys);
    }
    if (chunk.q != nullptr) ahead.k.rows = 0;  // attend has had them
    const auto between = [&]() LONGCTX_ALWAYS_INLINE {
      sums.advance();
      if (kBeside) keys.advance();
      ahead.k.advance();
      ahead.v.advance();
      ahead.v.advance();
    };
    for (int64_t step = 0; step < steps(shape); ++step) {
      keys.finish(step + 1);
      finish_stores();
      const char* weighted = packed.weighted + step * 2 * kNumParts * kHalves * kTileBytes;
      const Tiles k{weighted, kTileRow, kNumParts * kHalves * kTileBytes, kTileBytes,
                    kHalves * kTileBytes};
      for (int64_t block = 0; block < blocks(shape); ++block, turn ^= 1) {
        multiply_block<kNumParts>(k, value_tiles(shape, packed, block), key_halves, added[turn],
                                  between);
        sums.finish();
        sums = state_block(shape, state, step, block, weights.carry, added[turn]);
      }
    }
    sums.finish();
  }

  static void finish(const LinearShape& shape, const float* acc, int64_t num_rows,
                     const LinearOutput<float>& output) {
    const int64_t columns = shape.head_dim_v;
    for (int64_t i = 0; i < num_rows; ++i) {
      const float* row = acc + i * acc_stride(shape);
      const float* more = output.more != nullptr ? output.more + i * acc_stride(shape) : nullptr;
      In* out = static_cast<In*>(output.out) + i * output.out_stride;
      float scale = output.scale;
      if (shape.normalize) {
        scale /= row[columns] + (more != nullptr ? more[columns] : 0.0f) + output.eps;
      }
      for (int64_t c = 0; c < columns; c += kSide) {
        const __mmask32 mask = depth_mask(columns, c);
        const auto load = [&](int64_t at, __mmask32 lanes) {
          const auto low = static_cast<__mmask16>(lanes);
          __m512 x = _mm512_maskz_loadu_ps(low, row + at);
          if (more != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(low, more + at));
          return _mm512_mul_ps(x, _mm512_set1_ps(scale));
        };
        store_outputs<In>(load(c, mask), load(c + 16, mask >> 16), mask, false, out + c);
      }
    }
  }
};

template <class In>
LinearEngine<float> amx_engine_of(DType dtype, const char* name) {
  using Linear = AmxLinear<In>;
  const LinearEngine<float>& vectors = avx512_linear_engine(dtype);
  return {
      name,           Linear::packed_bytes, Linear::state_bytes, Linear::acc_stride,  begin_thread,
      end_thread,     vectors.exponentials, Linear::load_state,  Linear::store_state, Linear::pack,
      Linear::attend, Linear::update,       Linear::finish,      vectors.decode};
}

}  // namespace

const LinearEngine<float>& amx_linear_engine(DType dtype) {
  static const auto kBFloat16 = amx_engine_of<BFloat16>(DType::kBFloat16, "amx-bf16");
  static const auto kFloat16 = amx_engine_of<Float16>(DType::kFloat16, "amx-bf16x2");
  static const auto kFloat32 = amx_engine_of<float>(DType::kFloat32, "amx-bf16x3");
  if (dtype == DType::kFloat32) return kFloat32;
  return dtype == DType::kFloat16 ? kFloat16 : kBFloat16;
}

}  // namespace longctx::cpu
