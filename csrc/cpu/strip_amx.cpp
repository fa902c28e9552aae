// The strip engine on AMX tiles, for bf16 and, as two or three bf16 parts, fp16 and float32.
//   S^T = K Q^T      A = k rows as the user stores them, B = q^T
//   P^T = 2^(S^T - reference)      two vectors of S^T make one of P^T in the layout of a B operand
//   O^T += V^T P^T   A = v^T, transposed once per chunk
// Each product keeps 2 x 2 accumulator tiles: 4 tile loads for 4 products. Scores of the next 32
// keys are computed between the exponentials of the current 32, so that tile and vector units
// overlap. The softmax reference of a row is its maximum when last looked at, not the running
// maximum: a sum that outgrows kSumLimit tells that it must be looked at again. Rounding is
// relative, so probabilities above 1 lose nothing, and the usual tile needs no maximum at all.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "amx_pack.h"
#include "amx_products.h"
#include "amx_softmax.h"
#include "avx512_math.h"
#include "longctx/mask.h"
#include "strip_engine.h"

namespace longctx::cpu {
namespace {

constexpr int kGroupTiles = 8;  // key tiles per pass over O^T: their P^T stays in L1
constexpr int kCacheLine = 64;

template <class In>
struct AmxStrip {
  static constexpr int kNumParts = kParts<In>;
  static constexpr int kNumProducts = longctx::cpu::kNumProducts<kNumParts>;
  using Exponentials = longctx::cpu::Exponentials<kNumParts>;
  using Values = longctx::cpu::Values<kNumParts>;
  static constexpr int kProbabilityTile = longctx::cpu::kProbabilityTile<kNumParts>;

  struct State {
    State(const StripShape& shape, void* memory)
        : out_t(static_cast<char*>(memory)),
          reference(reinterpret_cast<float*>(out_t + value_tiles(shape) * 2 * kTileBytes)),
          sum(reference + kStripRows),
          seen_values(reinterpret_cast<char*>(sum + kStripRows)) {}
    char* out_t;        // [value tile][half] tile of 16 columns x 16 queries, float
    float* reference;   // [kStripRows], in powers of two; -inf: nothing seen
    float* sum;         // [kStripRows] of 2^(s - reference)
    char* seen_values;  // scratch: v^T of one key tile
  };

  static int64_t query_bytes(const StripShape& shape) {
    return kNumParts * depth_steps(shape) * 2 * kTileBytes;
  }
  static int64_t key_bytes(const StripShape& shape) {
    return kNumParts * depth_steps(shape) * (kChunkKeys / 16) * kTileBytes;
  }
  static int64_t chunk_bytes(const StripShape& shape) {
    return key_bytes(shape) + kNumParts * value_tiles(shape) * (kChunkKeys / 32) * kTileBytes;
  }
  static int64_t state_bytes(const StripShape& shape) {
    return value_tiles(shape) * 2 * kTileBytes + 2 * kStripRows * sizeof(float) +
           value_tiles(shape) * kNumParts * kTileBytes;
  }

  static void pack_queries(const StripShape& shape, const void* const* rows, int num_rows,
                           void* queries) {
    pack_query_tiles<In>(shape, rows, num_rows, static_cast<char*>(queries));
  }

  // Rows that are tiles already: bf16, full depth, and close enough together not to fight for the
  // same cache sets.
  static bool in_place(const StripShape& shape, const KeyChunk& chunk, int64_t group) {
    return kNumParts == 1 && shape.head_dim % kDepth == 0 && chunk.k_stride <= 320 &&
           (chunk.contiguous16 >> group & 1) != 0;
  }

  static Rows key_rows(const StripShape& shape, const KeyChunk& chunk, const void* packed,
                       int64_t group) {
    if (in_place(shape, chunk, group)) {
      return {static_cast<const char*>(chunk.k_rows[group * 16]),
              chunk.k_stride * static_cast<int64_t>(sizeof(In)), kTileRow, 0};
    }
    const int64_t steps = depth_steps(shape);
    return {static_cast<const char*>(packed) + group * kNumParts * steps * kTileBytes, kTileRow,
            kTileBytes, steps * kTileBytes};
  }

