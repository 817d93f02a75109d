// tarragon_populate_ahead: the thread that has the pages of a checkpoint bucket made before they are needed (6.1).
#include "populated.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#ifndef MADV_POPULATE_WRITE  // Linux 5.14
#define MADV_POPULATE_WRITE 23
#endif

namespace tarragon {
namespace {

int64_t thread_cpu_ns() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

void populate(const Populated& pages, int64_t chunk) {
  constexpr uintptr_t kPage = 4096;
  const auto base = reinterpret_cast<uintptr_t>(pages.base);
  const uintptr_t from = (base + chunk * pages.chunk_bytes) & ~(kPage - 1);
  const uintptr_t until = base + std::min((chunk + 1) * pages.chunk_bytes, pages.bytes);
  madvise(reinterpret_cast<void*>(from), until - from, MADV_POPULATE_WRITE);
  __atomic_store_n(pages.states + chunk, kThere, __ATOMIC_RELAXED);
}

// Returns 0 when it is told to stop, else what `read` failed with.
extern "C" __attribute__((visibility("default"))) int64_t tarragon_populate_ahead(Populated* pages) {
  const int64_t chunks = (pages->bytes + pages->chunk_bytes - 1) / pages->chunk_bytes;
  for (;;) {
    uint64_t wakes = 0;
    if (read(static_cast<int>(pages->wake_fd), &wakes, sizeof wakes) < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (wakes >= kStop) return 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (state_of(*pages, chunk) == kWanted) populate(*pages, chunk);
    }
    __atomic_store_n(&pages->ahead_ns, thread_cpu_ns(), __ATOMIC_RELAXED);
  }
}

}  // namespace tarragon
