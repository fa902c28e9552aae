// Words of device/copy.cuh and device/mma.cuh.
#include "cases.h"
#include "device/mma.cuh"

namespace longctx::lanes {
namespace {

// Two groups: the own row, then the next thread's, each cut to the own number of bytes. What was in
// shared memory before must be gone.
struct CopyAsync : Defaults {
  static constexpr const char* kName = "copy_async";
  static constexpr const char* kWords = "copy_async_16 commit_copies wait_copies shared_address";
  static constexpr int kSharedBytes = 2 * kThreads * 16;
  static constexpr int kIn = 8, kOut = 8;
  static void fill(Random& random, int thread, uint32_t* in) {
    for (int i = 0; i < 4; ++i) in[i] = random.bits();
    in[4] = thread <= 16 ? thread : random.below(17);
    for (int i = 5; i < 8; ++i) in[i] = random.bits();  // behind the row: never copied
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    uint32_t* rows = reinterpret_cast<uint32_t*>(device::shared_memory());  // [2, kThreads, 4]
    const int thread = device::thread_index();
    uint32_t* own = rows + 4 * thread;
    uint32_t* next = own + 4 * kThreads;
    for (int i = 0; i < 4; ++i) own[i] = next[i] = 0xdeadbeef;
    device::sync_threads();
    const int bytes = static_cast<int>(in[4]);
    const int to_next = thread + 1 < kThreads ? kIn : -thread * kIn;
    device::copy_async_16(own, in, bytes);
    device::commit_copies();
    device::copy_async_16(next, in + to_next, bytes);
    device::commit_copies();
    device::wait_copies<1>();
    for (int i = 0; i < 4; ++i) out[i] = own[i];
    device::wait_copies<0>();
    for (int i = 0; i < 4; ++i) out[4 + i] = next[i];
  }
};

// Rows are named in any order, some of them twice.
template <bool transposed>
struct LoadMatrices : Defaults {
  static constexpr const char* kName = transposed ? "load_matrices_transposed" : "load_matrices";
  static constexpr const char* kWords = kName;
  static constexpr int kSharedBytes = kThreads * 16;
  static constexpr int kIn = 5, kOut = 4;
  static void fill(Random& random, int, uint32_t* in) {
    for (int i = 0; i < 4; ++i) in[i] = random.bits();
    in[4] = random.below(kThreads);
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    uint32_t* rows = reinterpret_cast<uint32_t*>(device::shared_memory());  // [kThreads, 4]
    for (int i = 0; i < 4; ++i) rows[4 * device::thread_index() + i] = in[i];
    device::sync_threads();
    uint32_t r[4];
    if constexpr (transposed) {
      device::load_matrices_transposed(r, rows + 4 * in[4]);
    } else {
      device::load_matrices(r, rows + 4 * in[4]);
    }
    for (int i = 0; i < 4; ++i) out[i] = r[i];
  }
};

inline uint32_t host_bits(__nv_bfloat16, float value) {
  return __nv_bfloat16_raw(__float2bfloat16_rn(value)).x;
}
inline uint32_t host_bits(__half, float value) { return __half_raw(__float2half_rn(value)).x; }
template <class T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

// Small integers add up exactly in any order, so that every element must stand where it belongs.
// Other numbers: the tensor cores add 16 products in an order and with roundings of their own.
template <class T, bool integers>
struct MultiplyAdd : Defaults {
  static constexpr const char* kName =
      integers ? (kIsHalf<T> ? "multiply_add_float16_integers" : "multiply_add_bfloat16_integers")
               : (kIsHalf<T> ? "multiply_add_float16" : "multiply_add_bfloat16");
  static constexpr const char* kWords = "multiply_add";
  static constexpr int kIn = 10, kOut = 4;
  static constexpr float kAbsolute = integers ? 0 : 0x1p-17f;  // of sums of 17 terms below 1
  static void fill(Random& random, int, uint32_t* in) {
    const auto number = [&] {
      return integers ? static_cast<float>(random.below(17) - 8) : random.between(-1, 1);
    };
    for (int i = 0; i < 4; ++i) in[i] = bits_as<uint32_t>(number());
    for (int i = 4; i < 10; ++i) {
      in[i] = host_bits(T(), number());
      in[i] |= host_bits(T(), number()) << 16;
    }
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    float acc[4];
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) {
      acc[i] = bits_as<float>(in[i]);
      a[i] = in[4 + i];
    }
    device::multiply_add(T(), acc, a, in[8], in[9]);
    for (int i = 0; i < 4; ++i) out[i] = bits_as<uint32_t>(acc[i]);
  }
};

struct PackPair : Defaults {
  static constexpr const char* kName = "pack_pair";
  static constexpr const char* kWords = kName;
  static constexpr int kThreads = 64;
  static constexpr int kIn = 2, kOut = 2;
  static void fill(Random& random, int thread, uint32_t* in) {
    constexpr float kInf = __builtin_inff();
    in[0] = bits_as<uint32_t>(thread == 0 ? -kInf
                                          : random.between(-1, 1) * (thread % 3 ? 1.0f : 1e-6f));
    in[1] = bits_as<uint32_t>(thread == 1 ? kInf : random.between(-7e4f, 7e4f));
    if (thread % 4 == 2) in[0] = (in[0] & 0xffff0000u) | 0x8000u;  // a tie of bfloat16
    if (thread % 4 == 3) in[1] = (in[1] & 0xffffe000u) | 0x1000u;  // a tie of float16
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = device::pack_pair(__nv_bfloat16(), bits_as<float>(in[0]), bits_as<float>(in[1]));
    out[1] = device::pack_pair(__half(), bits_as<float>(in[0]), bits_as<float>(in[1]));
  }
};

}  // namespace

std::vector<Case> matrix_cases() {
  return {make_case<CopyAsync>(),
          make_case<LoadMatrices<false>>(),
          make_case<LoadMatrices<true>>(),
          make_case<MultiplyAdd<__nv_bfloat16, true>>(),
          make_case<MultiplyAdd<__half, true>>(),
          make_case<MultiplyAdd<__nv_bfloat16, false>>(),
          make_case<MultiplyAdd<__half, false>>(),
          make_case<PackPair>()};
}

}  // namespace longctx::lanes
