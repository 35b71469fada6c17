"""The simulated device itself: what CUDA refuses, waits for, draws and counts, it does, too."""

import contextlib
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import simulated_cuda
from simulated_cuda import build


def line_of(text: str) -> int:
    """The line of this file that ends with the comment `# text`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"  # {text}"))


# Tensors and operators ------------------------------------------------------------------------------------------------


def test_a_tensor_is_one_of_cuda() -> None:
    here = torch.ones(3, device="cuda")
    assert here.is_cuda
    assert str(here.device) == "cuda:0"
    assert torch.ones(3).cuda().device == here.device
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        here.numpy()


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_are_refused(other: str, second_gpu: str) -> None:
    here, there = torch.ones(3, device="cuda"), torch.ones(3, device=other)
    for operator in (torch.add, torch.dot, lambda a, b: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match=f"found at least two devices, cuda:0 and {other}"):
            operator(here, there)


def test_numbers_and_indices_may_come_from_the_cpu() -> None:
    here = torch.arange(4.0, device="cuda")
    assert (here * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert here[torch.tensor([3, 0])].tolist() == [3, 0]


def test_gradients_are_those_of_the_cpu_and_made_in_a_thread_of_the_device() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1)), torch.randn(3, 5)
    layer(inputs).sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    threads = []
    layer.cuda()[0].weight.register_hook(lambda grad: threads.append(threading.get_ident()))
    layer(inputs.cuda()).sum().backward()
    assert all(torch.equal(p.grad.cpu(), e) for p, e in zip(layer.parameters(), expected, strict=True))
    assert threads != [threading.get_ident()]


def test_views_share_memory_and_what_is_written_into_grows() -> None:
    here = torch.zeros(2, 3, device="cuda")
    here.t()[1].add_(1)
    assert here.tolist() == [[0, 1, 0], [0, 1, 0]]
    out = torch.empty(0, device="cuda")
    torch.add(here, 1, out=out)
    assert (out.device, out.tolist()) == (here.device, [[1, 2, 1], [1, 2, 1]])


def test_there_are_as_many_devices_as_were_asked_for(second_gpu: str) -> None:
    with torch.cuda.device(1):
        assert str(torch.ones(1, device="cuda").device) == second_gpu
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device=f"cuda:{torch.cuda.device_count()}")


def test_what_was_saved_is_loaded_onto_its_device_or_another(tmp_path: Path, second_gpu: str) -> None:
    torch.save(torch.arange(3, device=second_gpu), tmp_path / "saved")
    for asked, expected in ((None, second_gpu), ("cpu", "cpu"), ("cuda:0", "cuda:0")):
        found = torch.load(tmp_path / "saved", map_location=asked)
        assert (str(found.device), found.tolist()) == (expected, [0, 1, 2])


def test_layers_of_four_bits_compute_what_they_do_on_the_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional

        value = torch.randn(64, 64)
        packed, state = functional.quantize_4bit(value.cuda(), quant_type="nf4")
        found = functional.dequantize_4bit(packed, state)
        expected = functional.dequantize_4bit(*functional.quantize_4bit(value, quant_type="nf4"))
    assert packed.is_cuda
    assert torch.equal(found.cpu(), expected)


# Waits ----------------------------------------------------------------------------------------------------------------


def test_waits_are_counted_by_the_line_that_makes_them() -> None:
    here = torch.arange(4.0, device="cuda")
    with simulated_cuda.counting() as counts:
        for _ in range(3):
            here.sum().item()  # asks for a number
        here[here > 1]  # asks how many
        here[here > 1] = torch.ones(2, device="cuda")
        torch.cuda.synchronize()
        here.cpu()
        here[here > 1] = 0
        here * 2
    by_line: dict[int, int] = {}
    for (_, place), count in counts.waits.items():
        line = int(place.partition(" ")[0].rpartition(":")[2])
        by_line[line] = by_line.get(line, 0) + count
    first = line_of("asks for a number")
    assert by_line == {first: 3, line_of("asks how many"): 1, first + 2: 1, first + 3: 1, first + 4: 1}
    assert "test_device.py" in counts.report()


def test_copies_wait_unless_they_need_not_and_stage_what_is_not_pinned() -> None:
    with simulated_cuda.counting() as counts:
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        torch.ones(3, device="cuda").clone()
    assert (counts.waits.total(), counts.staged.total()) == (0, 0)
    with simulated_cuda.counting() as counts:
        torch.ones(3).to("cuda", non_blocking=True)
    assert (counts.waits.total(), counts.staged.total()) == (0, 1)
    with simulated_cuda.counting() as counts:
        torch.ones(3).to("cuda")
    assert (counts.waits.total(), counts.staged.total()) == (1, 0)


def test_the_debug_mode_of_torch_warns_of_waits_or_refuses_them() -> None:
    here = torch.ones(1, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation"):
            here.item()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            here.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_are_counted_by_operator_and_views_are_none() -> None:
    here = torch.ones(2, 3, device="cuda")
    with simulated_cuda.counting(launches=True) as counts:
        (here.t().reshape(-1) * 2).view(2, 3)
        torch._foreach_mul_([here, here.clone()], 2.0)
    found = {name.partition(".")[0]: count for name, count in counts.launches.items()}
    assert found["aten::mul"] == found["aten::_foreach_mul_"] == 1
    assert not {"aten::view", "aten::t", "aten::as_strided"} & set(found)


# Random numbers -------------------------------------------------------------------------------------------------------


def test_each_kind_of_device_draws_numbers_of_its_own_from_a_seed() -> None:
    torch.manual_seed(5)
    here, there = torch.randn(9, device="cuda"), torch.randn(9)
    assert not torch.equal(here.cpu(), there)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(9), there)  # whatever the GPU drew in between
    assert torch.equal(torch.randn(9, device="cuda"), here)


@pytest.mark.parametrize("draw", [torch.rand_like, nn.functional.dropout, torch.bernoulli, torch.Tensor.normal_])
def test_whatever_draws_takes_the_generator_of_its_device(draw: Any) -> None:
    states = [torch.get_rng_state(), torch.cuda.get_rng_state()]
    draw(torch.full((9,), 0.5, device="cuda"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert not torch.equal(torch.cuda.get_rng_state(), states[1])


def test_generators_and_their_states_are_those_of_one_kind_of_device(second_gpu: str) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="RNG state is wrong size"):
        torch.cuda.set_rng_state(torch.get_rng_state())
    torch.cuda.manual_seed_all(3)
    state = torch.cuda.get_rng_state(second_gpu)
    first = torch.rand(4, device=second_gpu)
    torch.rand(4, device="cuda:0")
    torch.cuda.set_rng_state(state, second_gpu)
    assert torch.equal(torch.rand(4, device=second_gpu), first)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_is_counted_by_device_in_multiples_of_512_bytes(second_gpu: str, taken: Any) -> None:
    with taken(device=0) as of_the_first, taken(device=1) as of_the_second:
        before = torch.cuda.memory_allocated(second_gpu)
        here = torch.ones(129, device=second_gpu)
        assert torch.cuda.memory_allocated(second_gpu) - before == 1024
        del here
        assert torch.cuda.memory_allocated(second_gpu) == before
        assert (of_the_first(), of_the_second()) == (0, 1024)


def test_memory_has_a_limit_and_is_free_again_afterwards() -> None:
    held = torch.cuda.memory_allocated()
    with simulated_cuda.memory_limit(held + 4096):
        assert torch.cuda.mem_get_info() == (4096, held + 4096)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.ones(2048, device="cuda")
        torch.ones(1024, device="cuda")
    torch.ones(2048, device="cuda")


# Flash attention ------------------------------------------------------------------------------------------------------


def packed(**options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of four heads, keys and values of two, (tokens, heads, size), of rows with 5 and 3 tokens."""
    make = torch.Generator("cuda").manual_seed(0)
    given = {"device": "cuda", "dtype": torch.bfloat16, "generator": make, **options}
    query, key, value = (torch.randn(8, heads, 16, **given) for heads in (4, 2, 2))
    return query, key, value


