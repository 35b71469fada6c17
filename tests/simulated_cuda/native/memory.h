// Memory of a device: that of the CPU, counted as the caching allocator counts; and pinned memory.

#pragma once

#include "counters.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <map>
#include <mutex>
#include <utility>

namespace sim {

struct Block {
  c10::DataPtr held;  // of the allocator of the CPU
  DeviceIndex device;
  int64_t size;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  give(block->device, block->size);
  delete block;
}

// `held` is memory of the CPU; what comes out counts as the device's.
c10::DataPtr on_device(c10::DataPtr held, DeviceIndex device, int64_t nbytes) {
  int64_t size = rounded(nbytes);
  take(device, size);
  void* data = held.get();
  auto* block = new Block{std::move(held), device, size};
  return c10::DataPtr(data, block, &free_block, Device(DeviceType::CUDA, device));
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    return on_device(c10::GetCPUAllocator()->allocate(n), current, n);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Allocator& allocator() {
  static Allocator* one = new Allocator();
  return *one;
}

// Pinned memory of the host.
std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned;

void free_pinned(void* context) {
  auto* held = static_cast<c10::DataPtr*>(context);
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(reinterpret_cast<uintptr_t>(held->get()));
  }
  delete held;
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto at = reinterpret_cast<uintptr_t>(data);
  auto after = pinned.upper_bound(at);
  if (after == pinned.begin()) return false;
  --after;
  return at < after->first + std::max<size_t>(after->second, 1);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto* held = new c10::DataPtr(c10::GetCPUAllocator()->allocate(std::max<size_t>(n, 1)));
    {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned[reinterpret_cast<uintptr_t>(held->get())] = n;
    }
    return c10::DataPtr(held->get(), held, &free_pinned, Device(DeviceType::CPU));
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

}  // namespace sim
