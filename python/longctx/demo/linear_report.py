"""The tables of `longctx demo --linear`."""

from __future__ import annotations

import torch

from longctx.demo.linear_measure import DENSE, HEAD_DIM, HEADS, LINEAR, SDPA, Result
from longctx.demo.report import plain_table

NOTES = [
    "What this shows: a model of linear attention trains with the gradients of longctx, in linear time, and generates",
    "from a state of fixed size. What it does not: that this is as good as softmax. A state of fixed size forgets: do",
    "not expect it to find one needle in a long text.",
]


def lines(result: Result) -> list[str]:
    training = result.training
    bits = ["bits a character", *(f"{bits:.2f}" for bits in training.held_out)]
    rates = {(timing.name, timing.length): timing.rate for timing in result.timings}
    lengths = [timing.length for timing in result.of(LINEAR)]
    return [
        f"text    {result.source}, {result.num_characters} characters",
        f"model   TransNormerLM, 3 layers, {training.num_parameters} parameters, {torch.get_num_threads()} threads",
        "",
        f"Training: {training.steps[-1]} steps in {training.seconds:.0f} s; unseen text",
        *plain_table(["step", *map(str, training.steps)], [bits]),
        "",
        "It says:",
        *(f"    {line}".rstrip() for line in training.sample.splitlines()),
        "",
        "Streaming with it: one text, one cache",
        *plain_table(
            ["characters before", "prefill [s]", "a character [ms]", "cache [KiB]", "peak [MB]", "bits a character"],
            [
                [
                    str(position.position),
                    f"{position.prefill_seconds:.2f}",
                    f"{position.token_seconds * 1e3:.2f}",
                    f"{position.state_bytes / 1024:.0f}",
                    f"{position.peak_bytes / 1e6:.0f}",
                    f"{position.bits:.2f}",
                ]
                for position in result.positions
            ],
        ),
        "",
        f"Attention alone, causal, {HEADS} heads of {HEAD_DIM}, {result.dtype}: thousand tokens a second",
        *plain_table(
            ["tokens", *map(str, lengths)],
            [
                [name, *(f"{rates[name, n] / 1e3:.0f}" if (name, n) in rates else "-" for n in lengths)]
                for name in (LINEAR, DENSE, SDPA)
            ],
        ),
        "",
    ]
