// The engine of linear attention on vector registers, written once over Vec<T>: everything is
// widened to T, products keep a block of rows and columns in registers.
// Include after one vec_<isa>.h. Everything here has internal linkage, so that code compiled for
// one instruction set is never linked into another.
#pragma once
#include <cstdint>
#include <type_traits>

#include "linear_engine.h"
#include "reduced_float.h"
#include "row_products.h"

namespace longctx::cpu {
namespace {

template <class In, class T>
inline void widen_row(const In* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// T: what is computed in; In: the dtype of q, k, v and out.
template <class T, class In>
struct VectorLinear {
  using V = Vec<T>;
  using Products = RowProducts<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kRows = kLinearChunk;

  // Rows of q, k, v, state and acc are read down their columns: an odd number of cache lines a row
  // uses every cache set.
  static int64_t padded(int64_t columns) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((columns + kLine - 1) / kLine | 1) * kLine;
  }
  static int64_t acc_stride(const LinearShape& shape) { return padded(shape.state_dim()); }
  static int64_t value_vecs(const LinearShape& shape) {
    return (shape.state_dim() + kLanes - 1) / kLanes;
  }

  struct Packed {
    Packed(const LinearShape& shape, void* memory)
        : q(static_cast<T*>(memory)),
          weighted(q + kRows * padded(shape.head_dim)),
          k(weighted + kRows * padded(shape.head_dim)),
          k_t(k + kRows * padded(shape.head_dim)),
          v(k_t + shape.head_dim * kRows),
          p(v + kRows * padded(shape.state_dim())) {}
    T* q;         // [kLinearChunk][padded head_dim]
    T* weighted;  // like q: rows of q or k times their weight
    T* k;         // like q
    T* k_t;       // [head_dim][kLinearChunk]
    T* v;         // [kLinearChunk][acc_stride], a column of ones at head_dim_v under normalize
    T* p;         // [kLinearChunk][kLinearChunk]: pairs * q k^T
  };
  static int64_t packed_bytes(const LinearShape& shape) {
    const int64_t rows = 3 * padded(shape.head_dim) + padded(shape.state_dim());
    return sizeof(T) * kRows * (rows + shape.head_dim + kRows);
  }
  static int64_t state_bytes(const LinearShape& shape) {
    return sizeof(T) * shape.head_dim * acc_stride(shape);
  }
  static void begin_thread() {}
  static void end_thread() {}

  static void exponentials(const double* x, int64_t count, T* to) {
    int64_t i = 0;
    alignas(64) T part[kLanes];
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) part[j] = static_cast<T>(x[i + j]);
      exp(V::load(part)).store(to + i);
    }
    for (int j = 0; i + j < count; ++j) part[j] = static_cast<T>(x[i + j]);
    for (int j = static_cast<int>(count - i); j < kLanes; ++j) part[j] = 0;
    exp(V::load(part)).store(part);
    for (int j = 0; i + j < count; ++j) to[i + j] = part[j];
  }

  static void load_state(const LinearShape& shape, const T* from, void* state) {
    T* to = static_cast<T*>(state);
    const int64_t stride = acc_stride(shape), columns = shape.state_dim();
    for (int64_t d = 0; d < shape.head_dim; ++d, to += stride) {
      for (int64_t c = 0; c < columns; ++c) to[c] = from != nullptr ? from[d * columns + c] : T(0);
      for (int64_t c = columns; c < stride; ++c) to[c] = 0;
    }
  }

  static void store_state(const LinearShape& shape, const void* state, T* to) {
    const T* from = static_cast<const T*>(state);
    const int64_t columns = shape.state_dim();
    for (int64_t d = 0; d < shape.head_dim; ++d, from += acc_stride(shape), to += columns) {
      __builtin_memcpy(to, from, sizeof(T) * columns);
    }
  }

