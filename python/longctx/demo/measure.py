"""What one process does for one row: answer every prompt, then look inside."""

from __future__ import annotations

import copy
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama  # noqa: F401  (so that forked processes need not import it)

import longctx
from longctx.demo.probes import Coverage, exactness
from longctx.demo.process import Progress
from longctx.demo.rows import Row
from longctx.demo.task import ModelSpec, Trial
from longctx.integrations import transformers as adapter
from longctx.prefill import PerLayer, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 1024


@dataclass
class Answer:
    """One prompt, answered."""

    trial: Trial
    tokens: tuple[int, ...]
    prefill_seconds: float
    select_seconds: float
    density: float  # mean over layers; dense layers count as 1
    sparse_calls: int
    dense_calls: int
    unreached_layers: int
    sdpa_calls: int

    @property
    def right(self) -> bool:
        return self.tokens == self.trial.expected


@dataclass
class Measurement:
    """All that is known of one row."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    refused: str = ""  # why this method does not run on this model
    peak_bytes: int = 0
    cpu_seconds: float = 0.0  # of the whole process
    coverage_mean: float | None = None  # None: undefined for this method
    coverage_min: float | None = None
    relative_error: float | None = None  # of what attention wrote to the residual, against our dense
    exactness: dict[str, float] = field(default_factory=dict)  # check -> largest relative error of a layer


def measure(
    row: Row, spec: ModelSpec, trials: tuple[Trial, ...], check_length: int, reference: Path, progress: Progress
) -> Measurement:
    """Answers `trials` under the policy of `row`.

    Args:
        reference: file of what attention wrote under our dense attention; the row that `is_reference` writes it.
    """
    model = spec.load()
    result = Measurement(row.name)
    probe_trial = next((trial for trial in trials if trial.kind == "sweep" and trial.depth > 0.5), trials[-1])
    try:
        _put_on(model, row.policy_at(probe_trial.length))
    except NotImplementedError as error:
        result.refused = str(error)
        return result
    with torch.inference_mode(), counted_sdpa() as sdpa_calls:
        model(torch.tensor([probe_trial.prompt[:WARM_UP]]), logits_to_keep=1)
        for trial in trials:
            result.answers.append(answer(model, row.policy_at(trial.length), trial, sdpa_calls))
            progress(row.name)
        result.peak_bytes = peak_bytes()
        look_inside(model, row, probe_trial, check_length, reference, result)
        progress(row.name)
    result.cpu_seconds = time.process_time()
    return result


def answer(model: PreTrainedModel, policy: Policy | None, trial: Trial, sdpa_calls: list[int]) -> Answer:
    """The tokens that `generate()` finds most probable, and what the first forward took."""
    clock: list[float] = []
    policy = None if policy is None else clocked(policy, clock)
    _put_on(model, policy)
    sdpa_calls[0] = 0
    ids = torch.tensor([trial.prompt])
    with timed_forwards(model) as forwards:
        tokens = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=trial.max_new_tokens, do_sample=False
        )[0, ids.shape[1] :]
    layers = () if policy is None else adapter.stats(model).layers
    densities = [1.0 if layer.density is None else float(layer.density) for layer in layers]
    return Answer(
        trial=trial,
        tokens=tuple(tokens.tolist()),
        prefill_seconds=forwards[0],
        select_seconds=sum(clock),
        density=sum(densities) / len(densities) if densities else 1.0,
        sparse_calls=sum(layer.sparse_calls for layer in layers),
        dense_calls=sum(layer.dense_calls for layer in layers),
        unreached_layers=sum(layer.calls == 0 for layer in layers),
        sdpa_calls=sdpa_calls[0],
    )


def look_inside(
    model: PreTrainedModel, row: Row, trial: Trial, check_length: int, reference: Path, result: Measurement
) -> None:
    """Coverage, the error against dense, and exactness: untimed, after the peak was read."""
    policy = row.policy_at(trial.length)
    coverage = None if policy is None else Coverage.of(policy)
    _put_on(model, policy if coverage is None else coverage)
    written = attention_output(model, torch.tensor([trial.prompt]))
    if coverage is not None:
        result.coverage_mean, result.coverage_min = coverage.mean, coverage.minimum
    if row.is_reference:
        torch.save(written, reference)
        result.relative_error = 0.0
    elif reference.exists():
        dense = torch.load(reference).float()
        result.relative_error = float((written.float() - dense).norm() / dense.norm())
    if policy is not None:
        prompt = torch.tensor([trial.prompt[: check_length - 64] + trial.prompt[-64:]])
        result.exactness = exactness(model, policy, row.full, prompt)


def attention_output(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What all layers together added to the embeddings, `[1, seqlen, hidden]`."""
    states: dict[str, Tensor] = {}
    layers = model.get_decoder().layers

    def keep_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states["first"] = args[0] if args else kwargs["hidden_states"]

    def keep_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states["last"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        layers[0].register_forward_pre_hook(keep_first, with_kwargs=True),
        layers[-1].register_forward_hook(keep_last),
    ]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return states["last"] - states["first"]


def clocked(policy: Policy, clock: list[float]) -> Policy:
    """The same policy, whose `select` adds its seconds to `clock`."""
    if isinstance(policy, PerLayer):
        layers = {index: clocked(inner, clock) for index, inner in policy.layers.items()}
        return PerLayer(layers, default=clocked(policy.default, clock))
    base = type(policy)

    @functools.wraps(base.select)
    def select(self: Policy, *args: Any) -> Any:
        start = time.perf_counter()
        pattern = base.select(self, *args)
        clock.append(time.perf_counter() - start)
        return pattern

    twin = copy.copy(policy)
    object.__setattr__(twin, "__class__", type(base.__name__, (base,), {"select": select}))
    return twin


@contextmanager
def counted_sdpa() -> Iterator[list[int]]:
    """Counts the calls of PyTorch's own attention, which must be none while ours runs."""
    original: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
    calls = [0]

    @functools.wraps(original)
    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return original(*args, **kwargs)

    nn.functional.scaled_dot_product_attention = counting
    try:
        yield calls
    finally:
        nn.functional.scaled_dot_product_attention = original


@contextmanager
def timed_forwards(model: nn.Module) -> Iterator[list[float]]:
    """Seconds of each forward of `model`: the first of a `generate()` is the prefill."""
    seconds: list[float] = []
    starts: list[float] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts.pop())),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _put_on(model: PreTrainedModel, policy: Policy | None) -> None:
    if policy is None:
        model.set_attn_implementation("sdpa")
    else:
        longctx.apply(model, policy)
