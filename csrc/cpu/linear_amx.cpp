// The engine of linear attention on AMX tiles, for bf16 and, as two or three bf16 parts, fp16 and
// float32 (see amx_pack.h). Blocks of 32 x 32 results keep 2 x 2 accumulator tiles.
//   P = pairs * (Q K^T)         A = q rows as the user stores them, B = k^T
//   O = rows * (Q S) + P V      A = q, p; B = s, v; the weights act on float results
//   S = carry S + (keys K)^T V  A = k^T with its dwords taken apart and weighted, B = v
// The state is float; its bf16 form, the B operand of the next chunk, is written along with it.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx_pack.h"
#include "amx_products.h"
#include "linear_engine.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kSide = 32;  // rows and columns of a block of results
constexpr int64_t kHalves = kLinearChunk / kSide;

// Tiles of one factor of a block; strides in bytes.
struct Tiles {
  const char* data;
  int64_t row = kTileRow;  // from one tile row to the next
  int64_t second;          // to the other 16 rows (A) or columns (B) of the block
  int64_t step;            // to the next 32 of depth
  int64_t part;
};

// Parts of the factors of the products of kNumParts parts: neighbours share a factor, which stays
// in its tiles. Products left out are below the rounding of the dtype.
template <int kNumParts>
constexpr int kOrder[6][2] = {{0, 0}};
template <>
constexpr int kOrder<2>[6][2] = {{1, 0}, {0, 0}, {0, 1}};
template <>
constexpr int kOrder<3>[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

// block = a b over `steps` of depth, [32][32] float.
template <int kNumParts>
LONGCTX_ALWAYS_INLINE inline void multiply_block(const Tiles& a, const Tiles& b, int64_t steps,
                                                 float* block) {
  zero_tiles();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 6
    for (int n = 0; n < kNumProducts<kNumParts>; ++n) {
      const char* a0 = a.data + step * a.step + kOrder<kNumParts>[n][0] * a.part;
      const char* b0 = b.data + step * b.step + kOrder<kNumParts>[n][1] * b.part;
      const bool new_a = n == 0 || kOrder<kNumParts>[n][0] != kOrder<kNumParts>[n - 1][0];
      const bool new_b = n == 0 || kOrder<kNumParts>[n][1] != kOrder<kNumParts>[n - 1][1];
      if (new_b) _tile_loadd(6, b0, kTileRow);
      if (new_a) _tile_loadd(4, a0, a.row);
      _tile_dpbf16ps(0, 4, 6);
      if (new_b) _tile_loadd(7, b0 + b.second, kTileRow);
      _tile_dpbf16ps(1, 4, 7);
      if (new_a) _tile_loadd(5, a0 + a.second, a.row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_scores(block);
}

// Brings rows [first, last) of a row matrix into the L2 cache.
inline void prefetch_rows(const void* data, int64_t stride_bytes, int64_t bytes, int64_t first,
                          int64_t last) {
  const char* row = static_cast<const char*>(data) + first * stride_bytes;
  for (int64_t i = first; i < last; ++i, row += stride_bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
  }
}

template <class In>
struct AmxLinear {
  static constexpr int kNumParts = kParts<In>;

  static int64_t steps(const LinearShape& shape) { return (shape.head_dim + 31) / 32; }
  static int64_t blocks(const LinearShape& shape) { return (shape.state_dim() + 31) / 32; }
  static int64_t acc_stride(const LinearShape& shape) { return blocks(shape) * kSide; }

  struct Packed {
    Packed(const LinearShape& shape, void* memory)
        : q(static_cast<char*>(memory)),
          k_t(q + rows_bytes(shape)),
          weighted(k_t + rows_bytes(shape)),
          v(weighted + rows_bytes(shape)),
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
    return 3 * Packed::rows_bytes(shape) + kHalves * Packed::half_bytes(shape) +
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

  // 32 floats as bf16 parts; x0 and x1 are used up.
  template <class Store>
  static void split(__m512 x0, __m512 x1, const Store& store) {
    for (int part = 0; part < kNumParts; ++part) {
      const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
      store(part, pair);
      if (part + 1 == kNumParts) break;
      x0 = rest_of(x0, _mm512_castsi512_si256(pair));
      x1 = rest_of(x1, _mm512_extracti64x4_epi64(pair, 1));
    }
  }

  // s = carry s + added of one block, and its tiles.
  static void set_block(const LinearShape& shape, const State& state, int64_t step, int64_t block,
                        float carry, const float* added) {
    float* s = state.s + (step * blocks(shape) + block) * kSide * kSide;
    const int64_t part_stride = 2 * blocks(shape) * kTileBytes;
    char* tiles = state.tiles + step * kNumParts * part_stride + block * 2 * kTileBytes;
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 factor = _mm512_set1_ps(carry);
    // A carry of 0 forgets: what was there is not read.
    const __mmask16 kept = carry == 0.0f ? 0 : 0xffff;
    for (int pair = 0; pair < 16; ++pair) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = 2 * pair * kSide + half * 16;
        const __m512 even = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kept, s + at), factor,
                                            _mm512_load_ps(added + at));
        const __m512 odd = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kept, s + at + kSide), factor,
                                           _mm512_load_ps(added + at + kSide));
        _mm512_store_ps(s + at, even);
        _mm512_store_ps(s + at + kSide, odd);
        char* row = tiles + half * kTileBytes + pair * kTileRow;
        split(even, odd, [&](int part, __m512i words) {
          _mm512_store_si512(row + part * part_stride, _mm512_permutexvar_epi16(interleave, words));
        });
      }
    }
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
        set_block(shape, state, step, b, 0.0f, block);
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
           chunk.q_stride <= 320;
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
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<const In*>(chunk.k) + (first + i) * chunk.k_stride;
      }
      pack_query_tiles<In>(strip, rows, static_cast<int>(count),
                           packed.k_t + half * kNumParts * steps(shape) * 2 * kTileBytes);
      pack_values(shape, static_cast<const In*>(chunk.v) + first * chunk.v_stride, chunk.v_stride,
                  count, packed.v + half * Packed::half_bytes(shape));
    }
  }

  // Pairs of keys, column by column.
  static void pack_values(const LinearShape& shape, const In* v, int64_t stride, int64_t count,
                          char* to) {
    const int64_t part_stride = 2 * blocks(shape) * kTileBytes;
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t b = 0; b < blocks(shape); ++b) {
      const int64_t column = b * kSide;
      const __mmask32 columns =
          column < shape.head_dim_v ? depth_mask(shape.head_dim_v, column) : __mmask32{0};
      const int64_t ones_at = shape.head_dim_v - column;
      const __mmask32 ones = shape.normalize && ones_at >= 0 && ones_at < kSide
                                 ? __mmask32{1} << ones_at
                                 : __mmask32{0};
      const auto load = [&](int64_t key, __m512i(&parts)[kNumParts]) {
        for (__m512i& part : parts) part = _mm512_setzero_si512();
        if (key >= count) return;
        load_parts<In>(v + key * stride + column, columns, parts);
        constexpr short kOne = 0x3f80;
        parts[0] = _mm512_mask_mov_epi16(parts[0], ones, _mm512_set1_epi16(kOne));
      };
      for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i even[kNumParts], odd[kNumParts];
        load(2 * pair, even);
        load(2 * pair + 1, odd);
        for (int part = 0; part < kNumParts; ++part) {
          const __m512i low = _mm512_unpacklo_epi16(even[part], odd[part]);
          const __m512i high = _mm512_unpackhi_epi16(even[part], odd[part]);
          char* tile = to + part * part_stride + b * 2 * kTileBytes + pair * kTileRow;
          _mm512_store_si512(tile, _mm512_permutex2var_epi64(low, first, high));
          _mm512_store_si512(tile + kTileBytes, _mm512_permutex2var_epi64(low, second, high));
        }
      }
    }
  }

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

  // Spreads the rows of the next chunk over `count` steps: a burst would take the line fill buffers
  // from the tile loads.
  static void prefetch(const LinearShape& shape, const LinearChunk* next, bool queries, bool keys,
                       bool values, int64_t step, int64_t count) {
    if (next == nullptr) return;
    constexpr int64_t kBytes = sizeof(In);
    const auto slice = [&](const void* data, int64_t stride, int64_t dim, int64_t rows) {
      prefetch_rows(data, stride * kBytes, dim * kBytes, rows * step / count,
                    rows * (step + 1) / count);
    };
    if (queries) slice(next->q, next->q_stride, shape.head_dim, next->num_rows);
    if (keys) slice(next->k, next->k_stride, shape.head_dim, next->num_keys);
    if (values) slice(next->v, next->v_stride, shape.head_dim_v, next->num_keys);
  }

  static void attend(const LinearShape& shape, const LinearChunk& chunk, const void* memory,
                     const ChunkWeights<float>& weights, const void* state_memory,
                     const LinearOutput<float>& output, float* acc) {
    const Packed packed(shape, const_cast<void*>(memory));
    const State state(shape, const_cast<void*>(state_memory));
    const int64_t halves = (chunk.num_rows + kSide - 1) / kSide;
    const int64_t key_halves = weights.pairs == nullptr ? 0 : (chunk.num_keys + kSide - 1) / kSide;
    const auto seen = [&](int64_t half) {
      return weights.causal ? std::min(key_halves, half + 1) : key_halves;
    };
    // p = pairs * q k^T
    alignas(64) float inter[kSide * kSide], intra[kSide * kSide];
    const int64_t k_part = steps(shape) * 2 * kTileBytes;
    finish_stores();
    for (int64_t half = 0; half < halves; ++half) {
      for (int64_t keys = 0; keys < seen(half); ++keys) {
        multiply_block<kNumParts>(
            query_tiles(shape, chunk, packed, half),
            {packed.k_t + keys * kNumParts * k_part, kTileRow, kTileBytes, 2 * kTileBytes, k_part},
            steps(shape), intra);
        weigh_scores(weights.pairs + half * kSide * kLinearChunk + keys * kSide, intra,
                     packed.p + half * 2 * kNumParts * kHalves * kTileBytes + keys * kTileBytes);
      }
    }
    finish_stores();
    // acc = rows q state + p v
    const bool direct = output.out != nullptr && output.more == nullptr && !shape.normalize;
    const int64_t part = 2 * blocks(shape) * kTileBytes;
    for (int64_t block = 0; block < blocks(shape); ++block) {
      for (int64_t half = 0; half < halves; ++half) {
        prefetch(shape, chunk.next, true, true, false, block * halves + half,
                 blocks(shape) * halves);
        if (weights.rows != nullptr) {
          multiply_block<kNumParts>(
              query_tiles(shape, chunk, packed, half),
              {state.tiles + block * 2 * kTileBytes, kTileRow, kTileBytes, kNumParts * part, part},
              steps(shape), inter);
        }
        if (seen(half) > 0) {
          multiply_block<kNumParts>(
              {packed.p + half * 2 * kNumParts * kHalves * kTileBytes, kTileRow,
               kNumParts * kHalves * kTileBytes, kTileBytes, kHalves * kTileBytes},
              value_tiles(shape, packed, block), seen(half), intra);
        }
        const float* row_weights = weights.rows != nullptr ? weights.rows + half * kSide : nullptr;
        const float* own = seen(half) > 0 ? intra : nullptr;
        if (direct) {
          write_block(shape, row_weights, inter, own, half, block,
                      std::min(chunk.num_rows - half * kSide, kSide), output);
        } else {
          float* to = acc + half * kSide * acc_stride(shape) + block * kSide;
          for (int64_t i = 0; i < kSide; ++i, to += acc_stride(shape)) {
            _mm512_store_ps(to, joined(row_weights, inter, own, i, 0));
            _mm512_store_ps(to + 16, joined(row_weights, inter, own, i, 16));
          }
        }
      }
    }
    if (output.out != nullptr && !direct) finish(shape, acc, chunk.num_rows, output);
  }

  // weights[row] inter + intra; a null one is zero.
  static __m512 joined(const float* weights, const float* inter, const float* intra, int64_t row,
                       int64_t column) {
    const int64_t at = row * kSide + column;
    const __m512 x = intra != nullptr ? _mm512_load_ps(intra + at) : _mm512_setzero_ps();
    if (weights == nullptr) return x;
    return _mm512_fmadd_ps(_mm512_set1_ps(weights[row]), _mm512_load_ps(inter + at), x);
  }

  static void write_block(const LinearShape& shape, const float* weights, const float* inter,
                          const float* intra, int64_t half, int64_t block, int64_t rows,
                          const LinearOutput<float>& output) {
    const __m512 scale = _mm512_set1_ps(output.scale);
    const __mmask32 mask = depth_mask(shape.head_dim_v, block * kSide);
    In* out = static_cast<In*>(output.out) + half * kSide * output.out_stride + block * kSide;
    for (int64_t i = 0; i < rows; ++i, out += output.out_stride) {
      store_outputs(_mm512_mul_ps(joined(weights, inter, intra, i, 0), scale),
                    _mm512_mul_ps(joined(weights, inter, intra, i, 16), scale), mask, out);
    }
  }

  static void store_outputs(__m512 x0, __m512 x1, __mmask32 mask, In* out) {
    if constexpr (kNumParts == 3) {
      _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), x0);
      _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(mask >> 16), x1);
    } else if constexpr (kNumParts == 2) {
      const __m256i low = _mm512_cvtps_ph(x0, _MM_FROUND_TO_NEAREST_INT);
      const __m256i high = _mm512_cvtps_ph(x1, _MM_FROUND_TO_NEAREST_INT);
      _mm512_mask_storeu_epi16(out, mask, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    } else {
      _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
    }
  }

  // [32 rows][32 keys] of scores as the A operand p.
  static void weigh_scores(const float* pairs, const float* scores, char* p) {
    for (int64_t i = 0; i < kSide; ++i, pairs += kLinearChunk, scores += kSide) {
      const auto weigh = [&](int64_t j) {
        const __m512 weight = _mm512_loadu_ps(pairs + j);
        // Where the weight is 0 a score may be anything.
        const __mmask16 counts = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        return _mm512_maskz_mul_ps(counts, weight, _mm512_load_ps(scores + j));
      };
      char* row = p + i / 16 * kNumParts * kHalves * kTileBytes + i % 16 * kTileRow;
      split(weigh(0), weigh(16), [&](int part, __m512i words) {
        _mm512_store_si512(row + part * kHalves * kTileBytes, words);
      });
    }
  }

  static void update(const LinearShape& shape, const LinearChunk& chunk, void* memory,
                     const ChunkWeights<float>& weights, void* state_memory) {
    const Packed packed(shape, memory);
    const State state(shape, state_memory);
    const int64_t key_halves = (chunk.num_keys + kSide - 1) / kSide;
    for (int64_t half = 0; half < key_halves; ++half) weigh_keys(shape, packed, half, weights.keys);
    finish_stores();
    alignas(64) float added[kSide * kSide];
    for (int64_t step = 0; step < steps(shape); ++step) {
      for (int64_t block = 0; block < blocks(shape); ++block) {
        multiply_block<kNumParts>(
            {packed.weighted + step * 2 * kNumParts * kHalves * kTileBytes, kTileRow,
             kNumParts * kHalves * kTileBytes, kTileBytes, kHalves * kTileBytes},
            value_tiles(shape, packed, block), key_halves, added);
        set_block(shape, state, step, block, weights.carry, added);
      }
    }
  }

  // Rows of (keys K)^T: the even or odd words of k^T's dwords.
  static void weigh_keys(const LinearShape& shape, const Packed& packed, int64_t half,
                         const float* weights) {
    const int64_t part_stride = steps(shape) * 2 * kTileBytes;
    const char* k_t = packed.k_t + half * kNumParts * part_stride;
    const __m512 weight0 = _mm512_loadu_ps(weights + half * kSide);
    const __m512 weight1 = _mm512_loadu_ps(weights + half * kSide + 16);
    for (int64_t step = 0; step < steps(shape); ++step) {
      for (int64_t pair = 0; pair < 16; ++pair) {
        const char* from = k_t + step * 2 * kTileBytes + pair * kTileRow;
        __m512 even0 = _mm512_setzero_ps(), even1 = even0, odd0 = even0, odd1 = even0;
        for (int part = kNumParts - 1; part >= 0; --part) {
          const __m512i words0 = _mm512_load_si512(from + part * part_stride);
          const __m512i words1 = _mm512_load_si512(from + part * part_stride + kTileBytes);
          even0 = _mm512_add_ps(even0, even_words(words0));
          even1 = _mm512_add_ps(even1, even_words(words1));
          odd0 = _mm512_add_ps(odd0, odd_words(words0));
          odd1 = _mm512_add_ps(odd1, odd_words(words1));
        }
        char* to = packed.weighted + (step * 2 + pair / 8) * kNumParts * kHalves * kTileBytes +
                   half * kTileBytes + pair % 8 * 2 * kTileRow;
        const auto store = [&](char* row, __m512 x0, __m512 x1) {
          split(_mm512_mul_ps(x0, weight0), _mm512_mul_ps(x1, weight1),
                [&](int part, __m512i words) {
                  _mm512_store_si512(row + part * kHalves * kTileBytes, words);
                });
        };
        store(to, even0, even1);
        store(to + kTileRow, odd0, odd1);
      }
    }
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
        store_outputs(load(c, mask), load(c + 16, mask >> 16), mask, out + c);
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
