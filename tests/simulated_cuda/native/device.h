// What torch asks a kind of device for: its guard, streams, events and hooks.

#pragma once

#include "generator.h"
#include "memory.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <string>

namespace sim {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return DeviceType::CUDA;
  }
  Device exchangeDevice(Device to) const override {
    Device before = getDevice();
    setDevice(to);
    return before;
  }
  Device getDevice() const override {
    return Device(DeviceType::CUDA, current);
  }
  void setDevice(Device to) const override {
    if (to.has_index()) {
      TORCH_CHECK(to.index() < device_count(), "CUDA error: invalid device ordinal");
      current = to.index();
    }
  }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(DeviceType::CUDA, device.has_index() ? device.index() : current));
  }
  c10::Stream getDefaultStream(Device device) const override {
    return getStream(device);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  DeviceIndex deviceCount() const noexcept override {
    return static_cast<DeviceIndex>(device_count());
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    synced("synchronizeStream");
  }
  void synchronizeEvent(void*) const override {
    synced("synchronizeEvent");
  }
  void synchronizeDevice(const DeviceIndex) const override {
    synced("synchronizeDevice");
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override {
    return 0.0;
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasCUDA() const override {
    return device_count() > 0;
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    DeviceIndex which = index < 0 ? current : index;
    TORCH_CHECK(which < device_count(), "CUDA error: invalid device ordinal");
    return hand_out_default ? default_generator(which) : make_generator(which);
  }
  Device getDeviceFromPtr(void*) const override {
    return Device(DeviceType::CUDA, current);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* one = new PinnedAllocator();
    return one;
  }
  c10::Allocator* getCUDADeviceAllocator() const override {
    return &allocator();
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex current_device() const override {
    return current;
  }
  DeviceIndex deviceCount() const override {
    return static_cast<DeviceIndex>(device_count());
  }
  DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(DeviceIndex device) const override {
    TORCH_CHECK(device < device_count(), "CUDA error: invalid device ordinal");
    current = device;
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    DeviceIndex before = current;
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current : exchangeDevice(device);
  }
  int getNumGPUs() const override {
    return device_count();
  }
  std::string showConfig() const override {
    return "simulated CUDA";
  }
  void deviceSynchronize(DeviceIndex) const override {
    synced("deviceSynchronize");
  }
};

using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

struct AllocatorIsThere {
  AllocatorIsThere() {
    c10::SetAllocator(DeviceType::CUDA, &allocator(), 255);
  }
} allocator_is_there;

}  // namespace sim
