// A CUDA device that is simulated on the CPU: torch's own dispatch key CUDA, in a build of torch without CUDA.
//
// Tensors "on cuda:0" are real CUDA tensors to torch and to Python (device, is_cuda, dispatch key, autograd's device
// thread, generators, pinned memory), whose bytes lie in the memory of the CPU. A boxed fallback for the dispatch key
// CUDA shows every operator CPU tensors over the same bytes, calls the kernel of the CPU, and gives back CUDA tensors.
// On the way it does what real CUDA does and the CPU does not:
//   - tensors of two devices in one operator are refused (but for numbers, and indices, as torch does);
//   - random numbers come from the device's own generators;
//   - operators by which the host waits for the device are counted, and warned of in torch's sync debug mode;
//   - memory is counted as the caching allocator counts it, and may be limited (OutOfMemoryError);
//   - launches are counted: one for each operator that reaches the device, views aside.
//
// One source with its parts as headers, so that torch's own headers are read once. It is loaded by ctypes before torch
// is imported (device.py), and knows nothing of Python: what it is asked for are the functions at the end.

#include "device.h"
#include "tensors.h"

extern "C" {

// The operators of a library (bitsandbytes) go to its kernels for the CPU, whatever it has for any device.
void sim_cover(const char* library) {
  auto* m = new torch::Library(torch::Library::IMPL, library, c10::DispatchKey::CUDA, __FILE__, __LINE__);
  sim::register_fallback(*m, std::string(library) + "::");
}

int sim_device_count() {
  return sim::device_count();
}

int sim_get_device() {
  return sim::current;
}

int sim_set_device(int device) {
  if (device < 0 || device >= sim::device_count()) return -1;
  sim::current = static_cast<c10::DeviceIndex>(device);
  return 0;
}

void sim_hand_out_default(int on) {
  sim::hand_out_default = on != 0;
}

int64_t sim_counted(const char* what, int device) {
  std::string name = what;
  sim::Memory& m = sim::memory[device];
  if (name == "now") return m.now;
  if (name == "peak") return m.peak;
  if (name == "reserved") return std::max(m.reserved.load(), m.now.load());
  if (name == "reserved_peak") return m.reserved_peak;
  if (name == "launches") return sim::launches;
  if (name == "syncs") return sim::syncs;
  if (name == "copies") return sim::copies;
  return -1;
}

void sim_reset_peak(int device) {
  sim::memory[device].peak = sim::memory[device].now.load();
  sim::memory[device].reserved_peak = sim::memory[device].reserved.load();
}

void sim_empty_cache() {
  for (auto& m : sim::memory) m.reserved = m.now.load();
}

void sim_limit(int device, int64_t bytes) {
  sim::memory[device].reserved = sim::memory[device].now.load();
  sim::memory[device].limit = bytes;
}

void sim_sync_mode(int mode) {
  sim::sync_mode = mode;
}

int sim_get_sync_mode() {
  return sim::sync_mode;
}

void sim_quiet(int more) {
  sim::quiet += more;
}

void sim_synchronize() {
  sim::synced("torch.cuda.synchronize");
}

void sim_on_sync(void (*tell)(const char*, const char*)) {
  sim::on_sync = tell;
}

void sim_on_launch(void (*tell)(const char*, const char*)) {
  sim::on_launch = tell;
}
}
