"""What the environment says of the processes of a run. Nothing here imports torch.

torchrun and quantune's own launcher tell each worker its place in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; srun tells it in variables of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from quantune.errors import InputError

LOWEST_PORT, PORTS = 15_000, 15_000
"""Ports that the processes of a Slurm job may meet at, below those that Linux gives out by itself."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of a world."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process among all, from 0; 0 for one that no launcher started."""
    return int(environment["RANK"]) if launched(environment) else 0


def attempt(environment: Mapping[str, str] = os.environ) -> int:
    """How often the processes of this world have been started again."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of the store where the processes of this world meet.

    Raises:
        InputError: the launcher does not say.
    """
    try:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise InputError(
            "expected the launcher to say in MASTER_ADDR and MASTER_PORT where the processes meet, found "
            f"{environment.get('MASTER_ADDR', 'no MASTER_ADDR')} and {environment.get('MASTER_PORT', 'no MASTER_PORT')}"
        ) from error


def launcher_has_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher has that store; otherwise rank 0 does."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in torch's words what srun says in its own, where it started several tasks and no other launcher did.

    Raises:
        InputError: srun does not say where the first task runs.
    """
    if launched(environment) or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return  # an allocation alone (sbatch, salloc) has SLURM_NTASKS, but no step
    tasks = _per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = int(environment["SLURM_NODEID"])
    here = tasks[min(node, len(tasks) - 1)]
    sees_one = "CUDA_VISIBLE_DEVICES" in environment and "," not in environment["CUDA_VISIBLE_DEVICES"]
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        # --gpus-per-task shows each task its own GPU alone, as the first one
        LOCAL_RANK="0" if sees_one else environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(here),
    )
    environment.setdefault("MASTER_ADDR", _first_host(environment.get("SLURM_STEP_NODELIST", "")))
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(LOWEST_PORT + (job * 31 + step) % PORTS))


def _per_node(text: str) -> list[int]:
    """Tasks of each node.

    >>> _per_node("4(x2),3")
    [4, 4, 3]
    """
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first host of a Slurm list of nodes.

    >>> _first_host("gpu[003-005,9],cpu1"), _first_host("login"), _first_host("rack[1-2]n[07-08]")
    ('gpu003', 'login', 'rack1n07')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise InputError("expected srun to name its nodes in SLURM_STEP_NODELIST, found nothing; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
