// Tensor-core products of 16-bit operands with float accumulators (sm_80 and later).
//
// Who holds what of an m16n8k16 product, for lane l with g = l / 4 and c = 2 * (l % 4):
//   a [16, 16]: a[0] = row g, columns c, c + 1; a[1] = row g + 8, the same columns;
//               a[2], a[3] = the same rows, columns c + 8, c + 9
//   b [16, 8]:  b[0] = rows c, c + 1 of column g; b[1] = rows c + 8, c + 9
//   acc [16, 8]: acc[0], acc[1] = row g, columns c, c + 1; acc[2], acc[3] = row g + 8
// The lower half of a register holds the lower index.
#pragma once
#include "device/copy.cuh"

namespace longctx::device {

#ifndef LONGCTX_SIMT

// Four 8x8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8 (16 bytes, aligned)
// and receives in r[i], of matrix i, row l / 4, columns 2 * (l % 4) and the next.
LONGCTX_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same, each matrix transposed: rows 2 * (l % 4) and the next of column l / 4.
LONGCTX_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// acc += a b. The type argument is that of the operands.
LONGCTX_DEVICE void multiply_add(__nv_bfloat16, float (&acc)[4], const uint32_t (&a)[4],
                                 uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LONGCTX_DEVICE void multiply_add(__half, float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// {low, high} rounded to 16 bits.
LONGCTX_DEVICE uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
LONGCTX_DEVICE uint32_t pack_pair(__half, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#endif  // LONGCTX_SIMT

}  // namespace longctx::device
