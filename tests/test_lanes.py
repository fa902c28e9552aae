"""Every word of csrc/device has a lane vector: what the emulation makes of it can be compared with a GPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# They move registers between warps, which no value shows.
UNSEEN = {"lower_registers", "raise_registers"}
HEADERS = sorted((ROOT / "csrc" / "device").glob("*.cuh"))


def words_of(header: Path) -> set[str]:
    """Names of the functions that kernels may call: not those of the emulation, nor of `detail`."""
    emulation = detail = False
    words = set()
    for line in header.read_text().splitlines():
        if line.startswith(("#ifndef LONGCTX_SIMT", "#endif")):
            emulation = False
        elif line in ("#else", "#ifdef LONGCTX_SIMT"):
            emulation = not emulation
        elif "namespace detail" in line:
            detail = not line.startswith("}")
        elif not emulation and not detail and (match := re.match(r"LONGCTX_DEVICE [\w:<> ]+[ *](\w+)\(", line)):
            words.add(match[1])
    return words


def recorded_words() -> set[str]:
    files = (ROOT / "tests" / "lanes" / "vectors").glob("*.txt")
    return {word for path in files for word in path.read_text().splitlines()[0].removeprefix("# ").split()}


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_word_has_a_vector(header):
    words = words_of(header)
    assert words
    assert words - UNSEEN <= recorded_words()
