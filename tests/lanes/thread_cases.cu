// Words of device/thread.cuh.
#include "cases.h"

namespace longctx::lanes {
namespace {

struct Indices : Defaults {
  static constexpr const char* kName = "indices";
  static constexpr const char* kWords =
      "thread_index num_threads block_index block_index_y shared_memory lane_index warp_index";
  static constexpr int kThreads = 64, kGridX = 3, kGridY = 2;
  static constexpr int kSharedBytes = 16;
  static constexpr int kIn = 0, kOut = 7;
  static void fill(Random&, int, uint32_t*) {}
  LONGCTX_DEVICE static void run(const uint32_t*, uint32_t* out) {
    out[0] = device::thread_index();
    out[1] = device::num_threads();
    out[2] = device::block_index();
    out[3] = device::block_index_y();
    out[4] = reinterpret_cast<uintptr_t>(device::shared_memory()) % 1024;
    out[5] = device::lane_index();
    out[6] = device::warp_index();
  }
};

// Words of 32 and 64 bits; the source lane differs from lane to lane.
struct Shuffle : Defaults {
  static constexpr const char* kName = "shuffle";
  static constexpr const char* kWords = "shuffle";
  static constexpr int kIn = 3, kOut = 5;
  static void fill(Random& random, int, uint32_t* in) {
    in[0] = random.bits();
    in[1] = random.bits();
    in[2] = random.below(32);
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const int source = static_cast<int>(in[2]);
    const int64_t wide = static_cast<int64_t>(in[0]) << 32 | in[1];
    out[0] = device::shuffle(in[0], source);
    out[1] = bits_as<uint32_t>(device::shuffle(bits_as<float>(in[1]), source));
    const int64_t moved = device::shuffle(wide, source);
    out[2] = static_cast<uint32_t>(moved >> 32);
    out[3] = static_cast<uint32_t>(moved);
    out[4] = device::shuffle(in[0], 7);
  }
};

struct ShuffleXor : Defaults {
  static constexpr const char* kName = "shuffle_xor";
  static constexpr const char* kWords = "shuffle_xor";
  static constexpr int kIn = 1, kOut = 6;
  static void fill(Random& random, int, uint32_t* in) { in[0] = random.bits(); }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    for (int i = 0; i < 5; ++i) out[i] = device::shuffle_xor(in[0], 1 << i);
    out[5] = device::shuffle_xor(in[0], 21);
  }
};

struct ShuffleUp : Defaults {
  static constexpr const char* kName = "shuffle_up";
  static constexpr const char* kWords = "shuffle_up";
  static constexpr int kIn = 1, kOut = 6;
  static void fill(Random& random, int, uint32_t* in) { in[0] = random.bits(); }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    for (int i = 0; i < 5; ++i) out[i] = device::shuffle_up(in[0], 1 << i);
    out[5] = device::shuffle_up(in[0], 31);
  }
};

struct Ballot : Defaults {
  static constexpr const char* kName = "ballot";
  static constexpr const char* kWords = "ballot count_bits lowest_bit";
  static constexpr int kIn = 1, kOut = 5;
  static void fill(Random& random, int thread, uint32_t* in) {
    in[0] = thread == 3 ? 0 : random.bits() << random.below(31);
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = device::ballot(in[0] % 3 == 0);
    out[1] = device::ballot(false);
    out[2] = device::ballot(true);
    out[3] = device::count_bits(in[0]);
    out[4] = device::lowest_bit(in[0]);
  }
};

// Sums of 16 threads in a slot; the result of an addition is looked at where only one thread adds.
struct AtomicAdd : Defaults {
  static constexpr const char* kName = "atomic_add_shared";
  static constexpr const char* kWords = "atomic_add_shared";
  static constexpr int kThreads = 128, kSlots = 8;
  static constexpr int kSharedBytes = kSlots * 12 + kThreads * 4;
  static constexpr int kIn = 2, kOut = 5;
  static void fill(Random& random, int, uint32_t* in) {
    in[0] = random.bits();
    in[1] = random.bits();
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    int64_t* wide = reinterpret_cast<int64_t*>(device::shared_memory());  // [kSlots]
    int32_t* narrow = reinterpret_cast<int32_t*>(wide + kSlots);          // [kSlots]
    int32_t* own = narrow + kSlots;                                       // [kThreads]
    const int thread = device::thread_index();
    own[thread] = thread;
    if (thread < kSlots) {
      wide[thread] = -thread;
      narrow[thread] = thread;
    }
    device::sync_threads();
    // small enough for the sum of 16
    const int32_t value = static_cast<int32_t>(in[1] >> 6);
    device::atomic_add_shared(&wide[thread % kSlots], bits_as<int32_t>(in[0]) * int64_t{512});
    device::atomic_add_shared(&narrow[thread % kSlots], value);
    out[3] = device::atomic_add_shared(&own[thread], value);
    device::sync_threads();
    out[0] = static_cast<uint32_t>(wide[thread % kSlots] >> 32);
    out[1] = static_cast<uint32_t>(wide[thread % kSlots]);
    out[2] = narrow[thread % kSlots];
    out[4] = own[thread];
  }
};

// 16 threads change the outputs of the first 8, which are 0 before.
struct AtomicGlobal : Defaults {
  static constexpr const char* kName = "atomics_global";
  static constexpr const char* kWords = "atomic_add_global atomic_or_global atomic_max_global";
  static constexpr int kThreads = 128, kTargets = 8;
  static constexpr int kIn = 2, kOut = 4;
  static void fill(Random& random, int, uint32_t* in) {
    in[0] = random.bits();
    in[1] = random.bits();
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const int thread = device::thread_index();
    uint32_t* target = out + (thread % kTargets - thread) * kOut;
    device::atomic_add_global(reinterpret_cast<int64_t*>(target),
                              bits_as<int32_t>(in[0]) * int64_t{512});
    device::atomic_or_global(target + 2, in[1] & in[0] & in[1] >> 7);
    device::atomic_max_global(target + 3, in[1]);
  }
};

