// What this CPU and operating system offer, and which engine runs.
#include <atomic>
#include <stdexcept>

#include "strip_engine.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longctx::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// AMX state is large, so Linux enables it per process on request.
bool amx_permitted() {
  constexpr long kRequestStatePermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestStatePermission, kTileData) == 0;
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 && amx_permitted();
}

Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") && has_amx() ? Isa::kAmx : Isa::kAvx512;
}
#else
Isa detect() { return Isa::kGeneric; }
#endif

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{detected_isa()};
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void force_isa(Isa isa) {
  if (isa > detected_isa()) {
    throw std::invalid_argument("longctx: this CPU lacks the instruction set asked for");
  }
  active().store(isa, std::memory_order_relaxed);
}

const StripEngine& choose_engine(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAmx && dtype != DType::kFloat64) return amx_engine(dtype);
  if (isa >= Isa::kAvx512 && dtype != DType::kFloat64) return avx512_engine(dtype);
  if (isa >= Isa::kAvx2 && dtype != DType::kFloat64) return avx2_engine(dtype);
#else
  (void)isa;
#endif
  return generic_engine(dtype);
}

}  // namespace longctx::cpu
