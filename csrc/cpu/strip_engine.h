// The arithmetic of attention on one strip of queries, one implementation per instruction set.
//
// Everything works on S^T = K Q^T: a key is a row and the 32 queries of a strip are the lanes, so
// the softmax needs no horizontal operation and K is read where the user left it.
// The driver (attention.cpp) owns which keys a strip visits and which of them count; an engine owns
// layouts, products and exponentials. An engine is chosen once per call, in choose_engine().
#pragma once
#include <cstdint>

#include "longctx/params.h"

namespace longctx::cpu {

constexpr int kStripRows = 32;   // queries of a strip = lanes
constexpr int kKeyTile = 32;     // keys are visited in tiles of this many slots
constexpr int kChunkKeys = 512;  // slots of a chunk; K and V of a chunk stay in the L2 cache

struct StripShape {
  DType dtype = DType::kFloat32;  // of q, k, v and out
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  float scale_log2 = 1.0f;  // softmax_scale * log2(e), for engines that work in base 2
  double softmax_scale = 1.0;
  double softcap = 0.0;  // <= 0: none
};

// Up to kChunkKeys keys that some strips visit, in slots. Slots from num_keys up to the next
// multiple of kKeyTile are padding: their pointers repeat a valid row and no query sees them.
struct KeyChunk {
  int64_t num_keys = 0;
  int64_t k_stride = 0;  // elements between neighbouring rows of k inside a contiguous run
  int64_t v_stride = 0;
  const void* k_rows[kChunkKeys];  // [num_slots] -> [head_dim]
  const void* v_rows[kChunkKeys];  // [num_slots] -> [head_dim_v]; unused by scores-only calls
  int64_t positions[kChunkKeys];   // key position in the sequence, ascending
  // Bit t: the 16 slots from 16 * t on are real keys at consecutive rows, k_stride / v_stride
  // apart.
  uint32_t contiguous16 = 0;
  // Slots [begin, end) of the chunk that is packed next: an engine may prefetch their rows.
  struct Upcoming {
    const KeyChunk* chunk = nullptr;
    int64_t begin = 0;
    int64_t end = 0;
  } upcoming;
  int64_t num_slots() const { return (num_keys + kKeyTile - 1) / kKeyTile * kKeyTile; }
};

// Which of a chunk's slots a strip's rows see.
struct ChunkMask {
  uint8_t tiles[kChunkKeys / kKeyTile];  // longctx::Visibility per key tile
  uint32_t visible[kChunkKeys];          // bit r: row r sees the slot; set for partial tiles only
};

struct StripEngine {
  const char* name;  // "amx-bf16", "avx512", ...: shown by longctx info

  // Scratch, in bytes, for one strip's packed queries, one packed chunk, and one strip's state.
  int64_t (*query_bytes)(const StripShape&);
  int64_t (*chunk_bytes)(const StripShape&);
  int64_t (*state_bytes)(const StripShape&);

  // Around all other calls on a thread (tile configuration).
  void (*begin_thread)();
  void (*end_thread)();

  // rows[r] -> [head_dim]; rows from num_rows on are padding, computed and never written out.
  void (*pack_queries)(const StripShape&, const void* const* rows, int num_rows, void* queries);
  // Brings a chunk into the engine's layout; with_values = false leaves V out.
  void (*pack_chunk)(const StripShape&, const KeyChunk&, bool with_values, void* packed);

  void (*reset)(const StripShape&, void* state);
  // S^T tiles, mask, online softmax, O^T += V^T P^T.
  void (*accumulate)(const StripShape&, const void* queries, const KeyChunk&, const void* packed,
                     const ChunkMask&, void* state);
  // out_rows[r] -> [head_dim_v] in shape.dtype; lse[r] natural log, float (double for float64).
  // A row that saw no key gives out = 0, lse = -inf. sinks[r] is one more logit of row r, without a
  // value (rows of a strip may belong to different heads); null: none. lse leaves it out.
  void (*finish)(const StripShape&, void* state, const float* sinks, int num_rows,
                 void* const* out_rows, void* lse);

  // p_t[slot][row] = exp(s - lse[row]) where visible, else 0; lse in float (double for float64),
  // rows with lse = -inf give 0. p_t is float [num_slots][kStripRows], double for float64.
  void (*probabilities)(const StripShape&, const void* queries, const KeyChunk&, const void* packed,
                        const ChunkMask&, const void* lse, void* p_t);
  // s_t[slot][row] = softcap(softmax_scale * q . k), not masked. Layout as p_t.
  void (*scores)(const StripShape&, const void* queries, const KeyChunk&, const void* packed,
                 void* s_t);
};

// Instruction sets in ascending order; a kernel may use everything up to the chosen level.
enum class Isa : int32_t { kGeneric, kAvx2, kAvx512, kAmx };
Isa detected_isa();       // what this CPU and operating system offer
Isa active_isa();         // what kernels use: detected_isa() unless forced
void force_isa(Isa isa);  // for tests; must not exceed detected_isa()

// The engines by instruction set (strip_<isa>.cpp, each with its own compiler flags).
const StripEngine& generic_engine(DType dtype);
const StripEngine& avx2_engine(DType dtype);
const StripEngine& avx512_engine(DType dtype);
const StripEngine& amx_engine(DType dtype);

// The one place that decides which engine runs.
const StripEngine& choose_engine(DType dtype, Isa isa);

}  // namespace longctx::cpu
