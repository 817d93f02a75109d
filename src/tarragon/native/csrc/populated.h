// Which pages of a bucket are there? One that is written for the first time is a fault, with cold caches 20 us and
// more: chunks of them are asked for at once, and the next chunk by a thread before it is needed.
#pragma once
#include <unistd.h>

#include <cstdint>

namespace tarragon {

// native/populated.py has the same layout.
struct Populated {
  uint8_t* base;
  int64_t bytes, chunk_bytes;
  uint8_t* states;   // a State for each chunk
  int64_t wake_fd;   // an eventfd: chunks are wanted, or kStop
  int64_t ahead_ns;  // CPU time of the thread
};

enum State : uint8_t { kAbsent, kWanted, kThere };

constexpr uint64_t kStop = uint64_t{1} << 32;

// Ask the kernel for the pages of a chunk. Where it cannot, they come one by one.
void populate(const Populated& pages, int64_t chunk);

inline uint8_t state_of(const Populated& pages, int64_t chunk) {
  return __atomic_load_n(pages.states + chunk, __ATOMIC_RELAXED);
}

// Before bytes from ... are written: have their pages. Returns whether the chunk after them is wanted now.
inline bool need(const Populated& pages, const uint8_t* from, int64_t bytes) {
  const int64_t last = (from + bytes - 1 - pages.base) / pages.chunk_bytes;
  for (int64_t chunk = (from - pages.base) / pages.chunk_bytes; chunk <= last; ++chunk) {
    if (state_of(pages, chunk) != kThere) populate(pages, chunk);
  }
  if ((last + 1) * pages.chunk_bytes >= pages.bytes || state_of(pages, last + 1) != kAbsent) return false;
  __atomic_store_n(pages.states + last + 1, kWanted, __ATOMIC_RELAXED);
  return true;
}

// Wake the thread.
inline void want(const Populated& pages) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t done = write(static_cast<int>(pages.wake_fd), &one, sizeof one);
}

}  // namespace tarragon
