"""The engine for notebooks and scripts: prompts in, continuations out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import Progress

from foejax.config import ConfigError
from foejax.models import LanguageModel
from foejax.serving.engine import Engine, Piece
from foejax.serving.engine_config import EngineConfig
from foejax.serving.processes import Follower, Leader, join_processes
from foejax.serving.runner import ModelRunner
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.scheduler import Scheduler
from foejax.serving.scoring import PromptScorer
from foejax.serving.sequence import FinishReason
from foejax.serving.token_logprobs import TokenLogprobs
from sharding import hosts

if TYPE_CHECKING:
    from foejax.api import LoadedModel

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
"""A text, read as the beginning of a document, or token ids as they are."""


@dataclass
class Continuation:
    """One continuation of a prompt.

    Attributes:
      text: "" where the model has no tokenizer.
      tokens: the stop token included.
      logprobs: of every token, where asked for.
      finish_reason: why it ended.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None

    def extend(self, piece: Piece) -> None:
        """Append what a step added."""
        self.text += piece.text
        self.tokens.extend(piece.tokens)
        if piece.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *piece.logprobs]
        self.finish_reason = piece.finish_reason


@dataclass
class Completion:
    """A prompt and its `n` continuations.

    Attributes:
      prompt_tokens: token ids.
      prompt_logprobs: of the prompt's tokens from the second one on, where asked for.
    """

    prompt_tokens: list[int]
    continuations: list[Continuation]
    prompt_logprobs: list[TokenLogprobs] | None = None

    def extend(self, piece: Piece) -> None:
        """Append what a step added."""
        if piece.prompt_logprobs is not None:
            self.prompt_logprobs = list(piece.prompt_logprobs)
        else:
            self.continuations[piece.index].extend(piece)

    @property
    def text(self) -> str:
        """Text of the first continuation."""
        return self.continuations[0].text


class LLM:
    """A model ready to continue many prompts at once.

    Example:
        llm = LLM("runs/first")
        for completion in llm.generate(["To be", "or not"], SamplingParams(max_tokens=40, temperature=0)):
            print(completion.text)

    Attributes:
      engine: takes requests; of several processes, that of process 0 alone.
      part: what this process does in a run of several; None for one that is alone.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        config: EngineConfig | None = None,
        *,
        devices: int = 0,
        dtype: str | None = None,
        progress: bool = True,
    ) -> None:
        """Load a model and compile every program it will need.

        Args:
          model: a run folder, an exported folder, or what `foejax.load` returned.
          devices: how many to use; 0 takes all there are. For a loaded model its own.
          dtype: compute dtype in place of the model's own. For a loaded model its own.
          progress: show a bar while compiling.

        Raises:
          ConfigError: no model there, or sizes that do not fit it.
        """
        if isinstance(model, (str, Path)):
            from foejax.api import load

            model = load(model, devices=devices, dtype=dtype)
        config = config or EngineConfig()
        language_model, self.tokenizer = model.model.for_inference(), model.tokenizer
        del model  # what was loaded here makes room for the cache
        layout = language_model.layout
        _check_same_everywhere(language_model, config)
        self.context = config.context_of(language_model.config)
        self.limits = config.limits(language_model.config, layout)
        self.runner = ModelRunner(
            language_model,
            self.limits,
            context=self.context,
            expert_budget=config.expert_budget_of(language_model.config, layout),
            report_experts=config.report_experts,
        )
        self.scorer = PromptScorer(language_model, context=self.context) if config.score_prompts else None
        self.vocab_size = language_model.config.vocab_size
        _compile(self.runner, self.scorer, progress and jax.process_index() == 0)
        self.part = join_processes(self.runner, self.scorer)
        self.engine = self.make_engine()

    def make_engine(self) -> Engine:
        """A fresh engine over the compiled model; it must be the only one in use."""
        tokenizer = self.tokenizer
        return Engine(
            self.part or self.runner,
            Scheduler(self.limits),
            context=self.context,
            vocab_size=self.vocab_size,
            eos_id=tokenizer.eos_id if tokenizer else None,
            decode=tokenizer.decode if tokenizer else None,
            scorer=self.scorer and (self.part or self.scorer),
        )

    def follow(self) -> None:
        """Compute what the engine of process 0 does until `release` is called there; for the other processes.

        Raises:
          ConnectionError: process 0 has gone.
        """
        if not isinstance(self.part, Follower):
            raise ValueError(f"process {jax.process_index()} of {jax.process_count()} follows nobody: the others do")
        self.part.follow()

    def release(self) -> None:
        """Let the others, where there are any, return from `follow`; for process 0."""
        if isinstance(self.part, Leader):
            self.part.release()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
          ValueError: a text, and the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give prompts as token ids")
        return self.tokenizer.encode(prompt, start_of_document=True)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue prompts; results in their order.

        Of several processes all call this together, with the same arguments, and get the same results.

        Args:
          params: for all, or one for each.

        Raises:
          PromptError, SamplingParamsError, ValueError: a prompt or parameter that does not fit; nothing is generated.
        """
        listed = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise ValueError(f"{len(each)} params for {len(listed)} prompts: give one for each, or one for all")
        completions = [
            Completion(self.encode(prompt), [Continuation() for _ in range(own.n)])
            for prompt, own in zip(listed, each, strict=True)
        ]
        for completion, own in zip(completions, each, strict=True):
            self.engine.check(completion.prompt_tokens, own)
        if isinstance(self.part, Follower):
            return _read_completions(self.part.follow())
        self._run(completions, each)
        if isinstance(self.part, Leader):
            self.part.release([asdict(completion) for completion in completions])
        return completions

    def _run(self, completions: Sequence[Completion], params: Sequence[SamplingParams]) -> None:
        """Let the engine fill in the continuations."""
        added: list[str] = []
        try:
            for index, (completion, own) in enumerate(zip(completions, params, strict=True)):
                self.engine.add(str(index), completion.prompt_tokens, own)
                added.append(str(index))
            while self.engine.num_unfinished:
                for piece in self.engine.step():
                    completions[int(piece.request_id)].extend(piece)
        except BaseException:  # an interrupt too leaves an engine that can go on
            for request_id in added:
                self.engine.abort(request_id)
            self.engine.step()
            with contextlib.suppress(RuntimeError):  # the error has left the processes apart
                self.release()
            raise


def _read_completions(found: Any) -> list[Completion]:
    """What process 0 made of the prompts."""
    if found is None:
        raise RuntimeError("process 0 has ended `generate` early: see its output")
    return TypeAdapter(list[Completion]).validate_python(found)


def _check_same_everywhere(model: LanguageModel, config: EngineConfig) -> None:
    """
    Raises:
      ConfigError: processes were given different models or sizes; names them.
    """
    if jax.process_count() == 1:
        return
    text = repr((model.config, model.layout.kind, model.layout.sizes, config))
    if others := hosts.processes_that_differ(text):
        raise ConfigError(
            f"model, mesh or engine sizes of process {', '.join(map(str, others))} differ from those of process 0: "
            "start all processes with the same command"
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or token ids, as a list of one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _compile(runner: ModelRunner, scorer: PromptScorer | None, progress: bool) -> None:
    programs = runner.num_programs + (scorer is not None)
    with Progress(disable=not progress, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=programs)
        for name in runner.compile():
            bar.update(task, advance=1, description=f"compiled {name}")
        if scorer is not None:
            scorer.compile()
    logger.info("compiled %d programs; no more are needed", programs)