  static void pack_chunk(const StripShape& shape, const KeyChunk& chunk, bool with_values,
                         void* packed) {
    const int64_t num_slots = chunk.num_slots();
    char* keys = static_cast<char*>(packed);
    const int64_t group_bytes = kNumParts * depth_steps(shape) * kTileBytes;
    for (int64_t group = 0; group < num_slots / 16; ++group) {
      if (in_place(shape, chunk, group)) continue;
      pack_key_tiles<In>(shape, chunk.k_rows + group * 16, keys + group * group_bytes);
    }
    if (!with_values) return;
    char* values = keys + key_bytes(shape);
    for (int64_t tile = 0; tile < num_slots / 32; ++tile) {
      for (int64_t column = 0; column < shape.head_dim_v; column += 32) {
        pack_value_tiles<In>(shape, chunk.v_rows + tile * 32, column,
                             values + value_tile(column / 16, 0, tile), value_tile(1, 0, 0),
                             value_tile(0, 1, 0));
      }
    }
  }

  // Bytes from the first tile of v^T.
  static int64_t value_tile(int64_t column_tile, int64_t part, int64_t key_tile) {
    return ((column_tile * kNumParts + part) * (kChunkKeys / 32) + key_tile) * kTileBytes;
  }

  static void reset(const StripShape& shape, void* memory) {
    const State state(shape, memory);
    std::memset(state.out_t, 0, value_tiles(shape) * 2 * kTileBytes);
    std::fill_n(state.reference, kStripRows, -kInf);
    std::fill_n(state.sum, kStripRows, 0.0f);
  }

  // s = q k^T of key tile `tile`, [32 keys][32 queries]. kSteps: depth steps if known, else 0.
  template <int kSteps, class Between>
  LONGCTX_ALWAYS_INLINE static void score_tile(const StripShape& shape, const char* queries,
                                               const KeyChunk& chunk, const void* packed, int tile,
                                               float* scores, const Between& between) {
    const Rows k0 = key_rows(shape, chunk, packed, 2 * tile);
    const Rows k1 = key_rows(shape, chunk, packed, 2 * tile + 1);
    multiply_scores<kNumParts, kSteps>(k0, k1, queries, static_cast<int>(depth_steps(shape)),
                                       scores, between);
  }
  static void score_tile(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                         const void* packed, int tile, float* scores) {
    score_tile<0>(shape, static_cast<const char*>(queries), chunk, packed, tile, scores,
                  [](int) {});
  }

