// Random numbers: the generators of a device, which give other numbers for a seed than the CPU's.

#pragma once

#include "counters.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cstring>
#include <utility>
#include <vector>

namespace sim {

// A generator of the device; the numbers are those of a generator of the CPU that it holds.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;

  Generator(DeviceIndex index, at::Generator of)
      : GeneratorImpl(Device(DeviceType::CUDA, index), DispatchKeySet(DispatchKey::CUDA)), inner(std::move(of)) {}

  void set_current_seed(uint64_t seed) override {
    // Not the CPU's numbers for the same seed: who draws on the wrong device is to be seen.
    inner.set_current_seed(seed ^ 0x5bd1e995u);
    said = seed;
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override {
    return 0;
  }
  uint64_t current_seed() const override {
    return said;
  }
  uint64_t seed() override {
    uint64_t drawn = c10::detail::getNonDeterministicRandom();
    set_current_seed(drawn);
    return drawn;
  }
  // The state of a generator of CUDA is 16 bytes; here it is that of the inner one and a mark behind it, so that the
  // state of one device cannot be put into a generator of the other.
  void set_state(const c10::TensorImpl& state) override {
    int64_t size = inner.get_state().numel();
    TORCH_CHECK(state.numel() == size + 8, "RNG state is wrong size");
    auto whole = at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(const_cast<c10::TensorImpl*>(&state)));
    TORCH_CHECK(whole.device().is_cpu() && whole.scalar_type() == at::kByte, "RNG state must be a torch.ByteTensor");
    std::memcpy(&said, whole.data_ptr<uint8_t>() + size, 8);
    inner.set_state(whole.narrow(0, 0, size).clone());
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto own = const_cast<at::Generator&>(inner).get_state();
    auto whole = at::empty({own.numel() + 8}, own.options());
    whole.narrow(0, 0, own.numel()).copy_(own);
    std::memcpy(whole.data_ptr<uint8_t>() + own.numel(), &said, 8);
    return whole.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* made = new Generator(device().index(), inner.clone());
    made->said = said;
    return made;
  }
  static DeviceType device_type() {
    return DeviceType::CUDA;
  }

 private:
  uint64_t said = c10::default_rng_seed_val;
};

at::Generator make_generator(DeviceIndex index) {
  return at::make_generator<Generator>(index, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator>* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (int i = 0; i < MOST; ++i) made->push_back(make_generator(i));
    return made;
  }();
  return (*all)[index < 0 ? current : index];
}

std::atomic<bool> hand_out_default{false};

}  // namespace sim
