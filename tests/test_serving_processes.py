"""The engine over two processes: what requests get, and how it ends."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import serving_scenario
from process_runs import run_processes
from server_fakes import CONTEXT, LIMITS, FakeScorer
from serving_fakes import END, VOCABULARY, FakeDevices
from serving_scenario import make_llm, see
from tiny import tiny_config

from foejax.config import ConfigError
from foejax.serving import engine_config
from foejax.serving import llm as llm_module
from foejax.serving.engine import Engine
from foejax.serving.engine_config import EngineConfig
from foejax.serving.processes import Follower, Leader
from foejax.serving.runner import StepResult
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.scheduler import Scheduler
from foejax.serving.step_plan import StepPlan
from sharding import LayoutKind, hosts
from sharding.broadcast import Receiver, Sender
from sharding.mesh import MeshSizes
from sharding.roll_call import listen


def assert_same(found: Any, expected: Any) -> None:
    """Equal, floats up to the order of additions."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list) and expected and not isinstance(expected[0], float):
        assert len(found) == len(expected)
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted)
    elif isinstance(expected, list | float):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected


def check_scenario(kind: LayoutKind, num_layers: int, sizes: dict[str, int], devices: int, folder: Path) -> Any:
    """Two processes of some devices each see what this one sees, which is returned."""
    program = Path(serving_scenario.__file__).read_text(encoding="utf-8")
    arguments = [kind, str(num_layers), json.dumps(sizes), str(folder)]
    for ended in run_processes(program, arguments, 2, devices):
        assert ended.code == 0, ended.output
    first, second = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    expected = json.loads(json.dumps(see(make_llm(kind, num_layers, sizes))))
    assert first.pop("others") == second.pop("others") == [1]
    assert_same(first, expected)
    assert second == {"completions": first["completions"], "races": []}
    assert expected["races"] == [] and expected["held_share"] == 0
    assert len(expected["tokens"]["a"]) == 8 and len(expected["tokens"]["b"]) < 12 and expected["tokens"]["c"]
    return expected


def test_requests_over_two_processes_get_what_one_process_gives(tmp_path: Path) -> None:
    """Greedy and drawn, in chunks, with shared prefixes, preempted, scored and aborted; results cross processes."""
    seen = check_scenario("foe", 1, {"data": 2, "group": 2}, 2, tmp_path)
    assert seen["num_preemptions"] > 0 and seen["num_prefix_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "devices"),
    [
        ("foe", {"data": 1, "group": 8}, 4),
        ("foe", {"data": 2, "group": 2, "expert": 2}, 4),
        ("ep", {"data": 1, "expert": 4}, 2),
        ("tp", {"data": 1, "group": 4}, 2),
        ("tp_ep", {"data": 2, "group": 4}, 4),
    ],
)
def test_other_layouts_over_two_processes(
    kind: LayoutKind, sizes: dict[str, int], devices: int, tmp_path: Path
) -> None:
    check_scenario(kind, 2, sizes, devices, tmp_path)


# What the processes have to agree on


def test_processes_with_other_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process compiles what its own sizes ask for; programs that differ would wait for each other."""
    texts: list[str] = []

    def differ(text: str) -> list[int]:
        texts.append(text)
        return [1] if len(set(texts)) > 1 else []

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "processes_that_differ", differ)
    model = SimpleNamespace(config=tiny_config(), layout=SimpleNamespace(kind="foe", sizes=MeshSizes(1, 2, 1)))
    for _ in range(2):
        llm_module._check_same_everywhere(model, EngineConfig(max_sequences=8))
    with pytest.raises(
        ConfigError, match="engine sizes of process 1 differ .* start all processes with the same command"
    ):
        llm_module._check_same_everywhere(model, EngineConfig(max_sequences=9))


def test_the_cache_takes_what_the_fullest_gpu_has_left() -> None:
    def gpu(free: int) -> SimpleNamespace:
        return SimpleNamespace(
            platform="gpu", memory_stats=lambda: {"bytes_limit": 80 << 30, "bytes_in_use": (80 << 30) - free}
        )

    own = [gpu(20 << 30), gpu(10 << 30), gpu(30 << 30)]
    mesh = SimpleNamespace(local_devices=own, devices=np.array(own))
    assert engine_config._memory_for_cache(SimpleNamespace(mesh=mesh)) == 8 << 30


# Who leads and who follows, on fake devices


class FakeRunner:
    """Fake devices, and an error when one is wanted."""

    def __init__(self) -> None:
        self.devices, self.failure = FakeDevices(LIMITS.block_size), None

    def run(self, plan: StepPlan) -> StepResult:
        if self.failure is not None:
            raise self.failure
        return StepResult(self.devices.run(plan), None)


@pytest.fixture
def ends() -> tuple[Sender, Receiver]:
    listener = listen("127.0.0.1:0")
    receiver = Receiver(f"127.0.0.1:{listener.getsockname()[1]}", 1, 0, 10.0)
    return Sender(listener, 2, 0, 10.0), receiver


def make_engine(leader: Leader) -> Engine:
    scheduler = Scheduler(replace(LIMITS, num_blocks=30))
    return Engine(leader, scheduler, context=CONTEXT, vocab_size=VOCABULARY, eos_id=END, scorer=leader)


def test_a_follower_comes_to_the_same_state(ends: tuple[Sender, Receiver]) -> None:
    runners = FakeRunner(), FakeRunner()
    leader, follower = (
        part(end, runner, FakeScorer()) for part, end, runner in zip((Leader, Follower), ends, runners, strict=True)
    )
    engine, random = make_engine(leader), np.random.default_rng(0)
    with ThreadPoolExecutor() as pool:
        followed = pool.submit(follower.follow)
        for number in range(30):
            prompt = random.integers(0, VOCABULARY, random.integers(1, 60)).tolist()
            scored = None if number % 7 else 2
            engine.add(str(number), prompt, SamplingParams(max_tokens=20, ignore_eos=True, prompt_logprobs=scored))
            engine.step()
            if number % 5 == 4:
                engine.abort(str(number - 2))
        while engine.num_unfinished:
            engine.step()
        leader.release({"all": ["done", 0.1]})
        assert followed.result() == {"all": ["done", 0.1]}
    assert engine.scheduler.num_preemptions > 0
    assert vars(runners[0].devices) == vars(runners[1].devices)
    with pytest.raises(RuntimeError, match="give requests to the engine of process 0"):
        follower.run(None)


def test_after_an_error_processes_do_not_go_on_apart(ends: tuple[Sender, Receiver]) -> None:
    """The others may have carried out a plan that this one has not."""
    runner = FakeRunner()
    leader = Leader(ends[0], runner, None)
    engine, runner.failure = make_engine(leader), KeyboardInterrupt()
    engine.add("a", [1], SamplingParams(max_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    runner.failure = None
    for call in (engine.step, leader.release):
        with pytest.raises(RuntimeError, match="end all of them and start them anew"):
            call()
