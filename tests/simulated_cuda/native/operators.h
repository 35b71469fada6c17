// Any operator on tensors of the device: what CUDA refuses or waits for, then the kernel of the CPU.

#pragma once

#include "generator.h"
#include "views.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>

namespace sim {

// By which the host waits for the device.
const std::unordered_set<std::string>& waiting() {
  static const std::unordered_set<std::string> names = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::masked_select",
      "aten::masked_select.out", "aten::_unique2", "aten::_unique", "aten::unique_dim", "aten::unique_consecutive",
      "aten::unique_dim_consecutive", "aten::equal", "aten::repeat_interleave.Tensor", "aten::bincount",
      "aten::linalg_eigh", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_svd.U", "aten::linalg_qr",
      "aten::linalg_qr.out", "aten::geqrf", "aten::linalg_inv_ex.inverse", "aten::_linalg_det.result",
      "aten::linalg_lstsq", "aten::histc", "aten::is_set_to",
  };
  return names;
}

// Views, and what else does nothing on the device.
const std::unordered_set<std::string>& silent() {
  static const std::unordered_set<std::string> names = {
      "aten::view", "aten::as_strided", "aten::_reshape_alias", "aten::unfold", "aten::view_as_real",
      "aten::view_as_complex", "aten::set_", "aten::resize_", "aten::_has_same_storage_numel", "aten::is_set_to",
      "aten::record_stream", "aten::_local_scalar_dense",
  };
  return names;
}

// Operators that take tensors of another device: indices (which are sent over), and copies.
bool may_mix(const std::string& name) {
  return name == "aten::index.Tensor" || name == "aten::index.Tensor_out" || name == "aten::_index_put_impl_" ||
      name == "aten::index_put_" || name == "aten::_foreach_copy_" || name == "aten::_copy_from" ||
      name == "aten::_copy_from_and_resize" || name == "aten::set_.source_Tensor";
}

// Draws whose operator has no generator: they take the CPU's own, which is that of the device while they do.
struct DrawsFromDevice {
  at::Generator own, lent;
  at::Tensor before;
  bool active;
  DrawsFromDevice(bool draws, DeviceIndex device) : active(draws) {
    if (!active) return;
    own = at::detail::getDefaultCPUGenerator();
    lent = at::check_generator<Generator>(default_generator(device))->inner;
    before = own.get_state();
    own.set_state(lent.get_state());
  }
  ~DrawsFromDevice() {
    if (!active) return;
    lent.set_state(own.get_state());
    own.set_state(before);
  }
};

std::string full_name(const c10::FunctionSchema& schema) {
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda();
}

// What was seen of the tensors of one call.
struct Seen {
  bool mask = false;        // a list has one of truth values or bytes: an index by a mask
  bool host_index = false;  // a list has one of the CPU: an index that is sent over
  at::Tensor stranger;      // a tensor of another kind of device that is no number
};

void see(const at::Tensor& tensor, const std::string& name, Call& call, Seen& seen) {
  if (!tensor.defined()) return;
  if (!tensor.is_cuda()) {
    if (tensor.dim() > 0) seen.stranger = tensor;
    return;
  }
  if (call.device < 0) call.device = tensor.device().index();
  TORCH_CHECK(
      call.device == tensor.device().index() || may_mix(name), "Expected all tensors to be on the same device, but "
      "found at least two devices, cuda:", int(call.device), " and ", tensor.device().str(), "! (when checking ", name,
      ")");
}

// Refuses tensors of two devices, as torch does; numbers may come from the CPU.
Seen check_one_device(const std::string& name, at::ArrayRef<c10::IValue> arguments, Call& call) {
  Seen seen;
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      see(value.toTensor(), name, call, seen);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) see(tensor, name, call, seen);
    } else if (value.isList() || value.isOptionalTensorList()) {
      for (const c10::IValue& each : value.toListRef()) {
        if (!each.isTensor() || !each.toTensor().defined()) continue;
        const auto& tensor = each.toTensor();
        see(tensor, name, call, seen);
        seen.mask |= tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
        seen.host_index |= tensor.is_cpu() && tensor.dim() > 0;
      }
    }
  }
  const at::Tensor& stranger = seen.stranger;
  if (stranger.defined() && stranger.is_cpu() && !may_mix(name)) {
    std::string here = call.device < 0 ? "cuda" : "cuda:" + std::to_string(int(call.device));
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, ", here, " and ",
        stranger.device().str(), "! (when checking ", name, ")");
  }
  return seen;
}