  // Moves the references up to the maximum of the tile and rescales what was accumulated.
  static void raise_references(const StripShape& shape, float scale, const float* scores,
                               const State& state) {
    for (int half = 0; half < 2; ++half) {
      const __m512 old = _mm512_load_ps(state.reference + half * 16);
      __m512 top = old;
      for (int key = 0; key < kKeyTile; ++key) {
        const __m512 s = _mm512_load_ps(scores + key * kStripRows + half * 16);
        top = _mm512_max_ps(_mm512_mul_ps(s, _mm512_set1_ps(scale)), top);
      }
      _mm512_store_ps(state.reference + half * 16, top);
      const __m512 factor = exp2_ps<5>(_mm512_sub_ps(old, finite(top)));
      float* sum = state.sum + half * 16;
      _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), factor));
      for (int64_t tile = 0; tile < value_tiles(shape); ++tile) {
        float* rows = reinterpret_cast<float*>(state.out_t + (tile * 2 + half) * kTileBytes);
        for (int c = 0; c < 16; ++c) {
          _mm512_store_ps(rows + c * 16, _mm512_mul_ps(_mm512_load_ps(rows + c * 16), factor));
        }
      }
    }
  }

  // Slots that no row sees may hold NaN, and 0 * NaN is NaN: adds a copy without them.
  static void add_seen_values(const StripShape& shape, const Values& values, int tile,
                              __mmask32 seen, const char* probabilities, const State& state) {
    char* to = state.seen_values;
    for (int64_t column = 0; column < value_tiles(shape); ++column) {
      for (int part = 0; part < kNumParts; ++part) {
        const char* from = values.at(column, part, tile);
        for (int r = 0; r < 16; ++r, from += kTileRow, to += kTileRow) {
          _mm512_store_si512(to, _mm512_maskz_mov_epi16(seen, _mm512_load_si512(from)));
        }
      }
    }
    const int first = 0;
    multiply_values<kNumParts>({state.seen_values, kTileBytes}, value_tiles(shape), &first, 1,
                               probabilities, state.out_t);
  }

  // Calls f with the number of depth steps as a constant where loops are unrolled for it, else 0.
  template <class F>
  LONGCTX_ALWAYS_INLINE static void with_steps(int64_t steps, const F& f) {
    switch (steps) {
      case 1:
        return f(std::integral_constant<int, 1>());
      case 2:
        return f(std::integral_constant<int, 2>());
      case 3:
        return f(std::integral_constant<int, 3>());
      case 4:
        return f(std::integral_constant<int, 4>());
      case 8:
        return f(std::integral_constant<int, 8>());
      default:
        return f(std::integral_constant<int, 0>());
    }
  }

  // Lists the key tiles of a chunk that some row sees and calls hidden(tile) for the others.
  template <class Hidden>
  static int list_tiles(const KeyChunk& chunk, const ChunkMask& mask, int* tiles,
                        const Hidden& hidden) {
    int num_tiles = 0;
    for (int tile = 0; tile < chunk.num_slots() / kKeyTile; ++tile) {
      if (static_cast<Visibility>(mask.tiles[tile]) == Visibility::kNone) {
        hidden(tile);
      } else {
        tiles[num_tiles++] = tile;
      }
    }
    return num_tiles;
  }

  static void accumulate(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                         const void* packed, const ChunkMask& mask, void* memory) {
    with_steps(depth_steps(shape), [&](auto steps) {
      accumulate_with<decltype(steps)::value>(shape, queries, chunk, packed, mask, memory);
    });
  }

  // Brings the rows of the next chunk into L2, evenly spread over the tile products: a burst would
  // take the line fill buffers from the tile loads.
  struct Prefetcher {
    // To be fetched within `num_products` calls of advance.
    Prefetcher(const StripShape& shape, const KeyChunk::Upcoming& next, bool with_values,
               int64_t num_products)
        : chunk(next.chunk),
          row(2 * next.begin),
          end(2 * next.end),
          rows((end - row + num_products - 1) / num_products),
          bytes{shape.head_dim * static_cast<int64_t>(sizeof(In)),
                with_values ? shape.head_dim_v * static_cast<int64_t>(sizeof(In)) : 0} {}
    LONGCTX_ALWAYS_INLINE void advance() {
      for (const int64_t stop = std::min(row + rows, end); row < stop; ++row) {
        const void* const* keys = row % 2 == 0 ? chunk->k_rows : chunk->v_rows;
        const char* data = static_cast<const char*>(keys[row / 2]);
        for (int64_t byte = 0; byte < bytes[row % 2]; byte += kCacheLine) {
          _mm_prefetch(data + byte, _MM_HINT_T1);
        }
      }
    }
    const KeyChunk* chunk;
    int64_t row, end;  // counts k and v rows alternately
    int64_t rows;      // a product
    int64_t bytes[2];
  };

  template <int kSteps>
  static void accumulate_with(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                              const void* packed, const ChunkMask& mask, void* memory) {
    const State state(shape, memory);
    const char* q = static_cast<const char*>(queries);
    const Values values{static_cast<const char*>(packed) + key_bytes(shape), value_tile(0, 1, 0)};
    alignas(64) float scores[2][kKeyTile * kStripRows];
    alignas(64) char probabilities[kGroupTiles * kProbabilityTile];
    int tiles[kChunkKeys / kKeyTile];
    const int num_tiles = list_tiles(chunk, mask, tiles, [](int) {});
    if (num_tiles == 0) return;
    constexpr int kProducts = 4 * kNumProducts * std::max(kSteps, 1);  // of a tile
    Prefetcher prefetcher(shape, chunk.upcoming, true, num_tiles * kProducts);
    int first = 0;  // of the group
    const auto add_values = [&](int count) {
      multiply_values<kNumParts>(values, value_tiles(shape), tiles + first, count, probabilities,
                                 state.out_t);
    };
    score_tile<kSteps>(shape, q, chunk, packed, tiles[0], scores[0], [](int) {});
    for (int i = 0; i < num_tiles; ++i) {
      float* s = scores[i % 2];
      const float scale = adjust_scores(shape, mask, tiles[i], s);
      Exponentials exponentials(scale, state.reference, s,
                                probabilities + (i - first) * kProbabilityTile);
      const bool more = i + 1 < num_tiles;
      if (more) {
        score_tile<kSteps>(shape, q, chunk, packed, tiles[i + 1], scores[(i + 1) % 2],
                           [&](int n) LONGCTX_ALWAYS_INLINE {
                             if constexpr (kSteps > 0)
                               exponentials.pairs(n * 16 / kProducts, (n + 1) * 16 / kProducts);
                             prefetcher.advance();
                           });
      }
      if (!more || kSteps == 0) exponentials.pairs(0, 16);
      if (!exponentials.commit(state.sum)) {
        add_values(i - first);
        first = i;
        raise_references(shape, scale, s, state);
        alignas(64) float safe[kStripRows];
        for (int half = 0; half < 2; ++half) {
          _mm512_store_ps(safe + half * 16, finite(_mm512_load_ps(state.reference + half * 16)));
        }
        Exponentials again(scale, safe, s, probabilities);
        again.pairs(0, 16);
        again.add(state.sum);
      }
      const __mmask32 seen = seen_slots(mask, tiles[i]);
      if (seen != ~__mmask32{0}) {
        add_values(i - first);
        add_seen_values(shape, values, tiles[i], seen,
                        probabilities + (i - first) * kProbabilityTile, state);
        first = i + 1;
      } else if (i + 1 - first == kGroupTiles || !more) {
        add_values(i + 1 - first);
        first = i + 1;
      }
    }
  }

  static void finish(const StripShape& shape, void* memory, const float* sinks, int num_rows,
                     void* const* out_rows, void* lse) {
    const State state(shape, memory);
    alignas(64) float factor[kStripRows];
    for (int r = 0; r < num_rows; ++r) {
      const float sum = state.sum[r] / Exponentials::kRoundUp, reference = state.reference[r];
      const bool empty = sum == 0.0f;
      double total = sum;
      if (sinks != nullptr && !empty) total += std::exp2(sinks[r] * kDoubleLog2E - reference);
      factor[r] = empty ? 0.0f : static_cast<float>(1.0 / total);
      static_cast<float*>(lse)[r] = empty ? -kInf : (reference + std::log2(sum)) / kLog2E;
    }
    std::fill(factor + num_rows, factor + kStripRows, 0.0f);
    for (int64_t column = 0; column < value_tiles(shape); ++column) {
      const auto mask = static_cast<__mmask16>(depth_mask(shape.head_dim_v, column * 16));
      for (int half = 0; half < 2 && half * 16 < num_rows; ++half) {
        const float* rows =
            reinterpret_cast<const float*>(state.out_t + (column * 2 + half) * kTileBytes);
        const __m512 scale = _mm512_load_ps(factor + half * 16);
        // A row that saw nothing is zero whatever its lane accumulated.
        const __mmask16 live = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        __m512i out[16];
        for (int c = 0; c < 16; ++c) {
          out[c] =
              _mm512_castps_si512(_mm512_maskz_mul_ps(live, _mm512_load_ps(rows + c * 16), scale));
        }
        transpose16(out);
        for (int r = 0; r < std::min(16, num_rows - half * 16); ++r) {
          In* to = static_cast<In*>(out_rows[half * 16 + r]) + column * 16;
          const __m512 row = _mm512_castsi512_ps(out[r]);
          if constexpr (kNumParts == 3) {
            _mm512_mask_storeu_ps(to, mask, row);
          } else if constexpr (kNumParts == 2) {
            _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(row, _MM_FROUND_TO_NEAREST_INT));
          } else {
            _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(row));
          }
        }
      }
    }
  }

  // 2^(s - reference) of a key tile, [32 keys][32 queries], in place; 0 in lanes that are not live.
  struct Powers {
    LONGCTX_ALWAYS_INLINE void rows(int begin, int end) const {
#pragma GCC unroll 32
      for (int row = begin; row < end; ++row) {
        for (int half = 0; half < 2; ++half) {
          float* s = scores + row * kStripRows + half * 16;
          const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(s), scale, reference[half]);
          _mm512_store_ps(s, _mm512_maskz_mov_ps(live[half], exp2_ps<5>(x)));
        }
      }
    }
    __m512 scale, reference[2];
    __mmask16 live[2];
    float* scores;
  };

  static void probabilities(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                            const void* packed, const ChunkMask& mask, const void* lse, void* p_t) {
    with_steps(depth_steps(shape), [&](auto steps) {
      probabilities_with<decltype(steps)::value>(shape, static_cast<const char*>(queries), chunk,
                                                 packed, mask, static_cast<const float*>(lse),
                                                 static_cast<float*>(p_t));
    });
  }

  // As in accumulate, the scores of a tile are computed between the exponentials of the one before.
  template <int kSteps>
  static void probabilities_with(const StripShape& shape, const char* queries,
                                 const KeyChunk& chunk, const void* packed, const ChunkMask& mask,
                                 const float* lse, float* p_t) {
    Powers powers;
    for (int half = 0; half < 2; ++half) {
      const __m512 row_lse = _mm512_loadu_ps(lse + half * 16);
      powers.live[half] = _mm512_cmp_ps_mask(row_lse, _mm512_set1_ps(-kInf), _CMP_NEQ_UQ);
      powers.reference[half] =
          _mm512_maskz_mul_ps(powers.live[half], row_lse, _mm512_set1_ps(kLog2E));
    }
    constexpr int kTileSize = kKeyTile * kStripRows;
    int tiles[kChunkKeys / kKeyTile];
    const int num_tiles = list_tiles(chunk, mask, tiles, [&](int hidden) {
      std::fill_n(p_t + hidden * kTileSize, kTileSize, 0.0f);
    });
    if (num_tiles == 0) return;
    constexpr int kProducts = 4 * kNumProducts * std::max(kSteps, 1);  // of a tile
    Prefetcher prefetcher(shape, chunk.upcoming, false, num_tiles * kProducts);
    score_tile<kSteps>(shape, queries, chunk, packed, tiles[0], p_t + tiles[0] * kTileSize,
                       [](int) {});
    for (int i = 0; i < num_tiles; ++i) {
      powers.scores = p_t + tiles[i] * kTileSize;
      powers.scale = _mm512_set1_ps(adjust_scores(shape, mask, tiles[i], powers.scores));
      const bool more = i + 1 < num_tiles;
      if (more) {
        score_tile<kSteps>(shape, queries, chunk, packed, tiles[i + 1],
                           p_t + tiles[i + 1] * kTileSize, [&](int n) LONGCTX_ALWAYS_INLINE {
                             if constexpr (kSteps > 0) {
                               powers.rows(n * kKeyTile / kProducts,
                                           (n + 1) * kKeyTile / kProducts);
                             }
                             prefetcher.advance();
                           });
      }
      if (!more || kSteps == 0) powers.rows(0, kKeyTile);
    }
  }

  static void scores(const StripShape& shape, const void* queries, const KeyChunk& chunk,
                     const void* packed, void* s_t) {
    for (int tile = 0; tile < chunk.num_slots() / kKeyTile; ++tile) {
      float* s = static_cast<float*>(s_t) + tile * kKeyTile * kStripRows;
      score_tile(shape, queries, chunk, packed, tile, s);
      if (shape.softcap > 0) {
        cap_scores(shape, s, static_cast<float>(shape.softcap));
      } else {
        const __m512 scale = _mm512_set1_ps(static_cast<float>(shape.softmax_scale));
        for (int i = 0; i < kKeyTile * kStripRows; i += 16) {
          _mm512_store_ps(s + i, _mm512_mul_ps(_mm512_load_ps(s + i), scale));
        }
      }
    }
  }
};

template <class In>
constexpr StripEngine amx_strip_engine(const char* name) {
  using Strip = AmxStrip<In>;
  return {name,         Strip::query_bytes, Strip::chunk_bytes,  Strip::state_bytes,
          begin_thread, end_thread,         Strip::pack_queries, Strip::pack_chunk,
          Strip::reset, Strip::accumulate,  Strip::finish,       Strip::probabilities,
          Strip::scores};
}

}  // namespace

const StripEngine& amx_engine(DType dtype) {
  static constexpr StripEngine kBFloat16 = amx_strip_engine<BFloat16>("amx-bf16");
  static constexpr StripEngine kFloat16 = amx_strip_engine<Float16>("amx-bf16x2");
  static constexpr StripEngine kFloat32 = amx_strip_engine<float>("amx-bf16x3");
  if (dtype == DType::kFloat32) return kFloat32;
  return dtype == DType::kFloat16 ? kFloat16 : kBFloat16;
}

}  // namespace longctx::cpu
