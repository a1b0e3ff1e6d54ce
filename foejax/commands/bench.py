"""`foejax bench serve` and `foejax bench forward`: engines under load, and forward passes."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foejax.commands.engine_options import engine_config_of
from foejax.config import ConfigError

if TYPE_CHECKING:
    from foejax.models import LanguageModel
    from foejax.serving.load.latency import RequestRecord
    from foejax.serving.load.trace import Trace

_VOCABULARY_OF_A_SERVER = 1000
"""Random prompts for a server hold ids below it: every tokenizer has as many."""
_API_KEY = "OPENAI_API_KEY"


def run_bench_serve(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the traces against every model or server, one after the other, and write the report."""
    if bool(options.folders) == bool(options.url) or len(options.url) != len(options.model):
        raise ConfigError("name either one or several model folders, or --url URL --model NAME, each once a server")
    from foejax.serving.load.latency import Limits
    from foejax.serving.load.machine import machine_facts
    from foejax.serving.load.report import latency_table, write_load_report

    traces = _make_traces(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for trace in traces:
        trace.save(out / f"trace-{trace.interarrival:g}.jsonl")
    limits = Limits(*(float("inf") if value is None else value for value in (options.ttft_limit, options.tbt_limit)))
    runs: list[Any] = []
    names = [*_names(options.folders), *options.model]
    for index, name in enumerate(names):
        found = _run_model(options, index, traces) if options.folders else _run_server(options, index, traces)
        runs += _summarised(name, traces, found, limits)
    runs.sort(key=lambda run: [trace.interarrival for trace in traces].index(run.interarrival))
    write_load_report(out, runs, machine_facts(shlex.join(["foejax", *sys.argv[1:]])) | _facts(traces), limits)
    print(latency_table(runs))
    print(f"report: {out / 'report.md'}")


def run_bench_forward(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Race the forward passes of every model in every layout, and write the report."""
    from foejax.serving.load.forward import ForwardShape, race_forwards, shapes_by_length, shapes_by_tokens
    from foejax.serving.load.forward_report import ForwardReport
    from foejax.serving.load.machine import machine_facts

    models, left_out = _models_by_layout(options)
    baseline = next((name for name, model in models.items() if model.config.num_groups > 1), next(iter(models)))

    def show(shape: ForwardShape, seconds: dict[str, float]) -> None:
        ratios = ", ".join(f"{name} {value / seconds[baseline]:.2f}" for name, value in seconds.items())
        print(f"{shape.sequences:,} x {shape.length:,} tokens: {ratios}", flush=True)

    fixed = min(options.tokens, options.max_tokens)
    by_tokens, by_length = (
        race_forwards(models, shapes, turns=options.turns, on_done=show)
        for shapes in (shapes_by_tokens(options.max_tokens), shapes_by_length(fixed))
    )
    facts = machine_facts(shlex.join(["foejax", *sys.argv[1:]]))
    ForwardReport(baseline, by_tokens, by_length, facts, left_out).write(Path(options.out))
    print(f"report: {Path(options.out) / 'report.md'}")


def _make_traces(options: argparse.Namespace) -> list[Trace]:
    """The traces given, or one for each mean inter-arrival time."""
    from foejax.api import read_folder_config
    from foejax.serving.load.trace import Lengths, Trace, make_trace, read_prompts

    if options.trace:
        traces = [Trace.read(Path(path)) for path in options.trace]
    else:
        # Of several models the smallest vocabulary: all of them get the same prompts.
        sizes = [read_folder_config(Path(folder)).model.vocab_size for folder in options.folders]
        prompts = read_prompts(Path(options.prompts)) if options.prompts else Lengths.parse(options.prompt_tokens)
        output = Lengths.parse(options.output_tokens)
        vocab_size = options.vocab_size or min(sizes, default=_VOCABULARY_OF_A_SERVER)
        traces = [
            make_trace(options.requests, scale, output, seed=options.seed, prompt=prompts, vocab_size=vocab_size)
            for scale in options.interarrival
        ]
    scales = [trace.interarrival for trace in traces]
    if len(set(scales)) < len(scales):
        raise ConfigError(f"mean inter-arrival times {scales} hold one twice: a report tells traces apart by them")
    return traces


def _run_model(options: argparse.Namespace, index: int, traces: Sequence[Trace]) -> list[list[RequestRecord]]:
    """The traces on an engine over one folder, each on an empty cache."""
    from foejax.api import load
    from foejax.serving.llm import LLM
    from foejax.serving.load.in_process import run_in_process
    from foejax.serving.load.trace import LoadError
    from foejax.serving.sampling_params import SamplingParams

    config = engine_config_of(options)
    loaded = load(options.folders[index], devices=options.devices or 0, dtype=options.dtype)
    if loaded.tokenizer is None and any(
        isinstance(request.prompt, str) for trace in traces for request in trace.requests
    ):
        raise LoadError(f"{options.folders[index]} has no tokenizer and the prompts are texts: give them as token ids")
    llm = LLM(loaded, config)
    del loaded
    llm.generate([[0]], SamplingParams(max_tokens=2 * options.decode_steps, temperature=0, ignore_eos=True))
    found = []
    for trace in traces:
        engine = llm.make_engine()
        found.append(run_in_process(engine, trace, encode=llm.encode, timeout=options.timeout))
    del llm, engine
    gc.collect()  # the next model gets the memory
    return found


def _run_server(options: argparse.Namespace, index: int, traces: Sequence[Trace]) -> list[list[RequestRecord]]:
    from foejax.serving.load.over_http import Server, run_over_http

    key = os.environ.get(_API_KEY, "")
    server = Server(options.url[index], options.model[index], key, options.timeout)
    return [run_over_http(server, trace) for trace in traces]


def _summarised(name: str, traces: Sequence[Trace], found: Sequence[list[RequestRecord]], limits: Any) -> list[Any]:
    from foejax.serving.load.latency import summarise
    from foejax.serving.load.report import LoadRun

    runs = []
    for trace, records in zip(traces, found, strict=True):
        summary = summarise(records, limits)
        print(
            f"{name}, one request every {trace.interarrival:g} s: {summary.completed} of {summary.requests} completed, "
            f"{summary.output_tokens_per_second:.1f} tokens/s",
            file=sys.stderr,
        )
        runs.append(LoadRun(name, trace.interarrival, records, summary))
    return runs


def _facts(traces: Sequence[Trace]) -> dict[str, Any]:
    wanted = [request.output_tokens for request in traces[0].requests]
    return {
        "requests": len(wanted),
        "output tokens": f"{min(wanted)} to {max(wanted)}, {sum(wanted) / len(wanted):.0f} on average",
        "seed": traces[0].seed,
    }


def _names(folders: Sequence[str]) -> list[str]:
    """Short names that tell folders apart."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


def _models_by_layout(options: argparse.Namespace) -> tuple[dict[str, LanguageModel], dict[str, str]]:
    """Every model in every layout that fits the devices, by name, and why the others do not fit."""
    import jax

    models: dict[str, LanguageModel] = {}
    left_out: dict[str, str] = {}
    for source, name in zip(options.sources, _names(options.sources), strict=True):
        for layout, model in _load_by_layout(source, options.devices or len(jax.devices())):
            label = name if layout == "foe" else f"{name} {layout}"
            if isinstance(model, str):
                left_out[label] = model
            else:
                models[label] = model
    if not models:
        raise ConfigError(next(iter(left_out.values())))
    return models, left_out


def _load_by_layout(source: str, devices: int) -> list[tuple[str, LanguageModel | str]]:
    """The model of a folder or a config in each layout; in place of a model the reason why it does not fit."""
    from foejax.api import build, load, read_folder_config
    from foejax.config import load_config, override_config

    is_folder = Path(source).is_dir()
    config = read_folder_config(Path(source)) if is_folder else load_config(source)
    kinds = ["ep", "tp_ep", "tp", "fsdp"] if devices > 1 else ["fsdp"]
    if config.model.num_groups > 1:
        kinds = ["foe"]
    elif config.model.num_ffn_heads:
        kinds = ["hp", "fsdp"] if devices > 1 else ["hp"]
    found: list[tuple[str, LanguageModel | str]] = []
    for kind in kinds:
        mesh = {"mesh.layout": kind, "mesh.devices": devices, "mesh.data": 0, "mesh.group": 0, "mesh.expert": 0}
        shown = {"fsdp": "data"}.get(kind, kind)  # nothing is sharded for inference: plain data parallelism
        try:
            if is_folder:
                model = load(source, devices=devices, overrides={"mesh.layout": kind}).model
            else:
                model = build(override_config(config, mesh))
        except ConfigError as error:
            found.append((shown, str(error)))
        else:
            found.append((shown, model.for_inference()))
    return found
