// What has an implementation of its own here: making tensors, moving them, changing their storage.

#pragma once

#include "operators.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>

#include <string>

namespace sim {

DeviceIndex index_of(std::optional<Device> device) {
  DeviceIndex index = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(index < device_count(), "CUDA error: invalid device ordinal");
  return index;
}

at::Tensor new_empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  DeviceScope scope(index_of(device));
  return at::detail::empty_generic(
      size, &allocator(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor new_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  DeviceScope scope(index_of(device));
  return at::detail::empty_strided_generic(
      size, stride, &allocator(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& copy_bytes(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (from.is_meta()) TORCH_CHECK(false, "Cannot copy out of meta tensor; no data!");
  if (self.is_meta()) return self;
  Call call;
  at::Tensor to = self.is_cuda() ? call.down(self) : self;
  at::Tensor source = from.is_cuda() ? call.down(from) : from;
  if (self.numel() && !quiet) {
    ++copies;
    if (self.is_cuda() && from.is_cuda()) {
      launched("aten::copy_");
    } else {
      const at::Tensor& host = self.is_cuda() ? from : self;
      if (!non_blocking) {
        synced(self.is_cuda() ? "copy from host to device" : "copy from device to host");
      } else if (!is_pinned(host.storage().data())) {
        // No stream is waited for, but the driver stages memory that is not pinned, and the host waits for that.
        if (Callback tell = on_sync) tell("staged", self.is_cuda() ? "host to device" : "device to host");
      }
      launched(self.is_cuda() ? "memcpy host to device" : "memcpy device to host");
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("aten::copy_", "")
                       .typed<at::Tensor&(at::Tensor&, const at::Tensor&, bool)>();
  op.redispatch(DispatchKeySet(DispatchKey::CPU), to, source, false);
  return self;
}

at::Tensor copy_from_here(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  copy_bytes(target, self, non_blocking);
  return to;
}

at::Tensor copy_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from_here(self, to, false);
}

at::Tensor& set_nothing(at::Tensor& self) {
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), 0, allocator().allocate(0), &allocator(), /*resizable=*/true);
  return at::native::set_storage_cpu_(self, storage, 0, {0}, {});
}

void no_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(new_empty));
  m.impl("empty_strided", TORCH_FN(new_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("set_.source_Storage", TORCH_FN(static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_)));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("copy_", TORCH_FN(copy_bytes));
  m.impl("_copy_from", TORCH_FN(copy_from_here));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_and_resize));
  m.impl("record_stream", TORCH_FN(no_stream));
  // One kernel each on CUDA (for many tensors), and several operators on the CPU.
  register_fallback(m, "aten::_foreach_");
  register_fallback(m, "aten::_fused_");
}

}  // namespace sim
