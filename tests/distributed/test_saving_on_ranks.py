"""A checkpoint is the same file however many ranks wrote it, and any number of them goes on from it."""

import errno
import json
import os
import random
import signal
import socket
from datetime import timedelta

import attrs
import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load
from support import Silent, quantization
from torch import nn
from torch.distributed.fsdp import fully_shard

from quantune.checkpoint.audit import audit
from quantune.checkpoint.run_folder import RunFolder
from quantune.checkpoint.saver import Saver
from quantune.checkpoint.state import ADAPTER, OPTIMIZER, capture, restore, write_state
from quantune.checkpoint.store import CheckpointStore
from quantune.distributed.world import World, joined
from quantune.errors import CheckpointError, InterruptedRun
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.run import train

CPU = torch.device("cpu")
MINUTE = timedelta(minutes=1)


class Small:
    """A model whose rows divide by no number of ranks here, in training."""

    def __init__(self, mesh, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5, bias=False))
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)

    def steps(self, count):
        for index in range(count):
            torch.manual_seed(index)
            self.model(torch.randn(4, 6)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def capture(self, world):
        return capture(
            parameters=self.parameters, optimizer=self.optimizer, progress={"step": 3}, identity={}, world=world
        )

    def restore(self, folder, world):
        return restore(folder, parameters=self.parameters, optimizer=self.optimizer, seed=4, world=world)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _save_after_three_steps(world, folder):
    with joined(world, CPU, MINUTE) as mesh:
        run = Small(mesh)
        run.steps(3)
        state = run.capture(world)
        if state is not None:
            write_state(folder, state)
        return state is None, None if state is None else len(state.rng)


def _go_on(world, folder):
    """Parameters and moments after going on from a folder, what they were before a step, and a random number."""
    with joined(world, CPU, MINUTE) as mesh:
        run = Small(mesh, seed=9)
        assert run.restore(folder, world) == {"step": 3}
        draws = torch.rand(1).item(), random.random(), np.random.rand()
        restored = {name: whole(parameter) for name, parameter in run.parameters.items()}
        moments = {name: whole(run.optimizer.state[p]["exp_avg_sq"]) for name, p in run.parameters.items()}
        run.steps(1)
        after = {name: whole(parameter) for name, parameter in run.parameters.items()}
        return restored, moments, after, draws


@pytest.fixture
def saved(tmp_path):
    """A folder with the state that so many ranks saved."""

    def save(size):
        folder = tmp_path / f"of-{size}"
        folder.mkdir()
        answers = (
            [_save_after_three_steps(World(), folder)] if size == 1 else on_ranks(size, _save_after_three_steps, folder)
        )
        assert answers == [(False, size)] + [(True, None)] * (size - 1)
        return folder

    return save


def test_ranks_write_the_bytes_that_one_process_writes(saved):
    alone = saved(1)
    for size in (2, 3):
        shared = saved(size)
        expected, found = (load((folder / ADAPTER).read_bytes()) for folder in (alone, shared))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():  # gradients are summed over ranks: rounded otherwise
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        files = (json.loads((folder / "state.json").read_text())["optimizer"] for folder in (alone, shared))
        assert next(files) == next(files)
        assert load((shared / OPTIMIZER).read_bytes()).keys() == load((alone / OPTIMIZER).read_bytes()).keys()


@pytest.mark.parametrize("wrote", [1, 3])
def test_every_number_of_ranks_goes_on_from_the_same_bits(saved, wrote):
    folder = saved(wrote)
    expected = load((folder / ADAPTER).read_bytes())
    moments = load((folder / OPTIMIZER).read_bytes())
    for size in (1, 2, 3):
        for answer in [_go_on(World(), folder)] if size == 1 else on_ranks(size, _go_on, folder):
            restored, second, _, _ = answer
            for name, tensor in expected.items():
                assert torch.equal(restored[name], tensor)
                assert torch.equal(second[name], moments[f"{name}/exp_avg_sq"])


def test_going_on_is_training_on(saved):
    folder = saved(2)

    def on(world):
        with joined(world, CPU, MINUTE) as mesh:
            run = Small(mesh)
            run.steps(3)
            run.steps(1)
            return {name: whole(parameter) for name, parameter in run.parameters.items()}

    (expected, _), answers = on_ranks(2, on), on_ranks(2, _go_on, folder)
    for _, _, after, _ in answers:
        assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def test_saved_and_restored_ranks_write_the_same_bytes_again(saved, tmp_path):
    folder = saved(3)

    def again(world, where):
        with joined(world, CPU, MINUTE) as mesh:
            run = Small(mesh, seed=9)
            run.restore(folder, world)
            state = run.capture(world)
            if state is not None:
                write_state(where, state)

    for size in (3, 1, 2):
        where = tmp_path / f"again-{size}"
        where.mkdir()
        on_ranks(size, again, where) if size > 1 else again(World(), where)
        for name in (ADAPTER, OPTIMIZER):
            assert (where / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "again-3" / "state.json").read_bytes() == (folder / "state.json").read_bytes()


def test_every_rank_has_random_numbers_of_its_own_and_another_world_begins_new_ones(saved):
    folder = saved(2)

    def draw(world):
        with joined(world, CPU, MINUTE) as mesh:
            run = Small(mesh)
            run.steps(3)
            random.seed(world.rank)
            np.random.seed(world.rank)
            torch.manual_seed(world.rank)
            state = run.capture(world)
            if state is not None:
                write_state(folder, state)
            return torch.rand(1).item(), random.random(), np.random.rand()

    expected = on_ranks(2, draw)
    assert expected[0] != expected[1]
    assert [answer[3] for answer in on_ranks(2, _go_on, folder)] == expected
    three = [answer[3] for answer in on_ranks(3, _go_on, folder)]
    assert len({*three, *expected}) == 5
    assert [answer[3] for answer in on_ranks(3, _go_on, folder)] == three


def message(world, action):
    """What `action(world, mesh)` raises."""
    with joined(world, CPU, MINUTE) as mesh:
        try:
            action(world, mesh)
        except CheckpointError as error:
            return str(error)
        return None


def test_a_rank_that_can_not_capture_fails_the_save_on_all():
    def broken_on_one(world, mesh):
        run = Small(mesh)
        if world.rank == 1:
            run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        run.capture(world)

    expected = "rank 1: the optimizer trains a parameter that is not among the parameters to save"
    assert on_ranks(3, message, broken_on_one) == [expected] * 3


def test_a_disk_that_is_full_fails_the_save_on_all_and_nothing_is_published(tmp_path):
    @attrs.frozen
    class Full(CheckpointStore):
        def save(self, step, write):
            def fail(folder):
                write(folder)
                raise OSError(errno.ENOSPC, "No space left on device")

            return super().save(step, fail)

    def save(world, mesh):
        run = Small(mesh)
        saver = Saver(store=Full(tmp_path), keep=2, committed=pytest.fail, lost=pytest.fail, world=world)
        saver.save(3, lambda: run.capture(world))
        while not world.any(saver.failed()):  # as the end of each step does
            pass
        saver.finish()

    first, *others = on_ranks(3, message, save)
    assert "the disk is full" in first and others == [first] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_can_not_read_fails_all(saved):
    folder = saved(1)

    def read(world, mesh):
        run = Small(mesh)
        run.restore(folder if world.main else folder / "elsewhere", world)

    first, second = on_ranks(2, message, read)
    assert first == second and first.startswith("rank 1: elsewhere is not a state that can be read")


class StopAt(Silent):
    """Asks the run to stop in a step, and remembers warnings."""

    def __init__(self, step=None):
        self.at = step
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)

    def step(self, metrics):
        if metrics.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def recipe(bases, rows):
    """Dropout, ragged batches over two epochs, evaluations and checkpoints."""
    source = SourceConfig(path=str(rows), format="instruct")
    return Recipe(
        model=ModelConfig(base=str(bases / "untied")),
        quantization=quantization(weight_dtype="nf4"),
        adapter=AdapterConfig(r=4, dropout=0.2),
        data=DataConfig(train=(source,), eval=(attrs.evolve(source, limit=3),)),
        training=TrainingConfig(
            max_steps=8, batch_size=4, micro_batch_size=1, learning_rate=1e-3, precision="fp32", device="cpu"
        ),
        evaluation=EvaluationConfig(every_steps=3),
        checkpoint=CheckpointConfig(every_steps=2),
    )


