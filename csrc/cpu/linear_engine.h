// The arithmetic of chunked linear attention, one implementation per instruction set.
//
// The driver (linear_attention.cpp) owns which tokens make a chunk and what their decays weigh; an
// engine owns layouts and products. Three products make a chunk: rows with the keys of the chunk,
// rows with the state before it, and keys with values into the state after it.
#pragma once
#include <cstdint>

#include "longctx/decay.h"
#include "longctx/params.h"
#include "strip_engine.h"

namespace longctx::cpu {

struct LinearShape {
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  bool normalize = false;  // v has one more column, of ones
  int64_t state_dim() const { return head_dim_v + (normalize ? 1 : 0); }
};

// Rows of one chunk as the user stores them; strides count elements.
struct LinearChunk {
  const void* q = nullptr;  // [num_rows, head_dim]
  const void* k = nullptr;  // [num_keys, head_dim]
  const void* v = nullptr;  // [num_keys, head_dim_v]
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  int64_t num_rows = 0;               // up to kLinearChunk
  int64_t num_keys = 0;               // up to kLinearChunk
  const LinearChunk* next = nullptr;  // packed next: its rows may be prefetched
};

// What the decays make of one chunk. T is float, or double for float64.
template <class T>
struct ChunkWeights {
  const T* pairs = nullptr;  // [kLinearChunk][kLinearChunk]: key j in row i; null: no key counts
  bool causal = true;        // pairs is 0 above the diagonal
  const T* rows = nullptr;   // [kLinearChunk]: the given state in row i; null: the state is zero
  const T* keys = nullptr;   // [kLinearChunk]: key j in the updated state
  T carry = 1;               // the given state in the updated state
};

// How accumulated rows become outputs: (acc + more) * scale, normalised by their last column.
template <class T>
struct LinearOutput {
  void* out = nullptr;      // [num_rows, head_dim_v]; null: acc is what is wanted
  int64_t out_stride = 0;   // elements
  const T* more = nullptr;  // like acc, or null
  T scale = 1;
  T eps = 0;
  bool stream = false;  // out is larger than the caches: what is written need not stay in them
};

template <class T>
struct LinearEngine {
  const char* name;

  // Scratch, in bytes, for a packed chunk and a state; elements between rows of acc.
  int64_t (*packed_bytes)(const LinearShape&);
  int64_t (*state_bytes)(const LinearShape&);
  int64_t (*acc_stride)(const LinearShape&);

  // Around all other calls on a thread (tile configuration).
  void (*begin_thread)();
  void (*end_thread)();

  // to[i] = exp(x[i]).
  void (*exponentials)(const double* x, int64_t count, T* to);

  // State from and to [head_dim][state_dim]; null is the zero state.
  void (*load_state)(const LinearShape&, const T* from, void* state);
  void (*store_state)(const LinearShape&, const void* state, T* to);

  // Brings a chunk into the engine's layout; what is null is left out.
  void (*pack)(const LinearShape&, const LinearChunk&, void* packed);
  // acc[i] = sum_j pairs[i][j] (q_i . k_j) v_j + rows[i] q_i^T state: [kLinearChunk][acc_stride].
  // With an output, its rows are written and acc is scratch.
  void (*attend)(const LinearShape&, const LinearChunk&, const void* packed, const ChunkWeights<T>&,
                 const void* state, const LinearOutput<T>&, T* acc);
  // state = carry state + sum_j keys[j] k_j v_j^T.
  void (*update)(const LinearShape&, const LinearChunk&, void* packed, const ChunkWeights<T>&,
                 void* state);
  // The output of rows of acc.
  void (*finish)(const LinearShape&, const T* acc, int64_t num_rows, const LinearOutput<T>&);

  // One token on a state [head_dim] rows of state_stride: state = decay state + k v^T, then
  // acc[state_dim] = q^T state.
  void (*decode)(const LinearShape&, const void* q, const void* k, const void* v, T decay, T* state,
                 int64_t state_stride, T* acc);
};

// The engines by instruction set (linear_<isa>.cpp, each with its own compiler flags).
const LinearEngine<float>& generic_linear_engine(DType dtype);
const LinearEngine<double>& generic_linear_engine_float64();
const LinearEngine<float>& avx2_linear_engine(DType dtype);
const LinearEngine<float>& avx512_linear_engine(DType dtype);
const LinearEngine<float>& amx_linear_engine(DType dtype);

// The one place that decides which engine runs.
template <class T>
const LinearEngine<T>& choose_linear_engine(DType dtype, Isa isa);

template <>
inline const LinearEngine<double>& choose_linear_engine<double>(DType, Isa) {
  return generic_linear_engine_float64();
}

template <>
inline const LinearEngine<float>& choose_linear_engine<float>(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAmx) return amx_linear_engine(dtype);
  if (isa >= Isa::kAvx512) return avx512_linear_engine(dtype);
  if (isa >= Isa::kAvx2) return avx2_linear_engine(dtype);
#endif
  (void)isa;
  return generic_linear_engine(dtype);
}

}  // namespace longctx::cpu
