"""The demo: its prompts, its probes, its checks (each must be able to fail), and one short run from end to end."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from longctx.cli import main
from longctx.demo import report
from longctx.demo.checks import absent_key, all_checks, dense_right, exact, ran_on_our_ops, window_control
from longctx.demo.measure import Answer, Measurement, attention_output, clocked, counted_sdpa
from longctx.demo.probes import Compared, exactness, masked_dense
from longctx.demo.process import Workers
from longctx.demo.rows import DENSE, SDPA, WINDOW, WINDOW_ROW
from longctx.demo.task import ModelSpec, Task, Trial, needle_task
from longctx.demo.text import Haystack, Needle, tokenizer
from longctx.prefill import AShape, Dense, FlexPrefill, LMInfinite, PerLayer

MODEL = {"dtype": "float32", "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def task() -> Task:
    return needle_task(MODEL, length=2048, sweep_length=2048, depths=(0.2, 0.9))


# Prompts


def test_haystack_is_the_same_text_every_time():
    first, second = Haystack.read(None, 500), Haystack.read(None, 500)
    assert first.sha256 == second.sha256
    assert first.sha256 != Haystack.read(None, 501).sha256


def test_haystack_goes_on_with_docstrings_where_the_reference_is_too_short():
    haystack = Haystack.read(None, 150_000)
    assert len(haystack.words) == 150_000
    assert "docstrings" in haystack.source


def test_haystack_of_a_file_that_is_too_short(tmp_path):
    path = tmp_path / "text"
    path.write_text("few words here")
    assert Haystack.read(path, 3).words == ("few", "words", "here")
    with pytest.raises(ValueError, match="has 3 words; 4 are needed"):
        Haystack.read(path, 4)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompt_has_the_needle_where_it_was_asked_for(depth):
    needle = Needle("lokitamu", ("1", "2"))
    prompt = Haystack.read(None, 300).prompt(needle, length=300, depth=depth)
    assert len(prompt) == 300
    assert prompt[0] == "<s>"
    assert prompt[-3:] == ["number", "of", "lokitamu"]
    at = prompt.index("lokitamu")
    assert prompt[at - 2 : at + 3] == needle.words
    assert abs(at / 300 - depth) < 0.05


def test_prompt_without_room():
    with pytest.raises(ValueError, match="no prompt of 8 words"):
        Haystack.read(None, 300).prompt(Needle("k", ("1", "2", "3")), length=8, depth=0.5)


def test_random_needles_share_no_word_with_the_text_or_each_other():
    taken = {"1000"}
    needles = [Needle.random(random.Random(0), taken) for _ in range(20)]
    words = [word for needle in needles for word in (needle.key, *needle.values)]
    assert len(set(words)) == len(words)
    assert taken == {"1000", *words}


def test_tokenizer_numbers_words_by_first_appearance():
    words = tokenizer(("b", "a", "b", ".", "c"), max_words=5)
    assert words.get_vocab() == {"<s>": 0, "<unk>": 1, "b": 2, "a": 3, ".": 4}
    assert words("a.b c").input_ids == [3, 4, 2, 1]


def test_a_key_that_the_text_has_is_refused():
    with pytest.raises(ValueError, match="'statement' itself"):
        needle_task(MODEL, length=2048, sweep_length=2048, needle=Needle("statement", ("1",)))


# Probes


def test_exactness_is_small_for_a_method_and_large_for_another_mask(task):
    model = task.model.load()
    prompt = torch.tensor([task.main.prompt])
    with torch.inference_mode():
        policy = AShape(num_sink_tokens=16, window_size=256)
        errors = exactness(model, policy, AShape(num_sink_tokens=16, window_size=1 << 20), prompt)
        assert max(errors.values()) < 1e-4
        wrong = Compared(inner=policy, twin=masked_dense(AShape(num_sink_tokens=16, window_size=128)))
        _attend_once(wrong)
        assert wrong.errors[0] > 1e-2


def test_lminfinite_is_compared_under_its_ceiling_on_distance(task):
    policy = LMInfinite(num_global_tokens=16, window_size=256)
    with torch.inference_mode():
        errors = exactness(task.model.load(), policy, None, torch.tensor([task.main.prompt]))
    assert errors["masked dense"] < 1e-4


def _attend_once(policy):
    from longctx.prefill import AttentionContext

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 64, generator=generator) for _ in range(3))
    policy.attend(q, k, v, AttentionContext())


@pytest.mark.parametrize(
    "policy", [FlexPrefill(min_budget=128), PerLayer({0: Dense()}, default=FlexPrefill(min_budget=128))]
)
def test_a_clocked_policy_selects_the_same_and_notes_its_seconds(policy):
    clock: list[float] = []
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1024, 64, generator=generator) for _ in range(3))
    twin = clocked(policy, clock)
    for layer_idx in (0, 1):
        expected = policy(q, k, v, layer_idx=layer_idx)[0]
        assert torch.equal(twin(q, k, v, layer_idx=layer_idx)[0], expected)
    assert len(clock) == 2
    assert min(clock) > 0


def test_sdpa_is_counted_and_restored():
    original = torch.nn.functional.scaled_dot_product_attention
    q = torch.zeros(1, 1, 2, 8)
    with counted_sdpa() as calls:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert calls == [1]
    assert torch.nn.functional.scaled_dot_product_attention is original


def test_attention_output_is_what_the_layers_added(task):
    model = task.model.load()
    ids = torch.tensor([task.main.prompt[:64]])
    with torch.inference_mode():
        added = attention_output(model, ids)
        states = model.model.norm(model.model.embed_tokens(ids) + added)
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, expected)


# Checks


def _rows(task: Task) -> dict[str, Measurement]:
    """Rows that pass every check."""
    rows = {}
    for name in (SDPA.name, DENSE.name, WINDOW_ROW.name):
        rows[name] = Measurement(name)
        for trial in task.trials:
            inside = name != WINDOW_ROW.name or trial.reach < WINDOW
            told = trial.expected if inside else (5,)
            if name == WINDOW_ROW.name and trial.kind == "absent":
                told = (5,)
            ours = name != SDPA.name
            rows[name].answers.append(
                Answer(
                    trial=trial,
                    tokens=told,
                    prefill_seconds=1.0,
                    select_seconds=0.0,
                    density=1.0,
                    sparse_calls=2 if name == WINDOW_ROW.name else 0,
                    dense_calls=2 if ours else 0,
                    unreached_layers=0,
                    sdpa_calls=0 if ours else 2,
                )
            )
        if ours:
            rows[name].exactness = {"masked dense": 1e-6, "full density": 0.0}
    return rows


def _answer(rows: dict[str, Measurement], name: str, kind: str, **changes) -> dict[str, Measurement]:
    answers = rows[name].answers
    at = next(i for i, answer in enumerate(answers) if answer.trial.kind == kind)
    answers[at] = dataclasses.replace(answers[at], **changes)
    return rows


def test_all_checks_pass_on_rows_that_are_right(task):
    checks = all_checks(task, _rows(task))
    assert [check.claim for check in checks if not check.passed] == []
    assert len(checks) == 7


def test_dense_wrong_is_noticed(task):
    for name in (SDPA.name, DENSE.name):
        assert not dense_right(_answer(_rows(task), name, "sweep", tokens=(9,))).passed


def test_a_window_that_finds_too_much_or_too_little_is_noticed(task):
    row = _rows(task)[WINDOW_ROW.name]
    assert window_control(row).passed
    for index, answer in enumerate(row.answers):
        if answer.trial.kind != "absent":
            changed = dataclasses.replace(row, answers=list(row.answers))
            tokens = (9,) if answer.right else answer.trial.expected
            changed.answers[index] = dataclasses.replace(answer, tokens=tokens)
            assert not window_control(changed).passed
    outside = [answer for answer in row.answers if answer.trial.reach >= WINDOW]
    assert not window_control(dataclasses.replace(row, answers=outside)).passed


def test_an_answer_about_an_absent_key_is_noticed(task):
    values = task.of_kind("absent")[0].values
    for name in (SDPA.name, DENSE.name, WINDOW_ROW.name):
        assert not absent_key(_answer(_rows(task), name, "absent", tokens=values).values()).passed
    assert not absent_key(_answer(_rows(task), DENSE.name, "absent", tokens=(9,)).values()).passed
    assert absent_key(_answer(_rows(task), WINDOW_ROW.name, "absent", tokens=(9,)).values()).passed


@pytest.mark.parametrize("probe", ["masked dense", "full density"])
def test_an_inexact_method_is_noticed(task, probe):
    rows = _rows(task)
    rows[WINDOW_ROW.name].exactness[probe] = 1e-2
    assert [check.passed for check in exact(task, [rows[WINDOW_ROW.name]])].count(False) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (SDPA.name, {"sdpa_calls": 0}),
        (DENSE.name, {"sdpa_calls": 1}),
        (DENSE.name, {"unreached_layers": 1}),
        (WINDOW_ROW.name, {"sparse_calls": 0}),
    ],
)
def test_attention_that_ran_elsewhere_is_noticed(task, name, changes):
    assert not ran_on_our_ops(_answer(_rows(task), name, "main", **changes)).passed


def test_a_refused_method_fails_the_demo_of_the_constructed_model(task):
    rows = _rows(task)
    rows["X"] = Measurement("X", refused="no RoPE here")
    assert [check.detail for check in all_checks(task, rows) if not check.passed] == ["no RoPE here"]


# Report and processes


def test_a_miss_is_shown(task):
    rows = _answer(_rows(task), WINDOW_ROW.name, "main", tokens=(9,))
    rows["X"] = Measurement("X", refused="no RoPE here")
    table = report.lines(task, rows.values())
    assert [line[:2] for line in table] == [
        ["SDPA", "3/3"],
        ["Dense", "3/3"],
        [WINDOW_ROW.name, "1/3"],
        ["X", "refused"],
    ]
    plain = report.plain_table(report.columns(task), table)
    assert len({len(line) for line in plain}) == 1


def test_attention_share_of_an_8b_llama():
    from argparse import Namespace

    from longctx.demo.main import EIGHT_B

    # 4096 * 32768 pairs of products a token beside 218 million weights of a layer.
    assert report.attention_share(Namespace(**EIGHT_B), 32768) == pytest.approx(0.381, abs=0.001)


def _fails(progress):
    progress("step")
    raise ZeroDivisionError("on purpose")


def _dies(progress):
    import os

    os._exit(3)


def test_a_failing_process_is_reported():
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="on purpose"):
        Workers().run(_fails, progress=seen.append)
    assert seen == ["step"]
    with pytest.raises(RuntimeError, match="exit code 3"):
        Workers().run(_dies, progress=seen.append)


# End to end


def test_demo_runs_and_tells(tmp_path, capsys):
    out = tmp_path / "results.json"
    sizes = ["--length", "2048", "--dtype", "float32", "--heads", "2"]
    code = main(
        ["demo", "--quick", *sizes, "--show-answers", "--json", str(out), "--out", str(tmp_path), "--seed", "3"]
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    results = json.loads(out.read_text())
    assert all(check["passed"] for check in results["checks"])
    names = [row["name"] for row in results["rows"]]
    assert names[:3] == ["SDPA", "Dense", "FlexPrefill"]
    assert len(names) == 11
    by_name = {row["name"]: row for row in results["rows"]}
    assert all(answer["right"] for answer in by_name["Dense"]["answers"])
    assert by_name["Dense"]["coverage_min"] == pytest.approx(1.0, abs=1e-4)
    assert by_name["SDPA"]["relative_error"] < 1e-4
    oracle, chance = by_name["OracleBlocks (same density)"], by_name["RandomBlocks (same density)"]
    assert oracle["coverage_mean"] >= chance["coverage_mean"]
    for text in ("What this proves", "sha256", "(nothing)", "demo.png"):
        assert text in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_demo_of_a_checkpoint(tmp_path, capsys):
    task = needle_task(MODEL, length=2048, sweep_length=2048, depths=())
    task.model.load().save_pretrained(tmp_path / "model")
    task.tokenizer.save_pretrained(tmp_path / "model")
    words = task.tokenizer.convert_ids_to_tokens(list(task.main.prompt))
    (tmp_path / "prompt").write_text(" ".join(words))
    files = ["--model", f"{tmp_path}/model", "--prompt", f"{tmp_path}/prompt", "--out", str(tmp_path)]
    code = main(["demo", *files, "--dtype", "float32", "--show-answers"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "as dense" in printed
    assert f"Dense: main, 2048 tokens, depth 0.0: {' '.join(task.words(task.main.expected).split())}" in printed


def test_a_trial_knows_its_length():
    trial = Trial(kind="main", prompt=(0, 1, 2), expected=(3,))
    assert (trial.length, trial.scored) == (3, True)
    assert ModelSpec(dtype="float32", vocab_size=8, num_heads=2, num_kv_heads=1).load().config.vocab_size == 8
