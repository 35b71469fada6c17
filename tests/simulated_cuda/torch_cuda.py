"""What `torch.cuda` asks its C++ for, which a build for the CPU has not: filled in for the simulated device."""

import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from simulated_cuda.device import TOTAL, counted, free_and_total, native

CAPABILITY = (9, 0)
NAME = "NVIDIA H200 (simulated)"


def fill() -> None:
    """Make `torch.cuda` one of a machine with GPUs."""
    for name, function in _functions().items():
        setattr(torch._C, name, function)
    capturing = torch._C._cuda_isCurrentStreamCapturing
    for module in (torch.cuda, torch.cuda.graphs):
        if hasattr(module, "_cuda_isCurrentStreamCapturing"):
            module._cuda_isCurrentStreamCapturing = capturing

    cuda = torch.cuda
    cuda._is_compiled = lambda: True
    cuda._lazy_init = lambda: None
    cuda._initialized = True
    cuda.is_initialized = lambda: True
    cuda.get_device_properties = _properties
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_arch_list = lambda: ["sm_80", "sm_90"]
    cuda._exchange_device, cuda._maybe_exchange_device = _exchange, _maybe_exchange
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.mem_get_info = cuda.memory.mem_get_info = _mem_get_info
    cuda.cudart = lambda: types.SimpleNamespace(cudaMemGetInfo=_mem_get_info)
    cuda.is_current_stream_capturing = lambda: False
    cuda._device_count_nvml = lambda: native().sim_device_count()  # one of ctypes has no hash
    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.current_stream = cuda.default_stream = Stream
    cuda.set_stream = lambda stream: None
    cuda.stream = _on_stream
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch.UntypedStorage.__new__ = staticmethod(_new_storage)

    native().sim_hand_out_default(1)
    try:
        count = native().sim_device_count()
        cuda.default_generators = tuple(torch.Generator(device=f"cuda:{at}") for at in range(count))
    finally:
        native().sim_hand_out_default(0)


def _functions() -> dict[str, Callable[..., Any]]:
    """What is to stand in `torch._C`, by name."""
    lib = native()
    found = {
        "_cuda_getDeviceCount": lib.sim_device_count,
        "_cuda_getDevice": lib.sim_get_device,
        "_cuda_setDevice": _set_device,
        "_cuda_exchangeDevice": _exchange,
        "_cuda_maybeExchangeDevice": _maybe_exchange,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_init": lambda: None,
        "_cuda_synchronize": lib.sim_synchronize,
        "_cuda_emptyCache": lib.sim_empty_cache,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetPeakMemoryStats": lib.sim_reset_peak,
        "_cuda_resetAccumulatedMemoryStats": lib.sim_reset_peak,
        "_cuda_set_sync_debug_mode": lib.sim_sync_mode,
        "_cuda_get_sync_debug_mode": lib.sim_get_sync_mode,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getCurrentRawStream": lambda number: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_hasPrimaryContext": lambda number: True,
        "_cuda_setMemoryFraction": lambda fraction, device: lib.sim_limit(device, int(fraction * TOTAL)),
        "_cuda_clearCublasWorkspaces": lambda: None,
        "_cuda_getAllocatorBackend": lambda: "native",
    }
    # Functions of Python: those of ctypes have no hash, which torch.compile asks for.
    return {name: (lambda *args, function=function: function(*args)) for name, function in found.items()}


# Devices --------------------------------------------------------------------------------------------------------------


def _index(device: Any = None) -> int:
    """The number of a device; of the current one where none is named."""
    if isinstance(device, int):
        return device
    found = None if device is None else torch.device(device)
    if found and found.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return int(native().sim_get_device()) if found is None or found.index is None else found.index


def _set_device(number: int) -> None:
    if number >= 0 and native().sim_set_device(number):
        raise RuntimeError("CUDA error: invalid device ordinal")


def _exchange(number: int) -> int:
    before = _index()
    _set_device(number)
    return before


def _maybe_exchange(number: int) -> int:
    return _index() if number < 0 else _exchange(number)


def _properties(device: Any = None) -> types.SimpleNamespace:
    if _index(device) >= native().sim_device_count():
        raise AssertionError("Invalid device id")
    return types.SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=TOTAL,
        multi_processor_count=132,
        is_integrated=0,
        is_multi_gpu_board=0,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        regs_per_multiprocessor=65536,
        L2_cache_size=60 * 2**20,
        gcnArchName=NAME,
        uuid="simulated",
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=49152,
    )


# Memory ---------------------------------------------------------------------------------------------------------------


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    return free_and_total(_index(device))


def _memory_stats(device: int) -> dict[str, Any]:
    def pools(now: int, peak: int) -> dict[str, dict[str, int]]:
        one = {"current": now, "peak": peak, "allocated": peak, "freed": peak - now}
        none = dict.fromkeys(one, 0)
        return {"all": one, "small_pool": none, "large_pool": one}

    held = pools(counted("now", device), counted("peak", device))
    reserved = pools(counted("reserved", device), counted("reserved_peak", device))
    not_counted = ("allocation", "segment", "active", "inactive_split", "inactive_split_bytes")
    return {
        **dict.fromkeys(("allocated_bytes", "active_bytes", "requested_bytes"), held),
        "reserved_bytes": reserved,
        **{name: pools(0, 0) for name in not_counted},
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


_plain_new_storage = torch._C.StorageBase.__new__


def _new_storage(cls: type, *args: Any, device: Any = None, **options: Any) -> Any:
    """A storage; torch's C++ knows none of CUDA, so that of a tensor is taken."""
    if device is None or torch.device(device).type != "cuda" or cls is not torch.UntypedStorage:
        return _plain_new_storage(cls, *args, **({} if device is None else {"device": device}), **options)
    given = args[0] if args else 0
    if isinstance(given, int):
        return torch.empty(given, dtype=torch.uint8, device=device).untyped_storage()
    return torch.tensor(list(given), dtype=torch.uint8, device=device).untyped_storage()


# Streams and events: there is one stream, on which everything is done at once -----------------------------------------


class Stream:
    cuda_stream = 0
    priority = 0

    def __init__(self, device: Any = None, *args: Any, **options: Any) -> None:
        self.device = torch.device("cuda", _index(device))

    def synchronize(self) -> None:
        native().sim_synchronize()

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.device == self.device

    def __hash__(self) -> int:
        return hash(self.device)


class Event:
    def __init__(self, *args: Any, **options: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1000

    def synchronize(self) -> None:
        native().sim_synchronize()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield
