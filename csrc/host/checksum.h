// Checksum of a page: 32 bits that change with any burst of damage a disk makes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace longctx::host {

// CRC32C (Castagnoli, reflected polynomial 0x82f63b78) of `bytes` bytes, continuing `crc`.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// Of a page: CRC32C of the CRC32Cs of its four quarters (the last takes the rest), whose chains run
// side by side: one chain alone waits three cycles for each 8 bytes.
uint32_t page_checksum(const void* data, size_t bytes);

// What this machine would compute without SSE4.2: for tests.
uint32_t crc32c_generic(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace longctx::host