def _run(world, recipe, path, stop_at=None, resume=False):
    """The warnings of a run; only rank 0 is asked to stop."""
    observer = StopAt(stop_at if world.main else None)
    folder = RunFolder(path)
    if world.main:
        path.mkdir(exist_ok=True)
    try:
        train(recipe, folder, observer, world=world, resume=resume)
    except InterruptedRun:
        assert stop_at is not None
    return observer.warnings


def adapter_bytes(path):
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_two_ranks_interrupted_twice_end_with_the_same_bytes(recipe, tmp_path):
    on_ranks(2, _run, recipe, tmp_path / "whole")
    on_ranks(2, _run, recipe, tmp_path / "cut", 3)  # at an evaluation, between checkpoints
    assert not (tmp_path / "cut" / "adapter").exists()
    assert on_ranks(2, _run, recipe, tmp_path / "cut", 6, True) == [[], []]
    on_ranks(2, _run, recipe, tmp_path / "cut", None, True)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    verdict = audit(RunFolder(tmp_path / "cut").history.rows())
    assert verdict.sound and verdict.steps == 8 and verdict.done_again == 0
    assert [(a.resumed, a.last, a.end) for a in verdict.attempts] == [
        (None, 3, "interrupted"),
        (3, 6, "interrupted"),
        (6, 8, "finished"),
    ]