  static void pack(const LinearShape& shape, const LinearChunk& chunk, void* memory) {
    const Packed packed(shape, memory);
    const int64_t d = shape.head_dim, stride = padded(d);
    if (chunk.q != nullptr) {
      for (int64_t i = 0; i < chunk.num_rows; ++i) {
        widen_row(static_cast<const In*>(chunk.q) + i * chunk.q_stride, d, packed.q + i * stride);
      }
    }
    if (chunk.k == nullptr) return;
    const int64_t columns = shape.head_dim_v, v_stride = acc_stride(shape);
    for (int64_t j = 0; j < chunk.num_keys; ++j) {
      widen_row(static_cast<const In*>(chunk.k) + j * chunk.k_stride, d, packed.k + j * stride);
      T* v = packed.v + j * v_stride;
      widen_row(static_cast<const In*>(chunk.v) + j * chunk.v_stride, columns, v);
      for (int64_t c = columns; c < v_stride; ++c) v[c] = shape.normalize && c == columns ? 1 : 0;
    }
    if (chunk.q == nullptr) return;
    // Keys beyond num_keys are zero columns: no row may see what lies there.
    for (int64_t first = 0; first < d; first += kLanes) {
      const int64_t count = d - first < kLanes ? d - first : kLanes;
      for (int64_t j = 0; j < kRows; j += kLanes) {
        V x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const T* k = packed.k + (j + i) * stride + first;
          x[i] = j + i < chunk.num_keys ? V::load(k) : V::broadcast(0);
        }
        transpose(x);
        for (int i = 0; i < count; ++i) x[i].store(packed.k_t + (first + i) * kRows + j);
      }
    }
  }

  static void attend(const LinearShape& shape, const LinearChunk& chunk, const void* memory,
                     const ChunkWeights<T>& weights, const void* state,
                     const LinearOutput<T>& output, T* acc) {
    accumulate(shape, chunk, Packed(shape, const_cast<void*>(memory)), weights,
               static_cast<const T*>(state), acc);
    if (output.out != nullptr) finish(shape, acc, chunk.num_rows, output);
  }

  static void update(const LinearShape& shape, const LinearChunk& chunk, void* memory,
                     const ChunkWeights<T>& weights, void* state) {
    const Packed packed(shape, memory);
    const int64_t stride = padded(shape.head_dim), keys = chunk.num_keys;
    weigh(packed.k, weights.keys, keys, stride, packed.weighted);
    // A carry of 0 forgets: what was there is not read.
    Products::template multiply<true>(
        {packed.weighted, 1, stride}, packed.v, acc_stride(shape), shape.head_dim,
        value_vecs(shape), keys, [&](int64_t, int64_t) { return keys; }, weights.carry,
        static_cast<T*>(state), acc_stride(shape));
  }

  static void finish(const LinearShape& shape, const T* acc, int64_t num_rows,
                     const LinearOutput<T>& output) {
    const int64_t stride = acc_stride(shape), columns = shape.head_dim_v;
    for (int64_t i = 0; i < num_rows; ++i, acc += stride) {
      In* out = static_cast<In*>(output.out) + i * output.out_stride;
      const T* more = output.more != nullptr ? output.more + i * stride : nullptr;
      T scale = output.scale;
      if (shape.normalize) {
        scale /= acc[columns] + (more != nullptr ? more[columns] : T(0)) + output.eps;
      }
      if (more != nullptr) {
        for (int64_t c = 0; c < columns; ++c) narrow((acc[c] + more[c]) * scale, out[c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) narrow(acc[c] * scale, out[c]);
      }
    }
  }

  static void decode(const LinearShape& shape, const void* q, const void* k, const void* v, T decay,
                     T* state, int64_t state_stride, T* acc) {
    constexpr int kVecs = kLanes == 16 ? 8 : 4;  // columns of a pass in registers, with v beside
    const In* query = static_cast<const In*>(q);
    const In* key = static_cast<const In*>(k);
    const In* value = static_cast<const In*>(v);
    const int64_t columns = shape.state_dim();
    int64_t c = 0;
    for (; c + kVecs * kLanes <= columns; c += kVecs * kLanes) {
      decode_columns<kVecs>(shape, query, key, value, decay, state, state_stride, c, acc);
    }
    for (; c + kLanes <= columns; c += kLanes) {
      decode_columns<1>(shape, query, key, value, decay, state, state_stride, c, acc);
    }
    for (; c < columns; ++c) {
      const T x = value_at(shape, value, c);
      T sum = 0;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        T& s = state[d * state_stride + c];
        s = (decay == 0 ? T(0) : s * decay) + static_cast<T>(widen(key[d])) * x;
        sum += static_cast<T>(widen(query[d])) * s;
      }
      acc[c] = sum;
    }
  }

 private:
  static void accumulate(const LinearShape& shape, const LinearChunk& chunk, const Packed& packed,
                         const ChunkWeights<T>& weights, const T* state, T* acc) {
    const int64_t d = shape.head_dim, stride = padded(d), rows = chunk.num_rows;
    const int64_t acc_row = acc_stride(shape);
    const bool with_keys = weights.pairs != nullptr && chunk.num_keys > 0;
    if (weights.rows != nullptr) {
      // acc = rows q state
      weigh(packed.q, weights.rows, rows, stride, packed.weighted);
      const auto state_depth = [&](int64_t, int64_t) { return d; };
      Products::template multiply<false>({packed.weighted, stride, 1}, state, acc_row, rows,
                                         value_vecs(shape), d, state_depth, T(0), acc, acc_row);
    } else if (!with_keys) {
      for (int64_t i = 0; i < rows * acc_row; ++i) acc[i] = 0;
    }
    if (!with_keys) return;
    // p = pairs * q k^T
    const int64_t keys = chunk.num_keys;
    const auto score_depth = [&](int64_t row_end, int64_t column) {
      return weights.causal && column >= row_end ? int64_t{0} : d;
    };
    Products::template multiply<false>({packed.q, stride, 1}, packed.k_t, kRows, rows,
                                       (keys + kLanes - 1) / kLanes, d, score_depth, T(0), packed.p,
                                       kRows);
    for (int64_t i = 0; i < rows; ++i) {
      T* p = packed.p + i * kRows;
      const T* pairs = weights.pairs + i * kRows;
      for (int64_t j = 0; j < kRows; ++j) p[j] = pairs[j] != 0 ? p[j] * pairs[j] : 0;
    }
    // acc += p v
    const auto value_depth = [&](int64_t row_end, int64_t) {
      return weights.causal && row_end < keys ? row_end : keys;
    };
    const T carry = weights.rows != nullptr ? T(1) : T(0);
    Products::template multiply<false>({packed.p, kRows, 1}, packed.v, acc_row, rows,
                                       value_vecs(shape), keys, value_depth, carry, acc, acc_row);
  }

  static void weigh(const T* from, const T* weights, int64_t rows, int64_t stride, T* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += stride) {
      const V weight = V::broadcast(weights[i]);
      for (int64_t d = 0; d < stride; d += kLanes) (V::load(from + d) * weight).store(to + d);
    }
  }

  static T value_at(const LinearShape& shape, const In* v, int64_t column) {
    return column < shape.head_dim_v ? static_cast<T>(widen(v[column])) : T(1);
  }

  template <int kVecs>
  static void decode_columns(const LinearShape& shape, const In* q, const In* k, const In* v,
                             T decay, T* state, int64_t state_stride, int64_t column, T* acc) {
    alignas(64) T values[kVecs * kLanes];
    for (int i = 0; i < kVecs * kLanes; ++i) values[i] = value_at(shape, v, column + i);
    V x[kVecs], sum[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      x[i] = V::load(values + i * kLanes);
      sum[i] = V::broadcast(0);
    }
    const V factor = V::broadcast(decay);
    T* row = state + column;
    for (int64_t d = 0; d < shape.head_dim; ++d, row += state_stride) {
      const V key = V::broadcast(static_cast<T>(widen(k[d])));
      const V query = V::broadcast(static_cast<T>(widen(q[d])));
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        const V kept = decay == 0 ? V::broadcast(0) : V::load(row + i * kLanes) * factor;
        const V s = fma(key, x[i], kept);
        s.store(row + i * kLanes);
        sum[i] = fma(query, s, sum[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) sum[i].store(acc + column + i * kLanes);
  }
};

template <class T, class In>
constexpr LinearEngine<T> vector_linear_engine(const char* name) {
  using Linear = VectorLinear<T, In>;
  return {name,
          Linear::packed_bytes,
          Linear::state_bytes,
          Linear::acc_stride,
          Linear::begin_thread,
          Linear::end_thread,
          Linear::exponentials,
          Linear::load_state,
          Linear::store_state,
          Linear::pack,
          Linear::attend,
          Linear::update,
          Linear::finish,
          Linear::decode};
}

inline const LinearEngine<float>& vector_linear_engine_of(DType dtype) {
  static constexpr LinearEngine<float> kFloat32 = vector_linear_engine<float, float>("vector");
  static constexpr LinearEngine<float> kBFloat16 = vector_linear_engine<float, BFloat16>("vector");
  static constexpr LinearEngine<float> kFloat16 = vector_linear_engine<float, Float16>("vector");
  if (dtype == DType::kFloat32) return kFloat32;
  return dtype == DType::kFloat16 ? kFloat16 : kBFloat16;
}

}  // namespace
}  // namespace longctx::cpu