// The generator of the CPU that stands behind the one of the device that was given, or its default.
at::Generator inner_generator(const c10::IValue& value, DeviceIndex device) {
  if (!value.isGenerator()) return at::check_generator<Generator>(default_generator(device))->inner;
  auto given = value.toGenerator();
  TORCH_CHECK(
      given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", given.device().type(), "'");
  return at::check_generator<Generator>(given)->inner;
}

// Puts the arguments as the CPU sees them in their place; whether there is a generator among them.
bool lower(const c10::FunctionSchema& schema, torch::jit::Stack& stack, size_t begin, Call& call) {
  bool has_generator = false;
  auto down = [&](const at::Tensor& tensor) { return is_on_device(tensor) ? call.down(tensor) : tensor; };
  for (size_t at = 0; at < schema.arguments().size(); ++at) {
    c10::IValue& value = stack[begin + at];
    const auto& argument = schema.arguments()[at];
    if (value.isTensor()) {
      value = down(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& tensor : value.toTensorList()) made.push_back(down(tensor));
      value = made;
    } else if (value.isList() && argument.type()->str().find("Tensor?") != std::string::npos) {
      c10::List<std::optional<at::Tensor>> made;
      for (const c10::IValue& each : value.toListRef())
        made.push_back(each.isTensor() ? std::optional<at::Tensor>(down(each.toTensor())) : std::nullopt);
      value = made;
    } else if (value.isDevice()) {
      if (!value.toDevice().is_cuda()) continue;
      if (call.device < 0 && value.toDevice().has_index()) call.device = value.toDevice().index();
      value = Device(DeviceType::CPU);
    } else if (argument.type()->str().find("Generator") != std::string::npos) {
      has_generator = true;
      value = inner_generator(value, call.device < 0 ? current : call.device);
    } else if (argument.name() == "pin_memory" && value.isBool()) {
      value = c10::IValue();
    }
  }
  return has_generator;
}

// Puts what the kernel of the CPU has returned on the device.
void lift(const c10::FunctionSchema& schema, torch::jit::Stack& stack, Call& call) {
  for (size_t at = stack.size() - schema.returns().size(); at < stack.size(); ++at) {
    c10::IValue& value = stack[at];
    if (value.isTensor()) {
      value = call.up(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& tensor : value.toTensorList()) made.push_back(call.up(tensor));
      value = made;
    }
  }
}

void fallback(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = full_name(schema);
  const auto count = schema.arguments().size();

  Call call;
  const auto arguments = torch::jit::last(*stack, count);
  const Seen seen = check_one_device(name, arguments, call);
  // Where it is read by a mask, torch has asked for its places (nonzero) before; one number is filled in without.
  const bool asks_for_places = name.rfind("aten::_index_put", 0) == 0 &&
      !(arguments[2].toTensor().is_cpu() && arguments[2].toTensor().numel() == 1);
  const bool has_generator = lower(schema, *stack, stack->size() - count, call);

  if (seen.host_index) synced((name + " with indices of the CPU").c_str());
  if (seen.mask && asks_for_places) synced((name + " with a mask").c_str());
  if (waiting().count(name)) synced(name.c_str());
  if (!silent().count(name)) launched(name.c_str());

  {
    const bool draws = !has_generator && op.hasTag(at::Tag::nondeterministic_seeded);
    DrawsFromDevice lent(draws, call.device < 0 ? current : call.device);
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  call.settle();
  lift(schema, *stack, call);
}

// All operators of a library whose full names start with `prefix` go to the fallback.
void register_fallback(torch::Library& library, const std::string& prefix) {
  const auto space = prefix.find("::") + 2;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(prefix, 0) != 0 || name.name == "aten::_fused_sdp_choice") continue;
    std::string own = name.name.substr(space) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library.impl(own.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

}  // namespace sim
