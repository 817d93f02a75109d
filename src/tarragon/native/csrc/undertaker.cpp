// tarragon::spawn_undertaker: a dying process closes its sockets at once, not after its memory is torn down.
//
// Linux frees a dead process's memory before it closes its descriptors: about 0.1 ms a MiB on an idle machine and
// ten times that on a busy one, in which nobody can tell that it is dead. The undertaker is a child that shares the
// memory and nothing else. While it lives, the death of its parent frees nothing, and the sockets' end of file
// follows the kill within milliseconds. Once the last thread of its parent is gone it ends as well, and frees the
// memory at the lowest priority, out of the way of those who take over.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <torch/library.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

namespace tarragon {
namespace {

constexpr size_t kStackBytes = 64 << 10;

// It shares the parent's thread-local storage, hence bare system calls only, and nothing is done about errors:
// without a descriptor for its parent it just ends at once, as if there were none.
int wait_for_the_end(void* parent) {
  syscall(SYS_close_range, 0U, ~0U, 0U);
  syscall(SYS_setpriority, PRIO_PROCESS, 0, 19);
  const pid_t pid = static_cast<pid_t>(reinterpret_cast<intptr_t>(parent));
  pollfd parent_end{static_cast<int>(syscall(SYS_pidfd_open, pid, 0)), POLLIN, 0};
  // Readable when the whole process is gone; a parent's death signal would come with that of its main thread.
  if (parent_end.fd >= 0) syscall(SYS_ppoll, &parent_end, 1UL, nullptr, nullptr, 0UL);
  // Where the kernel weighs sessions against each other, its own niceness means nothing to other workers. A session
  // that was not the parent's own is left alone: others live on in it.
  if (syscall(SYS_getsid, 0) == pid) {
    const long group = syscall(SYS_openat, AT_FDCWD, "/proc/self/autogroup", O_WRONLY | O_CLOEXEC);
    if (group >= 0) syscall(SYS_write, group, "19", 2UL);
  }
  syscall(SYS_exit, 0);
  return 0;
}

int64_t spawn_undertaker() {
  void* stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  TORCH_CHECK(stack != MAP_FAILED, "no memory for the undertaker's stack: ", std::strerror(errno));
  // All signals blocked: a handler of the parent's must never run there. SIGKILL cannot be blocked.
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, &before);
  const int pid = clone(wait_for_the_end, static_cast<char*>(stack) + kStackBytes, CLONE_VM,
                        reinterpret_cast<void*>(static_cast<intptr_t>(getpid())));
  const int error = errno;
  sigprocmask(SIG_SETMASK, &before, nullptr);
  TORCH_CHECK(pid > 0, "the undertaker could not be started: ", std::strerror(error));
  return pid;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) { m.def("spawn_undertaker() -> int", spawn_undertaker); }

}  // namespace tarragon