def test_flash_attention_and_its_gradients_are_those_of_each_row_alone() -> None:
    from torch.nn.attention.varlen import varlen_attn

    given = [tensor.requires_grad_() for tensor in packed()]
    starts = torch.tensor([0, 5, 8], dtype=torch.int32, device="cuda")
    found = varlen_attn(*given, starts, starts, 5, 5, window_size=(-1, 0), enable_gqa=True)
    slope = torch.randn_like(found)
    slopes = torch.autograd.grad(found, given, slope)

    plain = [tensor.detach().float().requires_grad_() for tensor in given]
    rows = [
        nn.functional.scaled_dot_product_attention(
            *(tensor[a:b].transpose(0, 1)[None] for tensor in plain), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in ((0, 5), (5, 8))
    ]
    expected = torch.cat(rows)
    assert (found - expected).abs().max() < 2e-2
    for one, other in zip(slopes, torch.autograd.grad(expected, plain, slope.float()), strict=True):
        assert (one - other).abs().max() < 4e-2


@pytest.mark.parametrize(
    ("options", "starts", "most", "said"),
    [
        ({"dtype": torch.float32}, [0, 5, 8], 5, "only support fp16 and bf16"),
        ({}, [0, 5, 8], 4, "a row is longer than max_q or max_k says"),
        ({}, [0, 5, 7], 5, "the rows do not end where the tensors do"),
    ],
)
def test_flash_attention_refuses_what_the_kernel_cannot_compute(
    options: dict[str, Any], starts: list[int], most: int, said: str
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    at = torch.tensor(starts, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=said):
        varlen_attn(*packed(**options), at, at, most, most, enable_gqa=True)


# Building -------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_no_device_and_the_error_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(simulated_cuda.NoCompilerError, match="no C\\+\\+ compiler here"):
        build.library()


def test_it_cannot_be_installed_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from simulated_cuda import device

    monkeypatch.setattr(device, "_library", None)
    with contextlib.suppress(ModuleNotFoundError), pytest.raises(RuntimeError, match="before torch is imported"):
        device.install()
