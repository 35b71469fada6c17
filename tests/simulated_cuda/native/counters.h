// What is counted of each device, and who is told: memory, launches, waits of the host.

#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace sim {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr int MOST = 16;

// How many devices there are: what SIMULATED_CUDA says in the environment.
int device_count() {
  static const int count = [] {
    const char* said = std::getenv("SIMULATED_CUDA");
    return std::clamp(said ? std::atoi(said) : 1, 0, MOST);
  }();
  return count;
}

thread_local DeviceIndex current = 0;

// In bytes; `reserved` is what the caching allocator would have kept of what was given back.
struct Memory {
  std::atomic<int64_t> now{0}, peak{0}, reserved{0}, reserved_peak{0}, limit{-1};  // a limit below 0 is none
};

Memory memory[MOST];
std::atomic<int64_t> launches{0}, syncs{0}, copies{0};
std::atomic<int> sync_mode{0};  // torch.cuda.set_sync_debug_mode: 0 default, 1 warn, 2 error

using Callback = void (*)(const char* kind, const char* name);
std::atomic<Callback> on_sync{nullptr}, on_launch{nullptr};
thread_local int quiet = 0;  // within what stands for a kernel, nothing is counted

// The allocator gives out memory in multiples of 512 bytes.
int64_t rounded(int64_t size) {
  return size ? (size + 511) / 512 * 512 : 0;
}

void raise_to(std::atomic<int64_t>& most, int64_t value) {
  int64_t before = most;
  while (value > before && !most.compare_exchange_weak(before, value)) {
  }
}

void take(DeviceIndex device, int64_t size) {
  Memory& m = memory[device];
  int64_t after = m.now.fetch_add(size) + size;
  if (m.limit >= 0 && after > m.limit) {
    m.now -= size;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes. GPU ", int(device),
        " has a total capacity of ", m.limit.load(), " bytes of which ", m.limit - m.now, " bytes is free. (simulated)");
  }
  raise_to(m.peak, after);
  raise_to(m.reserved, after);
  raise_to(m.reserved_peak, after);
}

void give(DeviceIndex device, int64_t size) {
  memory[device].now -= size;
}

// The host waits for the device.
void synced(const char* why) {
  if (quiet) return;
  ++syncs;
  if (Callback tell = on_sync) tell("sync", why);
  TORCH_CHECK(sync_mode != 2, "called a synchronizing CUDA operation");
}

// An operator reaches the device.
void launched(const char* name) {
  if (quiet) return;
  ++launches;
  if (Callback tell = on_launch) tell("launch", name);
}

}  // namespace sim
