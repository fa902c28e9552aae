"""The order of events of `longctx demo --decode`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time

import torch

import longctx
from longctx.demo.checks import Check
from longctx.demo.decode_checks import all_checks
from longctx.demo.decode_measure import Decoded, DecodeTask, Question, decode, prefill
from longctx.demo.decode_report import NOTES, draw, lines
from longctx.demo.decode_rows import ROWS
from longctx.demo.main import fast_bfloat16
from longctx.demo.report import progress_bar
from longctx.demo.task import ModelSpec
from longctx.demo.text import UNKNOWN, Haystack, Needle, tokenizer
from longctx.models.constructed import MAX_VOCAB

# Of the demo of sparse prefill alone.
ELSEWHERE = ("needle", "model", "prompt", "show_answers")
DEPTHS = (0.05, 0.25, 0.45, 0.65, 0.85, 0.999)  # the last one inside the control's window


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 if every check holds."""
    for name in ELSEWHERE:
        if getattr(args, name):
            raise ValueError(f"longctx demo: --decode does not take --{name.replace('_', '-')}")
    start = time.perf_counter()
    task = make_task(args)
    model = task.model.load()
    results = []
    with torch.inference_mode(), progress_bar(len(ROWS) + 1) as progress:
        longctx.apply(model, "dense")
        began = time.perf_counter()
        pasts = prefill(model, task.context)
        prefill_seconds = time.perf_counter() - began
        progress("prefill")
        for row in ROWS:
            results.append(decode(model, row, task, pasts))
            progress(row.name)
    checks = all_checks(task, list(ROWS), results)
    told = [*lines(task, results, prefill_seconds)]
    told += [f"{'ok  ' if c.passed else 'FAIL'}  {c.claim}{': ' if c.detail else ''}{c.detail}" for c in checks]
    told += ["", *NOTES]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode.txt").write_text("\n".join(told) + "\n")
    print(*told, *save(task, results, checks, args), f"{time.perf_counter() - start:.0f} s in all", sep="\n")
    return 0 if all(check.passed for check in checks) else 1


def make_task(args: argparse.Namespace) -> DecodeTask:
    """A text with needles, and a question for each."""
    length = args.length or (8192 if args.quick else 131072)
    dtype = args.dtype or ("bfloat16" if fast_bfloat16() else "float32")
    heads = args.heads or 8
    generator = random.Random(args.seed)
    haystack = Haystack.read(args.text, length)
    taken = set(haystack.words)
    needles = [Needle.random(generator, taken) for _ in DEPTHS]
    words = tokenizer(*(needle.words for needle in needles), haystack.words, max_words=MAX_VOCAB)
    vocab = words.get_vocab()
    context = haystack.context(needles, length=length, depths=DEPTHS)

    def ids(tokens: list[str] | tuple[str, ...]) -> tuple[int, ...]:
        return tuple(vocab.get(token, UNKNOWN) for token in tokens)

    questions = tuple(
        Question(ids(needle.question), ids(needle.values), depth, length - context.index(needle.key))
        for needle, depth in zip(needles, DEPTHS, strict=True)
    )
    spec = ModelSpec(
        dtype=dtype,
        vocab_size=len(words),
        num_heads=heads,
        num_kv_heads=args.kv_heads or max(1, heads // 4),
        seed=args.seed,
    )
    return DecodeTask(spec, ids(context), questions, haystack.source, haystack.sha256)


def save(task: DecodeTask, results: list[Decoded], checks: list[Check], args: argparse.Namespace) -> list[str]:
    """Writes the figure and the JSON; returns what to tell."""
    told = [f"table: {args.out / 'decode.txt'}"]
    try:
        told.append(f"figure: {draw(task, results, args.out)}")
    except ImportError:
        told.append("no figure: matplotlib is missing (pip install 'longctx[demo]')")
    if args.json is not None:
        document = {
            "info": longctx.info(),
            "text": {"source": task.source, "sha256": task.sha256, "tokens": len(task.context)},
            "rows": [dataclasses.asdict(result) for result in results],
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        told.append(f"results: {args.json}")
    return told