// A counter a thread, 0 before.
struct AtomicCount : Defaults {
  static constexpr const char* kName = "atomic_count_global";
  static constexpr const char* kWords = "atomic_count_global";
  static constexpr int kIn = 1, kOut = 5;
  static void fill(Random& random, int thread, uint32_t* in) {
    in[0] = thread < 8 ? random.below(4) : random.bits();
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    for (int i = 0; i < 4; ++i) out[i] = device::atomic_count_global(out + 4, in[0]);
  }
};

// Every thread reads what another one wrote before the barrier.
struct Barriers : Defaults {
  static constexpr const char* kName = "barriers";
  static constexpr const char* kWords = "sync_threads sync_named sync_warp";
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 3 * kThreads * 4;
  static constexpr int kIn = 1, kOut = 3;
  static void fill(Random& random, int, uint32_t* in) { in[0] = random.bits(); }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    uint32_t* words = reinterpret_cast<uint32_t*>(device::shared_memory());  // [3, kThreads]
    const int thread = device::thread_index();
    words[thread] = in[0];
    device::sync_threads();
    out[0] = words[kThreads - 1 - thread];
    // two groups of two warps, each with a barrier of its own
    words[kThreads + thread] = ~in[0];
    device::sync_named(1 + thread / 64, 64);
    out[1] = words[kThreads + (thread ^ 33)];
    words[2 * kThreads + thread] = in[0] + 1;
    device::sync_warp();
    out[2] = words[2 * kThreads + (thread ^ 5)];
  }
};

struct Exp2 : Defaults {
  static constexpr const char* kName = "exp2_fast";
  static constexpr const char* kWords = "exp2_fast";
  static constexpr int kThreads = 64;
  static constexpr int kIn = 1, kOut = 1;
  static constexpr float kRelative = 0x1p-21f;
  static void fill(Random& random, int thread, uint32_t* in) {
    constexpr float kInf = __builtin_inff();
    // the last is a subnormal number
    const float special[] = {-kInf, kInf, 0.0f, -0.0f, 127.5f, -125.5f, -127.5f, 1e-40f};
    in[0] = bits_as<uint32_t>(thread < 8    ? special[thread]
                              : thread < 40 ? random.between(-2, 2)
                                            : random.between(-140, 127));
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = bits_as<uint32_t>(device::exp2_fast(bits_as<float>(in[0])));
  }
};

struct Reciprocal : Defaults {
  static constexpr const char* kName = "reciprocal_fast";
  static constexpr const char* kWords = "reciprocal_fast";
  static constexpr int kIn = 1, kOut = 1;
  static constexpr float kRelative = 0x1p-22f;
  static void fill(Random& random, int thread, uint32_t* in) {
    constexpr float kInf = __builtin_inff();
    in[0] = bits_as<uint32_t>(thread == 0   ? kInf
                              : thread == 1 ? 0.0f
                              : thread < 16 ? random.between(1, 2)
                                            : random.between(-1e6f, 1e6f));
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = bits_as<uint32_t>(device::reciprocal_fast(bits_as<float>(in[0])));
  }
};

// All but NaN: its payload is nobody's business.
struct Conversions : Defaults {
  static constexpr const char* kName = "conversions";
  static constexpr const char* kWords = "widen narrow";
  static constexpr int kThreads = 64;
  static constexpr int kIn = 3, kOut = 5;
  static void fill(Random& random, int thread, uint32_t* in) {
    // an exponent of all ones is infinity, with no fraction
    const uint32_t bfloat = random.bits() & 0xffff, half = random.bits() & 0xffff;
    in[0] = (bfloat & 0x7f80) == 0x7f80 ? bfloat & 0xff80 : bfloat;
    in[1] = (half & 0x7c00) == 0x7c00 ? half & 0xfc00 : half;
    in[2] = bits_as<uint32_t>(random.between(-1, 1) * ((thread % 4 == 0) ? 1e5f : 1e-4f));
    if (thread % 4 == 1) in[2] = (in[2] & 0xffff0000u) | 0x8000u;  // a tie of bfloat16
    if (thread % 4 == 2) in[2] = (in[2] & 0xffffe000u) | 0x1000u;  // a tie of float16
  }
  LONGCTX_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const auto bfloat = bits_as<__nv_bfloat16>(static_cast<uint16_t>(in[0]));
    const auto half = bits_as<__half>(static_cast<uint16_t>(in[1]));
    const float value = bits_as<float>(in[2]);
    out[0] = bits_as<uint32_t>(device::widen(bfloat));
    out[1] = bits_as<uint32_t>(device::widen(half));
    out[2] = bits_as<uint32_t>(device::widen(value));
    __nv_bfloat16 rounded_bfloat;
    __half rounded_half;
    device::narrow(value, rounded_bfloat);
    device::narrow(value, rounded_half);
    out[3] = bits_as<uint16_t>(rounded_bfloat);
    out[4] = bits_as<uint16_t>(rounded_half);
  }
};

}  // namespace

std::vector<Case> thread_cases() {
  return {make_case<Indices>(),      make_case<Shuffle>(),     make_case<ShuffleXor>(),
          make_case<ShuffleUp>(),    make_case<Ballot>(),      make_case<AtomicAdd>(),
          make_case<AtomicGlobal>(), make_case<AtomicCount>(), make_case<Barriers>(),
          make_case<Exp2>(),         make_case<Reciprocal>(),  make_case<Conversions>()};
}

}  // namespace longctx::lanes
