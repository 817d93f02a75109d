// CRC-32C, the checksum of rows and commit records in a checkpoint bucket.
#pragma once

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#else
#include <array>
#endif

#include <cstdint>
#include <cstring>

namespace tarragon {

#if !defined(__SSE4_2__)
inline std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78U : 0U);
    table[i] = crc;
  }
  return table;
}
#endif

// CRC-32C of `size` bytes, going on from `crc`.
inline uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t size) {
#if defined(__SSE4_2__)
  uint64_t wide = crc;
  int64_t at = 0;
  for (; at + 8 <= size; at += 8) {
    uint64_t word;
    std::memcpy(&word, data + at, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; at < size; ++at) crc = _mm_crc32_u8(crc, data[at]);
#else
  static const std::array<uint32_t, 256> table = make_table();
  for (int64_t at = 0; at < size; ++at) crc = table[(crc ^ data[at]) & 0xFF] ^ (crc >> 8);
#endif
  return crc;
}

}  // namespace tarragon
