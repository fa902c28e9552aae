#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace longctx::host {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;
constexpr int kQuarters = 4;

std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
    table[byte] = value;
  }
  return table;
}

uint32_t step_generic(uint32_t state, const unsigned char* data, size_t bytes) {
  static const std::array<uint32_t, 256> table = make_table();
  for (size_t i = 0; i < bytes; ++i) state = (state >> 8) ^ table[(state ^ data[i]) & 0xff];
  return state;
}

#if defined(__x86_64__)
uint64_t load_word(const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

__attribute__((target("sse4.2"))) uint32_t step_sse42(uint32_t state, const unsigned char* data,
                                                      size_t bytes) {
  uint64_t wide = state;
  for (; bytes >= 8; data += 8, bytes -= 8) wide = _mm_crc32_u64(wide, load_word(data));
  state = static_cast<uint32_t>(wide);
  for (; bytes > 0; ++data, --bytes) state = _mm_crc32_u8(state, *data);
  return state;
}

// The first `words * 8` bytes of each quarter.
__attribute__((target("sse4.2"))) void quarters_sse42(const unsigned char* data, size_t words,
                                                      uint32_t (&states)[kQuarters]) {
  uint64_t s0 = states[0], s1 = states[1], s2 = states[2], s3 = states[3];
  const size_t quarter = words * 8;
  for (size_t at = 0; at < quarter; at += 8) {
    s0 = _mm_crc32_u64(s0, load_word(data + at));
    s1 = _mm_crc32_u64(s1, load_word(data + quarter + at));
    s2 = _mm_crc32_u64(s2, load_word(data + 2 * quarter + at));
    s3 = _mm_crc32_u64(s3, load_word(data + 3 * quarter + at));
  }
  states[0] = static_cast<uint32_t>(s0);
  states[1] = static_cast<uint32_t>(s1);
  states[2] = static_cast<uint32_t>(s2);
  states[3] = static_cast<uint32_t>(s3);
}

bool has_sse42() {
  static const bool has = __builtin_cpu_supports("sse4.2") != 0;
  return has;
}
#else
bool has_sse42() { return false; }
#endif

uint32_t step(uint32_t state, const unsigned char* data, size_t bytes) {
#if defined(__x86_64__)
  if (has_sse42()) return step_sse42(state, data, bytes);
#endif
  return step_generic(state, data, bytes);
}

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  return ~step(~crc, static_cast<const unsigned char*>(data), bytes);
}

uint32_t crc32c_generic(const void* data, size_t bytes, uint32_t crc) {
  return ~step_generic(~crc, static_cast<const unsigned char*>(data), bytes);
}

uint32_t page_checksum(const void* data, size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(data);
  const size_t words = bytes / 8 / kQuarters;
  const size_t quarter = words * 8;
  uint32_t states[kQuarters] = {~0u, ~0u, ~0u, ~0u};
#if defined(__x86_64__)
  if (has_sse42()) {
    quarters_sse42(begin, words, states);
  } else
#endif
  {
    for (int i = 0; i < kQuarters; ++i) {
      states[i] = step_generic(states[i], begin + i * quarter, quarter);
    }
  }
  const size_t done = kQuarters * quarter;
  states[kQuarters - 1] = step(states[kQuarters - 1], begin + done, bytes - done);
  return crc32c(states, sizeof(states));
}

}  // namespace longctx::host
