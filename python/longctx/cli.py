"""The command line: `longctx demo`, `longctx info`, `longctx bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` and runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="longctx", description="Long-context attention kernels.")
    commands = parser.add_subparsers(title="commands", required=True)
    add_demo(
        commands.add_parser("demo", help="a long prompt through a real model, every policy beside dense attention")
    )
    add_info(commands.add_parser("info", help="what this installation would run, and why"))
    add_bench(commands.add_parser("bench", help="the ops beside what one would use instead, on this machine"))
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"longctx: error: {str(error).removeprefix('longctx: ')}", file=sys.stderr)
        return 2


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds needles in local text with a transformers model whose weights are constructed: no download, "
        "about two minutes on two cores. The exit code tells whether every check held."
    )
    parser.add_argument("--linear", action="store_true", help="train and stream a model of linear attention instead")
    parser.add_argument("--decode", action="store_true", help="answer from 128k cached tokens, by every cache, instead")
    parser.add_argument("--quick", action="store_true", help="8k tokens, fewer depths, steps and lengths")
    parser.add_argument(
        "--length", type=int, help="tokens of the long prompt (32768; 131072 with --decode; 8192 with --quick)"
    )
    parser.add_argument("--needle", metavar="'KEY V1 V2'", help="a fact of your own to find (default: random ones)")
    parser.add_argument("--depth", type=float, default=0.37, help="where in the long prompt it stands, 0 to 1")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="the text around it (default: Python's documentation)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random needles and the model's signs")
    parser.add_argument("--show-answers", action="store_true", help="print what every row said to every prompt")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU multiplies it"
    )
    parser.add_argument("--heads", type=int, help="query heads of the constructed model (8; 4 in float32)")
    parser.add_argument("--kv-heads", type=int, help="its kv heads (a quarter of the query heads)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a local transformers checkpoint instead")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="its prompt")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement to this file")
    parser.add_argument(
        "--out", type=Path, default=Path("longctx-demo"), metavar="DIR", help="where figures and tables go"
    )
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ImportError("the demo runs a transformers model: pip install 'longctx[demo]'") from None
    from longctx.demo import decode, linear, main

    if args.linear and args.decode:
        raise ValueError("longctx demo: --linear and --decode are two demos; choose one")
    run = linear.run if args.linear else decode.run if args.decode else main.run
    return run(args)


def add_bench(parser: argparse.ArgumentParser) -> None:
    from longctx.benchmark.run import add_arguments

    add_arguments(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure")
    on_gpu = parser.add_argument_group("with --device cuda")
    on_gpu.add_argument("--seconds", type=float, help="stop starting cases after so long")
    on_gpu.add_argument("--announce", action="store_true", help="name each case before it starts")
    on_gpu.add_argument("--after", metavar="CASE", help="continue the results in --out behind this case")
    on_gpu.add_argument("--out", type=Path, metavar="DIR", help="write gpu.json and gpu.md there")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    from longctx.benchmark import gpu, run

    rows = gpu.main(args) if args.device == "cuda" else run.main(args)
    return 0 if rows else 1


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--verbose", action="store_true", help="also the CUDA kernels and why these, and the schemas")
    parser.add_argument("--shape", type=shape, metavar="B,H,N,D", help="explain which path q of this shape would take")
    parser.add_argument("--kv-heads", type=int, help="heads of k and v, with --shape (H)")
    parser.add_argument("--dtype", default="bfloat16", help="of q, k and v, with --shape")
    parser.set_defaults(run=run_info)


def shape(text: str) -> tuple[int, int, int, int]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"a shape is batch,heads,seqlen,head_dim; got {text!r}")
    return sizes


def run_info(args: argparse.Namespace) -> int:
    import longctx
    from longctx._info import cuda_info

    facts = longctx.info()
    if args.verbose:
        facts["cuda"] = cuda_info()
        facts["schemas"] = schemas(facts["ops"])
    if args.shape is not None:
        facts["path"] = path_of(facts, args.shape, args.kv_heads or args.shape[1], args.dtype)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(as_lines(facts)))
    return 0


def schemas(ops: Sequence[str]) -> dict[str, str]:
    import torch

    return {name: str(getattr(torch.ops.longctx, name).default._schema) for name in ops}


def path_of(facts: dict[str, Any], shape: tuple[int, int, int, int], num_kv_heads: int, dtype: str) -> dict[str, Any]:
    """Whether attention over this shape is accepted, which engine computes it, and why that one."""
    import torch

    import longctx

    batch, num_q_heads, seqlen, head_dim = shape
    tensor_type = getattr(torch, dtype, None)
    if not isinstance(tensor_type, torch.dtype):
        raise ValueError(f"no dtype is called {dtype!r}")
    try:  # one token asks the same questions as many
        kv = torch.zeros(1, num_kv_heads, 1, head_dim, dtype=tensor_type)
        longctx.attention(torch.zeros(1, num_q_heads, 1, head_dim, dtype=tensor_type), kv, kv)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return {"accepted": False, "why": str(error)}
    build = facts["build"]
    engine, isa, detected = build["engines"][dtype], build["isa"], build["detected_isa"]
    why = f"this CPU offers {detected}"
    if isa != detected:
        why += f", held back to {isa}"
    if engine != isa:
        why += f"; the best engine for {dtype} within that is {engine}"
    return {
        "accepted": True,
        "device": "cpu",
        "engine": engine,
        "why": why,
        "query_heads_per_kv_head": num_q_heads // num_kv_heads,
        "dense_causal_gflop": round(2 * batch * num_q_heads * seqlen * seqlen * head_dim / 1e9, 3),
    }


def as_lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Nested facts as indented text."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *as_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name:<24} {text}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