def _run_alone(world, *arguments):
    """A run that no launcher started, in a process that ends with the process group that it had."""
    del os.environ["MASTER_ADDR"], os.environ["RANK"]
    return _run(World(), *arguments)


KINDS = {
    "tied embedding trained in full": ("tied", {"adapter": {"modules_to_save": ("lm_head", "embed_tokens")}}),
    "dora and biases": ("untied", {"adapter": {"use_dora": True, "bias": "all"}}),
    "cpu offload": ("untied", {"distributed": {"cpu_offload": True}}),
    "lora+": ("untied", {"training": {"loraplus_lr_ratio": 4.0}}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [*((kind, 2) for kind in KINDS), ("cpu offload", 1)])
def test_every_kind_of_training_goes_on_with_the_same_bytes(recipe, bases, tmp_path, kind, size):
    base, tables = KINDS[kind]
    tables = {"model": {"base": str(bases / base)}, "training": {}, **tables}
    tables["training"] = {"max_steps": 3, **tables["training"]}
    tables["data"] = {"eval": ()}
    made = attrs.evolve(recipe, **{name: attrs.evolve(getattr(recipe, name), **keys) for name, keys in tables.items()})

    def go(name, *more):
        on_ranks(size, _run_alone if size == 1 else _run, made, name, *more)

    go(tmp_path / "whole")
    go(tmp_path / "cut", 1)
    assert not (tmp_path / "cut" / "adapter").exists()
    go(tmp_path / "cut", None, True)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_a_run_goes_on_with_another_number_of_ranks_and_is_told_what_begins_anew(recipe, tmp_path):
    on_ranks(2, _run, recipe, tmp_path / "run", 3)
    assert _run(World(), recipe, tmp_path / "run", 5, True)[-1] == (
        "step-00000003 was written by 2 processes, and this run has 1. The batches and their order are the same. "
        "The random numbers of dropout begin anew from seed, step and rank. Sums over processes are rounded "
        "in another order, so the run does not end with the same bytes"
    )
    warnings = on_ranks(3, _run, recipe, tmp_path / "run", None, True)
    assert "was written by 1 process, and this run has 3" in warnings[0][-1]
    verdict = audit(RunFolder(tmp_path / "run").history.rows())
    assert verdict.sound, verdict.problems
    assert [a.processes for a in verdict.attempts] == [2, 1, 3] and verdict.steps == 8
    assert {row["host"] for row in RunFolder(tmp_path / "run").history.rows() if row["event"] == "attempt"} == {
        socket.gethostname()
    }
    losses = [row["loss"] for row in RunFolder(tmp_path / "run").metrics.rows() if row["event"] == "step"]
    assert len(losses) == 8


def test_without_dropout_another_number_of_ranks_differs_by_rounding_alone(recipe, tmp_path):
    made = attrs.evolve(recipe, adapter=attrs.evolve(recipe.adapter, dropout=0.0))
    _run(World(), made, tmp_path / "whole")
    _run(World(), made, tmp_path / "run", 5)
    on_ranks(3, _run, made, tmp_path / "run", None, True)
    expected, found = load(adapter_bytes(tmp_path / "whole")), load(adapter_bytes(tmp_path / "run"))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() <= 1e-5, name


def test_the_adapter_is_whole_and_its_checkpoint_holds_the_same(recipe, tmp_path):
    made = attrs.evolve(recipe, training=attrs.evolve(recipe.training, max_steps=2))
    on_ranks(3, _run, made, tmp_path / "run")
    published = load(adapter_bytes(tmp_path / "run"))
    kept = load((tmp_path / "run" / "checkpoints" / "step-00000002" / ADAPTER).read_bytes())
    assert len(published) == len(kept) > 0
    assert sorted(map(_content, published.values())) == sorted(map(_content, kept.values()))


def _content(tensor):
    return tuple(tensor.shape), tensor.numpy().tobytes()
