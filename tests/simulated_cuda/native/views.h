// From a tensor of the device to one of the CPU over the same bytes, and back.

#pragma once

#include "memory.h"

#include <ATen/ATen.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace sim {

struct DeviceScope {
  DeviceIndex before = current;
  explicit DeviceScope(DeviceIndex device) {
    if (device >= 0) current = device;
  }
  ~DeviceScope() {
    current = before;
  }
};

at::Tensor like(const at::Tensor& of, c10::Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), of.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(of.sizes(), of.strides(), of.storage_offset());
  if (of.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (of.is_conj()) made._set_conj(true);
  if (of.is_neg()) made._set_neg(true);
  return made;
}

// The CPU's view of one call: storages that are shared stay so.
struct Call {
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages;     // of the device -> of the CPU
  std::unordered_map<const c10::StorageImpl*, c10::Storage> back;         // of the CPU -> of the device
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;                   // of the device, of the CPU
  DeviceIndex device = -1;

  at::Tensor down(const at::Tensor& tensor) {
    for (auto& [there, here] : pairs)
      if (there.is_same(tensor)) return here;
    const auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto known = storages.find(storage);
    if (known == storages.end()) {
      void* data = const_cast<void*>(storage->data());
      auto made = c10::Storage(
          c10::Storage::use_byte_size_t(), storage->nbytes(),
          c10::DataPtr(data, Device(DeviceType::CPU)), c10::GetCPUAllocator(), /*resizable=*/true);
      back.emplace(made.unsafeGetStorageImpl(), tensor.storage());
      known = storages.emplace(storage, made).first;
    }
    auto made = like(tensor, known->second, DispatchKey::CPU);
    pairs.emplace_back(tensor, made);
    return made;
  }

  at::Tensor up(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu() || tensor.is_sparse() || !tensor.has_storage()) return tensor;
    for (auto& [there, here] : pairs)
      if (here.is_same(tensor)) return there;
    const auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto known = back.find(storage);
    if (known == back.end()) {
      DeviceIndex where = device < 0 ? current : device;
      // The storage of the CPU is kept alive by the new one.
      auto* held = new c10::Storage(tensor.storage());
      c10::DataPtr data(
          const_cast<void*>(held->data()), held, [](void* one) { delete static_cast<c10::Storage*>(one); },
          Device(DeviceType::CPU));
      auto made = c10::Storage(
          c10::Storage::use_byte_size_t(), held->nbytes(), on_device(std::move(data), where, held->nbytes()),
          &allocator(), /*resizable=*/true);
      known = back.emplace(storage, made).first;
    }
    auto made = like(tensor, known->second, DispatchKey::CUDA);
    pairs.emplace_back(made, tensor);
    return made;
  }

  // What a kernel has made another size of: `out=` that was empty.
  void settle() {
    for (auto& [there, here] : pairs) {
      if (there.sizes() == here.sizes() && there.strides() == here.strides()) continue;
      DeviceScope scope(there.device().index());
      at::native::resize_(there, here.sizes());
      auto again = c10::Storage(
          c10::Storage::use_byte_size_t(), there.storage().nbytes(),
          c10::DataPtr(const_cast<void*>(there.storage().data()), Device(DeviceType::CPU)), nullptr, false);
      there.unsafeGetTensorImpl()->set_sizes_and_strides(here.sizes(), here.strides(), there.storage_offset());
      like(there, again, DispatchKey::CPU).copy_(here);
    }
  }
};

}  // namespace sim
