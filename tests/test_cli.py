"""`longctx info` and what the command line says about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import longctx
from longctx import _info
from longctx.cli import main
from longctx.testing import available_isas, force_isa


def info(capsys, *args: str) -> dict:
    assert main(["info", "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_is_what_the_library_says(capsys):
    facts = info(capsys)
    assert facts == json.loads(json.dumps(longctx.info()))
    assert "schemas" not in facts


def test_info_as_text(capsys):
    assert main(["info", "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert f"longctx                  {longctx.__version__}" in printed
    assert "longctx::merge_states(Tensor out, Tensor lse" in printed


def test_info_tells_what_cuda_would_run(capsys):
    cuda = info(capsys, "--verbose")["cuda"]
    assert cuda["available"] == (torch.cuda.is_available() and "liblongctx_cuda.so" in longctx.info()["libraries"])
    assert cuda["available"] or "CUDA" in cuda["why"] or "GPU" in cuda["why"]
    if not cuda["available"]:
        return
    assert set(cuda["attention"]) >= {"bfloat16 128", "float16 64", "float32 256"}
    assert all(path.split(":")[0] in ("sm90", "sm80", "float32") for path in cuda["attention"].values())
    # What TMA cannot read goes to the kernel that every GPU runs.
    assert cuda["attention"]["bfloat16 128, odd strides"].startswith("sm80")


@pytest.mark.runs_on("cpu", reason="a stand-in for the op that a GPU has")
def test_every_dtype_and_head_dim_has_a_path():
    """The op itself answers on CUDA; here it repeats what it was asked."""
    asked = []
    library = torch.library.Library("longctx", "IMPL")
    library.impl("_cuda_attention_path", lambda q, k, v: asked.append(q) or f"sm80: {q.shape[3]}", "CPU")
    try:
        paths = _info.attention_paths("cpu")
    finally:
        library._destroy()
    assert len(paths) == 19
    assert paths["float16 96"] == "sm80: 96"
    assert asked[-1].storage_offset() % 2 == 1
    assert asked[-1].stride(2) == 129


@pytest.mark.runs_on("cpu", reason="about the engines of the CPU kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_path_of_a_shape(capsys, dtype):
    path = info(capsys, "--shape", "2,8,8192,128", "--kv-heads", "2", "--dtype", dtype)["path"]
    assert path["accepted"] is True
    assert path["engine"] == longctx.info()["build"]["engines"][dtype]
    assert path["query_heads_per_kv_head"] == 4
    assert path["dense_causal_gflop"] == pytest.approx(2 * 2 * 8 * 8192**2 * 128 / 1e9, abs=1e-3)


def test_path_tells_when_an_isa_is_held_back(capsys):
    isas = available_isas()
    with force_isa(isas[0]):
        why = info(capsys, "--shape", "1,1,1,64", "--dtype", "float32")["path"]["why"]
    held_back = isas[0] != longctx.info()["build"]["detected_isa"]
    assert (f"held back to {isas[0]}" in why) == held_back


@pytest.mark.parametrize(
    ("args", "why"),
    [(("--kv-heads", "3"), "got 3 beside 8"), (("--dtype", "int64"), "dtype")],
)
def test_a_shape_that_is_refused_tells_why(capsys, args, why):
    path = info(capsys, "--shape", "1,8,512,64", *args)["path"]
    assert path["accepted"] is False
    assert why in path["why"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "--shape", "1,8,512,64", "--dtype", "float33"], "no dtype is called 'float33'"),
        (["demo", "--needle", "lonely"], "a needle is 'KEY v1 [v2 ...]'"),
        (["demo", "--length", "1000"], "shorter than 2048"),
        (["demo", "--depth", "2"], "depth 2"),
        (["demo", "--text", "/no/such/file"], "No such file"),
        (["demo", "--model", "/no/such/model"], "--model needs --prompt"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, message):
    if argv[0] == "demo":
        pytest.importorskip("transformers", reason="needs transformers")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "--shape", "1,2"]])
def test_argparse_refuses(argv):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "longctx", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["torch"] == torch.__version__
