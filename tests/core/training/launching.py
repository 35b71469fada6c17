"""Starting the script of parallel_runs.py by a launcher, and comparing what runs saved."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")  # fmt: skip
FSDP = (*(part for part in ACCELERATE if part != "--multi_gpu"), "--use_fsdp", "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type=FULL_STATE_DICT")  # fmt: skip
DEEPSPEED = (*(part for part in ACCELERATE if part != "--multi_gpu"), "--use_deepspeed", "--zero_stage=2")


def launch(*arguments, launcher=TORCHRUN):
    """Start the script; returns its exit status and what it said."""
    command = [sys.executable, "-m", *launcher, str(HERE / "parallel_runs.py"), *map(str, arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def weights(directory):
    found = {}
    for file in sorted((directory / "adapter").glob("*.safetensors")):
        found |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
    return found


def difference(left, right):
    """The largest between the saved numbers of two runs."""
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    # AdaLoRA may leave a matrix without any rank.
    pairs = [(left[name], right[name]) for name in left if left[name].numel() or right[name].numel()]
    return max((one - other).abs().max().item() for one, other in pairs)


def difference_of_ways(left, right, base):
    """How far the ends of two runs over `base` in bfloat16 are from each other, in parts of the way from its weights.

    Of LoRA's factors B, which start at zero, or of all weights.
    """
    start = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}

    def way(directory):
        found = {name.split(":")[1]: value for name, value in weights(directory).items()}
        moved = [value.double() - start.get(name, 0) for name, value in found.items() if "lora_A" not in name]
        return torch.cat([value.flatten() for value in moved])

    return ((way(left) - way(right)).norm() / way(right).norm()).item()
