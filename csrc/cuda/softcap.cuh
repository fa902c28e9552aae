// softcap * tanh(s / softcap), as accurate as the CPU's.
#pragma once
#include "device/thread.cuh"

namespace longctx::cuda {

// Relative error below 3e-7: an odd polynomial where 1 - 2 / (e^2x + 1) would cancel.
LONGCTX_DEVICE float tanh_accurate(float x) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  const float z = x * x;
  float p = -0.005704934f;
  p = fmaf(p, z, 0.020639041f);
  p = fmaf(p, z, -0.0537397f);
  p = fmaf(p, z, 0.13331442f);
  p = fmaf(p, z, -0.3333328f);
  const float small = fmaf(x * z, p, x);
  const float large =
      fmaf(-2.0f, device::reciprocal_fast(device::exp2_fast(x * kTwoLog2E) + 1.0f), 1.0f);
  return z < 0.625f * 0.625f ? small : large;
}

}  // namespace longctx::cuda
