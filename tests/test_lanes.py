"""Every word of csrc/device has a lane vector: what the emulation makes of it can be compared with a GPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADERS = sorted((ROOT / "csrc" / "device").glob("*.cuh"))


def words_of(header: Path) -> set[str]:
    """Names of the functions that kernels may call: not those of the emulation, nor of `detail`."""
    text = re.sub(r"^#else\n.*?^#endif  // LONGCTX_SIMT$", "", header.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^namespace detail \{.*?^\}  // namespace detail$", "", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^LONGCTX_DEVICE [\w:<> ]+[ *](\w+)\(", text, flags=re.MULTILINE))


def recorded_words() -> set[str]:
    files = (ROOT / "tests" / "lanes" / "vectors").glob("*.txt")
    return {word for path in files for word in path.read_text().splitlines()[0].removeprefix("# ").split()}


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_word_has_a_vector(header):
    words = words_of(header)
    assert words
    assert words <= recorded_words()
