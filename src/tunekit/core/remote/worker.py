"""What happens in a process of the cluster: it joins the others as one that torchrun started, and makes the run."""

from __future__ import annotations

import os
import platform
import signal
import socket
from collections.abc import Mapping, Sequence

import attrs

from tunekit.core.model.precision import VARIABLE
from tunekit.core.remote.job import Job


@attrs.frozen(kw_only=True)
class Whereabouts:
    """Where a worker is.

    Args:
        host: the name of its machine.
        pid: its number there.
        address: by which other machines reach it.
        port: one that is free there.
        node: what Ray knows its machine by.
        worker: what Ray knows it by; the name of its output is made of it.
    """

    host: str
    pid: int
    address: str
    port: int
    node: str
    worker: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Worker:
    """The actor: one process of a run."""

    def whereabouts(self) -> Whereabouts:
        """Where it is."""
        import ray
        from ray.util import get_node_ip_address

        with socket.socket() as unused:
            unused.bind(("", 0))
            port = unused.getsockname()[1]
        context = ray.get_runtime_context()
        return Whereabouts(
            host=platform.node(),
            pid=os.getpid(),
            address=get_node_ip_address(),
            port=port,
            node=context.get_node_id(),
            worker=context.get_worker_id(),
        )

    def make(self, packed: bytes, variables: Mapping[str, str]) -> bool:
        """Make the run with the others; False if a signal stopped it, with a checkpoint."""
        os.environ.update(variables)
        try:
            Job.unpacked(packed).make()
        except (KeyboardInterrupt, SystemExit):
            return False
        return True


def variables(workers: Sequence[Whereabouts], gpus: float) -> list[dict[str, str]]:
    """What is to be in the environment of each worker: what torchrun would set, and what all of them have."""
    # Not left to Ray, which is about to show all GPUs to those that asked for none.
    common = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    # Said where the run is asked for, it holds on every machine of the cluster.
    if VARIABLE in os.environ:
        common[VARIABLE] = os.environ[VARIABLE]
    if len(workers) == 1:
        return [common]
    hosts = [worker.node for worker in workers]
    return [
        {
            **common,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(workers)),
            # Ray shows each worker its own GPU alone, which is the first that it sees.
            "LOCAL_RANK": "0" if gpus else str(hosts[:rank].count(worker.node)),
            "LOCAL_WORLD_SIZE": str(hosts.count(worker.node)),
            "MASTER_ADDR": workers[0].address,
            "MASTER_PORT": str(workers[0].port),
        }
        for rank, worker in enumerate(workers)
    ]


def terminate(pid: int) -> None:
    """SIGTERM to a process of this machine, which a run answers with a checkpoint."""
    os.kill(pid, signal.SIGTERM)
