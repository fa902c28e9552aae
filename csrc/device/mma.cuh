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

#else

// Every lane reads its own row; the warp then deals out the elements.
struct MatrixRows {
  uint16_t row[8];
  uint32_t r[4];
};
template <class Deal>
LONGCTX_DEVICE void load_matrices(const char* name, uint32_t (&r)[4], const void* shared_row,
                                  Deal deal, simt::Where where) {
  simt::check_shared(name, shared_row, 16, where);
  MatrixRows lane = {};
  std::memcpy(lane.row, shared_row, sizeof(lane.row));
  lane = simt::warp_op(name, lane, deal, where);
  std::memcpy(r, lane.r, sizeof(r));
}
LONGCTX_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared_row,
                                  simt::Where where = simt::here()) {
  const auto deal = [](MatrixRows* lanes) {
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        const uint16_t* pair = &lanes[8 * i + l / 4].row[2 * (l % 4)];
        lanes[l].r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  };
  load_matrices("load_matrices", r, shared_row, deal, where);
}
LONGCTX_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row,
                                             simt::Where where = simt::here()) {
  const auto deal = [](MatrixRows* lanes) {
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        const MatrixRows* rows = &lanes[8 * i + 2 * (l % 4)];
        lanes[l].r[i] = rows[0].row[l / 4] | static_cast<uint32_t>(rows[1].row[l / 4]) << 16;
      }
    }
  };
  load_matrices("load_matrices_transposed", r, shared_row, deal, where);
}

LONGCTX_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
LONGCTX_DEVICE float widen_bits(__nv_bfloat16, uint32_t bits) { return float_of_bits(bits << 16); }
LONGCTX_DEVICE float widen_bits(__half, uint32_t bits) {
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinities and NaN
  const float magnitude = float_of_bits((bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t result;
  std::memcpy(&result, &magnitude, sizeof(result));
  return float_of_bits(result | special | (bits & 0x8000) << 16);
}

template <class T>
LONGCTX_DEVICE void multiply_add(T, float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1, simt::Where where = simt::here()) {
  struct Lane {
    float acc[4];
    uint32_t a[4];
    uint32_t b[2];
  };
  const auto product = [](Lane* lanes) {
    float a[16][16], b[16][8], acc[16][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const int g = l / 4, c = 2 * (l % 4);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          a[g + i % 2 * 8][c + i / 2 * 8 + half] =
              widen_bits(T(), lanes[l].a[i] >> 16 * half & 0xffff);
        }
        for (int i = 0; i < 2; ++i) {
          b[c + i * 8 + half][g] = widen_bits(T(), lanes[l].b[i] >> 16 * half & 0xffff);
          acc[g + i * 8][c + half] = lanes[l].acc[2 * i + half];
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) acc[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) lanes[l].acc[i] = acc[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
    }
  };
  Lane lane = {{acc[0], acc[1], acc[2], acc[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  lane = simt::warp_op("multiply_add", lane, product, where);
  std::memcpy(acc, lane.acc, sizeof(acc));
}

LONGCTX_DEVICE uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat16_raw pair[] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  return pair[0].x | static_cast<uint32_t>(pair[1].x) << 16;
}
LONGCTX_DEVICE uint32_t pack_pair(__half, float low, float high) {
  const __half_raw pair[] = {__float2half_rn(low), __float2half_rn(high)};
  return pair[0].x | static_cast<uint32_t>(pair[1].x) << 16;
}

#endif  // LONGCTX_SIMT

}  // namespace longctx::device
