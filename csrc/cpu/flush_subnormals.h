// Subnormal results count as 0 on this thread while this lives. Softmax weights fall through all
// magnitudes, and x86 takes some hundred cycles for each subnormal: attention with scores 100 nats
// apart ran 70x slower.
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace longctx::cpu {

class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 1u << 15;  // of results; operands are taken as they are
    _mm_setcsr(saved_ | kFlushToZero);
  }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

}  // namespace longctx::cpu
