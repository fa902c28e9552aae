// Vec<T> for any CPU: 16-byte compiler vectors, exponentials from the C library.
#pragma once
#include <math.h>

#include <cstdint>

#include "reduced_float.h"

namespace longctx::cpu {
namespace {

template <class T>
struct Vec {
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kBlockRows = 4;  // register block of the products: rows x vectors
  static constexpr int kBlockVecs = 2;

  typedef T Native __attribute__((vector_size(16)));
  Native v;

  static Vec load(const T* p) {
    Vec x;
    __builtin_memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  template <class In>
  static Vec load(const In* p) {
    T wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = widen(p[i]);
    return load(wide);
  }
  static Vec broadcast(T s) { return {Native{} + s}; }
  void store(T* p) const { __builtin_memcpy(p, &v, sizeof(v)); }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }  // b where a is NaN
  friend Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }  // b where a is NaN
  friend bool any_greater(Vec a, Vec b) {
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= a.v[i] > b.v[i];
    return any;
  }
  // Lane i of a where bit i of `bits` is set, else of b.
  friend Vec select(uint32_t bits, Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = (bits >> i & 1) != 0 ? a.v[i] : b.v[i];
    return a;
  }
  friend Vec select_less(Vec x, Vec y, Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = x.v[i] < y.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  // The first and the second half of a0 b0 a1 b1 ...
  friend Vec zip_low(Vec a, Vec b) { return zip_from(a, b, 0); }
  friend Vec zip_high(Vec a, Vec b) { return zip_from(a, b, kLanes / 2); }
  friend Vec exp(Vec x) {
    for (int i = 0; i < kLanes; ++i) x.v[i] = sizeof(T) == 8 ? ::exp(x.v[i]) : ::expf(x.v[i]);
    return x;
  }
  friend Vec tanh(Vec x) {
    for (int i = 0; i < kLanes; ++i) x.v[i] = sizeof(T) == 8 ? ::tanh(x.v[i]) : ::tanhf(x.v[i]);
    return x;
  }

 private:
  static Vec zip_from(Vec a, Vec b, int first) {
    Vec x = a;
    for (int i = 0; i < kLanes; ++i) x.v[i] = (i % 2 == 0 ? a : b).v[first + i / 2];
    return x;
  }
};

}  // namespace
}  // namespace longctx::cpu
