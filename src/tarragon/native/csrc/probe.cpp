// tarragon::probe_*: the thread that answers "do you live?" (appendix E).
//
// It needs neither the interpreter nor its lock, so that a garbage collection, a long kernel or a process that gets
// little of the cores does not look like a death. Each answer carries the progress counter of the computing thread.
#include <ATen/core/Tensor.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <torch/library.h>
#include <unordered_map>
#include <vector>

namespace tarragon {
namespace {

// One frame, both ways, in the machine's byte order; transport/probe.py packs the same.
struct ProbeFrame {
  uint32_t magic;
  uint16_t version;
  uint16_t kind;
  uint32_t epoch;     // of the worker that is asked
  uint32_t reserved;  // 0
  uint64_t sequence;
  uint64_t progress;  // 0 in a probe
};
static_assert(sizeof(ProbeFrame) == 32);

constexpr uint32_t kMagic = 0x50524754;  // "TGRP"
constexpr uint16_t kVersion = 1, kProbe = 1, kAnswer = 2;
constexpr size_t kFramesPerRead = 32;

struct Channel {
  std::array<uint8_t, kFramesPerRead * sizeof(ProbeFrame)> bytes;
  size_t filled = 0;
};

class Responder {
 public:
  Responder(const at::Tensor& progress, uint32_t epoch, size_t channels_max)
      : progress_(progress), epoch_(epoch), channels_max_(channels_max), pid_(getpid()) {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    TORCH_CHECK(epoll_ >= 0 && wake_ >= 0, "no descriptor is left for the probe thread");
    watch(wake_);
    // The process's signals are for its main thread: a thread that is made with all of them blocked gets none.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "probe");
  }

  ~Responder() {
    stopping_ = true;
    wake();
    thread_.join();
    for (const int fd : arrivals_) close(fd);
    for (const auto& [fd, channel] : channels_) close(fd);
    close(wake_);
    close(epoll_);
  }

  bool is_of_this_process() const { return pid_ == getpid(); }

  // Takes `fd` over.
  void adopt(int fd) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      arrivals_.push_back(fd);
    }
    wake();
  }

  std::vector<int64_t> counters() const { return {answered_, refused_, open_}; }

 private:
  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  }

  void wake() {
    const uint64_t one = 1;
    while (write(wake_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  void run() {
    std::array<epoll_event, 64> events;
    while (!stopping_) {
      const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), -1);
      for (int i = 0; i < count && !stopping_; ++i) {
        const int fd = events[i].data.fd;
        if (fd == wake_) {
          take_arrivals();
          continue;
        }
        const auto found = channels_.find(fd);
        if (found == channels_.end()) continue;  // an event of a channel that ended earlier in this round
        if (!serve(fd, *found->second)) {
          epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
          close(fd);
          channels_.erase(found);
          --open_;
        }
      }
    }
  }

  void take_arrivals() {
    uint64_t ignored;
    while (read(wake_, &ignored, sizeof ignored) < 0 && errno == EINTR) {
    }
    std::vector<int> arrivals;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      arrivals.swap(arrivals_);
    }
    for (const int fd : arrivals) {
      if (channels_.size() >= channels_max_) {
        ++refused_;
        close(fd);
        continue;
      }
      channels_[fd] = std::make_unique<Channel>();
      ++open_;
      watch(fd);
    }
  }

  // False when the channel is over: the peer is gone, sends what is no probe, or takes no answers.
  bool serve(int fd, Channel& channel) {
    const ssize_t count =
        recv(fd, channel.bytes.data() + channel.filled, channel.bytes.size() - channel.filled, MSG_DONTWAIT);
    if (count < 0) return errno == EAGAIN || errno == EINTR;
    if (count == 0) return false;
    channel.filled += static_cast<size_t>(count);
    size_t at = 0;
    for (; channel.filled - at >= sizeof(ProbeFrame); at += sizeof(ProbeFrame)) {
      if (!answer(fd, channel.bytes.data() + at)) {
        ++refused_;
        return false;
      }
    }
    channel.filled -= at;
    std::memmove(channel.bytes.data(), channel.bytes.data() + at, channel.filled);
    return true;
  }

  bool answer(int fd, const uint8_t* bytes) {
    ProbeFrame frame;
    std::memcpy(&frame, bytes, sizeof frame);
    if (frame.magic != kMagic || frame.version != kVersion || frame.kind != kProbe || frame.epoch != epoch_ ||
        frame.reserved != 0 || frame.progress != 0) {
      return false;
    }
    frame.kind = kAnswer;
    frame.progress = std::atomic_ref<uint64_t>(*static_cast<uint64_t*>(progress_.mutable_data_ptr()))
                         .load(std::memory_order_relaxed);
    if (send(fd, &frame, sizeof frame, MSG_DONTWAIT | MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof frame)) return false;
    ++answered_;
    return true;
  }

  const at::Tensor progress_;
  const uint32_t epoch_;
  const size_t channels_max_;
  const pid_t pid_;
  int epoll_, wake_;
  std::mutex mutex_;
  std::vector<int> arrivals_;
  std::unordered_map<int, std::unique_ptr<Channel>> channels_;  // the thread's own
  std::atomic<int64_t> answered_{0}, refused_{0}, open_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

std::mutex responder_mutex;
Responder* responder = nullptr;

// The process's responder; what a parent had before the fork is not it: its thread was not inherited.
Responder* current() { return responder != nullptr && responder->is_of_this_process() ? responder : nullptr; }

void probe_start(const at::Tensor& progress, int64_t epoch, int64_t channels_max) {
  TORCH_CHECK_TYPE(progress.scalar_type() == at::kLong, "progress must be int64, but is ", progress.scalar_type());
  TORCH_CHECK_VALUE(progress.numel() == 1, "progress must have one element, but has ", progress.numel());
  TORCH_CHECK_VALUE(epoch >= 0 && epoch <= UINT32_MAX, "an epoch has 32 bits");
  TORCH_CHECK_VALUE(channels_max > 0, "there must be room for one channel");
  const std::lock_guard<std::mutex> lock(responder_mutex);
  TORCH_CHECK_VALUE(current() == nullptr, "this process answers probes already");
  responder = new Responder(progress, static_cast<uint32_t>(epoch), static_cast<size_t>(channels_max));
}

void probe_stop() {
  const std::lock_guard<std::mutex> lock(responder_mutex);
  delete current();
  responder = nullptr;
}

void probe_adopt(int64_t fd) {
  const std::lock_guard<std::mutex> lock(responder_mutex);
  TORCH_CHECK_VALUE(current() != nullptr, "this process answers no probes");
  current()->adopt(static_cast<int>(fd));
}

std::vector<int64_t> probe_counters() {
  const std::lock_guard<std::mutex> lock(responder_mutex);
  return current() == nullptr ? std::vector<int64_t>{0, 0, 0} : current()->counters();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("probe_start(Tensor progress, int epoch, int channels_max) -> ()");
  m.def("probe_stop() -> ()", probe_stop);
  m.def("probe_adopt(int fd) -> ()", probe_adopt);
  m.def("probe_counters() -> int[]", probe_counters);
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) { m.impl("probe_start", probe_start); }

}  // namespace tarragon
