// Polynomials shared by the Vec<float> types; coefficients are minimax fits of the relative error.
#pragma once

namespace longctx::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

// 2^r for r in [0, 1): 0.6 ulp, exactly 1 at 0, so that a row's largest weight is exact.
template <class V>
inline V exp2_fraction(V r) {
  V p = V::broadcast(0.00021612919f);
  p = fma(p, r, V::broadcast(0.0012467845f));
  p = fma(p, r, V::broadcast(0.009675452f));
  p = fma(p, r, V::broadcast(0.055485282f));
  p = fma(p, r, V::broadcast(0.24022931f));
  p = fma(p, r, V::broadcast(0.69314706f));
  return fma(p, r, V::broadcast(1.0f));
}

// An odd polynomial where 1 - 2 / (e^2x + 1) would cancel.
template <class V>
inline V tanh_from_exp(V x) {
  constexpr float kSmall = 0.625f;
  const V z = x * x;
  V p = V::broadcast(-0.005704934f);
  p = fma(p, z, V::broadcast(0.020639041f));
  p = fma(p, z, V::broadcast(-0.0537397f));
  p = fma(p, z, V::broadcast(0.13331442f));
  p = fma(p, z, V::broadcast(-0.3333328f));
  const V small = fma(x * z, p, x);
  const V one = V::broadcast(1.0f);
  const V large = one - V::broadcast(2.0f) / (exp(x + x) + one);
  return select_less(z, V::broadcast(kSmall * kSmall), small, large);
}

}  // namespace
}  // namespace longctx::cpu
