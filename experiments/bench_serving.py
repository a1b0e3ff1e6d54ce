"""Races our serving engine against a peer on the same exported weights, and says where a step's time goes.

Usage:
    python -m experiments.bench_serving                                                # ours alone
    python -m experiments.bench_serving --peer transformers --peer-python OTHER/bin/python --out FOLDER
    python -m experiments.bench_serving --peer vllm --peer-python OTHER/bin/python --layers 2 --requests 8
    python -m experiments.bench_serving --profile --requests 64                         # no race: host and device time

OLMoE-shaped random weights are exported once, in bfloat16, as a Hugging Face folder that every contender loads. All
requests are there from the start, of equal length, decoded greedily past the end of the text; prompts are new in each
run. A contender runs in a process of its own (the peer's Python needs nothing of ours) on --threads cores. Each of its
settings is tried with few tokens, the fastest one races: `transformers` with its implementations of experts and caches,
in bfloat16 and float32, on a GPU also its continuous batching. Contenders take turns, the order reversed each time.

A ratio is of output tokens a second, the median over the repeats of ours over the peer's run beside it; on a machine
that others use too, processor seconds say more, and are in the report beside the load at the time.

FOLDER receives report.md and results.json. Results worth keeping are committed under experiments/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.serving_bench.line_protocol import ContenderFailed, ContenderProcess
from experiments.serving_bench.race import Contender, Workload, describe, find_best_setting, race

PEERS = {"transformers": "peer_transformers", "vllm": "peer_vllm"}
_SETTING_SECONDS = 900.0
"""A setting that takes longer in its trial is given up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after an error, which is one line on stderr."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    command = shlex.join(["python", "-m", "experiments.bench_serving", *given])
    try:
        if arguments.peer and not arguments.peer_python:
            raise ContenderFailed(f"--peer {arguments.peer} needs --peer-python: the Python that has it")
        folder = _export(arguments)
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = _profile(arguments, folder) if arguments.profile else _race(arguments, folder)
    except (ContenderFailed, ValueError, OSError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    found = {"command": command, "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), **found}
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = profile_markdown(found) if arguments.profile else race_markdown(found)
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_serving"), help="default: runs/bench_serving")
    parser.add_argument(
        "--weights", type=Path, default=Path("runs/bench_serving_weights"), help="where models are kept"
    )
    for name, default, text in (
        ("layers", 4, "of the model"),
        ("width", 1024, "of the model; experts are half as wide"),
        ("experts", 64, "of each layer"),
        ("top-k", 8, "experts of a token"),
        ("head-dim", 64, "size of a head"),
        ("vocab", 50_304, "tokens of the vocabulary"),
        ("requests", 32, "at the same time"),
        ("prompt-tokens", 256, "of each request"),
        ("output-tokens", 128, "of each request"),
        ("repeats", 3, "runs of each contender that count"),
        ("trial-tokens", 48, "output tokens while settings are tried"),
        ("threads", 2, "cores of a contender; 0 is all"),
        ("prefill-tokens", 2048, "of our engine"),
        ("decode-steps", 8, "of our engine"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    parser.add_argument("--peer", choices=sorted(PEERS), help="whom to race")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has the peer")
    parser.add_argument("--peer-dtypes", nargs="+", default=["bfloat16", "float32"], metavar="DTYPE")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], metavar="DTYPE", help="of ours; default: bfloat16")
    parser.add_argument("--profile", action="store_true", help="where our steps' time goes, in place of a race")
    return parser


def _export(arguments: argparse.Namespace) -> Path:
    """The model's folder; made in a process of its own, so that JAX holds no memory here."""
    names = ("layers", "width", "experts", "top_k", "head_dim", "vocab")
    shape = {name: getattr(arguments, name) for name in names}
    command = [sys.executable, "-m", "experiments.serving_bench.weights", str(arguments.weights), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ContenderFailed(f"the weights cannot be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


def _options(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder.absolute()),
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "threads": arguments.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2,
    }


def _engine(arguments: argparse.Namespace) -> dict[str, int]:
    return {"prefill_tokens": arguments.prefill_tokens, "decode_steps": arguments.decode_steps}


def _race(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    workload = Workload(arguments.requests, arguments.prompt_tokens, arguments.output_tokens, arguments.vocab)
    options = _options(arguments, folder)
    ours = {"dtypes": arguments.dtypes, "engine": _engine(arguments)}
    # Two engines on one GPU: none may take all of its memory.
    starts: list[tuple[str, str, str, dict[str, Any], dict[str, str]]] = [
        ("foejax", "ours", sys.executable, ours, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    ]
    if arguments.peer:
        peer = {"dtypes": arguments.peer_dtypes}
        starts.append((arguments.peer, PEERS[arguments.peer], arguments.peer_python, peer, {}))
    with contextlib.ExitStack() as stack:
        contenders = []
        for name, module, python, own, environment in starts:
            process = ContenderProcess(
                module, python, options | own, threads=arguments.threads, environment=environment
            )
            contenders.append(Contender(name, stack.enter_context(process)))
        for contender in contenders:
            find_best_setting(contender, workload, arguments.trial_tokens, _SETTING_SECONDS, _say)
        race(contenders, workload, arguments.repeats, lambda: os.getloadavg()[0], _say)
    figures = [_summary(contender, contenders[-1]) for contender in contenders]
    return {"workload": vars(workload), "model": folder.name, "contenders": figures}


def _summary(contender: Contender, other: Contender) -> dict[str, Any]:
    """A contender's figures, with the ratio of the first one's runs over those of the last one beside them."""
    rates = [run["output_tokens"] / run["seconds"] for run in contender.runs]
    ratios = {
        name: statistics.median(b[name] / a[name] for a, b in zip(contender.runs, other.runs, strict=True))
        for name in ("seconds", "cpu_seconds")
    }
    return {
        "name": contender.name,
        "facts": contender.facts,
        "setting": contender.setting,
        "trials": contender.trials,
        "runs": contender.runs,
        "tokens_per_second": statistics.median(rates),
        "speed_over_peer": ratios["seconds"],
        "cpu_speed_over_peer": ratios["cpu_seconds"],
    }


def _profile(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from foejax.devices import avoid_broken_reductions

    avoid_broken_reductions()
    from experiments.serving_bench.ours import make_llm
    from experiments.serving_bench.step_profile import profile_steps

    workload = Workload(arguments.requests, arguments.prompt_tokens, arguments.output_tokens, arguments.vocab)
    llm = make_llm(_options(arguments, folder) | {"engine": _engine(arguments)}, arguments.dtypes[0])
    found = profile_steps(llm, workload.prompts(0), arguments.output_tokens)
    return {"workload": vars(workload), "model": folder.name, "dtype": arguments.dtypes[0], "profile": found}


def race_markdown(found: Mapping[str, Any]) -> str:
    """report.md of a race."""
    lines = ["# Serving bench", "", *_facts(found)]
    for contender in found["contenders"]:
        facts = ", ".join(f"{name} {value}" for name, value in contender["facts"].items())
        lines.append(f"- {contender['name']}: {facts}; {describe(contender['setting'])}")
    lines += ["", "| contender | output tokens/s | runs (tokens/s @ load) | ours over it | by processor time |"]
    lines += ["| --- | ---: | --- | ---: | ---: |"]
    ours = found["contenders"][0]
    for contender in found["contenders"]:
        runs = " ".join(f"{run['output_tokens'] / run['seconds']:.1f}@{run['load']:.1f}" for run in contender["runs"])
        ratios = ("1.00", "1.00")
        if contender is not ours:
            ratios = f"{ours['speed_over_peer']:.2f}", f"{ours['cpu_speed_over_peer']:.2f}"
        lines.append(f"| {contender['name']} | {contender['tokens_per_second']:.1f} | {runs} | {' | '.join(ratios)} |")
    lines += ["", "## Settings tried", "", "| contender | setting | tokens/s, extrapolated |", "| --- | --- | ---: |"]
    for contender in found["contenders"]:
        for trial in contender["trials"]:
            rate = trial["tokens_per_second"]
            figure = trial["reason"] or ("the only one" if rate is None else f"{rate:.1f}")
            lines.append(f"| {contender['name']} | {describe(trial['setting'])} | {figure} |")
    return "\n".join(lines) + "\n"


def profile_markdown(found: Mapping[str, Any]) -> str:
    """report.md of a profile."""
    profile = found["profile"]
    lines = ["# Where a step's time goes", "", *_facts(found), f"- compute dtype: {found['dtype']}", ""]
    lines += [
        f"Of the {profile['seconds']:.1f} s of {profile['steps']} steps the device had nothing to do for "
        f"{profile['host_share']:.2%}: host time that is not hidden.",
    ]
    for kind, own in profile["kinds"].items():
        lines += ["", f"## {kind}: {own['steps']} steps of {own['seconds'] * 1e3:.1f} ms", ""]
        lines += ["| host phase | share of the step |", "| --- | ---: |"]
        lines += [f"| {name} | {share:.2%} |" for name, share in own["phases"].items()]
        lines += [f"| host time not hidden (all but launch and wait) | {own['host_share']:.2%} |"]
        lines += ["", "| part of the program | share of its device time |", "| --- | ---: |"]
        lines += [f"| {part} | {share:.1%} |" for part, share in own["parts"].items()]
        lines += ["", "| largest operations | scope | share |", "| --- | --- | ---: |"]
        lines += [f"| `{name}` | {scope} | {share:.1%} |" for name, scope, share in own["operations"]]
    return "\n".join(lines) + "\n"


def _facts(found: Mapping[str, Any]) -> list[str]:
    workload = found["workload"]
    return [
        f"- Machine: {found['cpu']}, {found['cores']} cores",
        f"- Model: {found['model']}",
        f"- Requests: {workload['requests']}, {workload['prompt_tokens']} tokens in, {workload['output_tokens']} out",
        f"- Command: `{found['command']}`",
    ]


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
