"""Kernels are written in the words of csrc/device: what else they said would not run on CPU fibers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
# The launch itself.
EXCEPT = {CUDA / "runtime.h"}
FOREIGN = re.compile(
    r"\basm\b|\b__asm__\b|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|\b__sync\w+|\b__shfl\w*|\b__shared__\b"
    r"|\b__(?:ballot|any|all|match|activemask|reduce)\w*|\batomic[A-Z]\w*|<<<"
)


def without_comments(text: str) -> str:
    """The same lines, comments and string literals emptied."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    return pattern.sub(lambda match: "\n" * match.group().count("\n"), text)


def foreign_words(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(without_comments(text).splitlines(), start=1):
        for match in FOREIGN.finditer(line):
            yield number, match.group()


def sources() -> list[Path]:
    files = (path for path in CUDA.rglob("*") if path.suffix in {".cu", ".cuh", ".h", ".cpp", ".in"})
    return sorted(path for path in files if path not in EXCEPT)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CUDA)))
def test_kernels_use_device_words_alone(path: Path) -> None:
    found = [f"{path.name}:{line}: {word}" for line, word in foreign_words(path.read_text())]
    assert not found, "only csrc/device may say this: " + ", ".join(found)


@pytest.mark.parametrize(
    "code",
    [
        'asm volatile("bar.sync 0;");',
        "int t = threadIdx.x;",
        "__syncthreads();",
        "__syncwarp();",
        "x = __shfl_xor_sync(~0u, x, 1);",
        "__shared__ float tile[32];",
        "kernel<<<1, 32>>>();",
        "atomicAdd(p, 1);",
    ],
)
def test_foreign_words_are_found(code: str) -> None:
    assert [line for line, _ in foreign_words("// threadIdx\n/* asm\n*/ " + code)] == [3]
