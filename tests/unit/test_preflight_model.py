"""What of a checkpoint and of vLLM's flags is refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tarragon import cli
from tarragon.agent.preflight import PreflightError, certainly_pass, check_sizes, check_tokenizer
from tarragon.gateway import flags
from tarragon.gateway.flag_table import APPLIES
from tarragon.models.shape import MoeModel, read_model
from tarragon.testing.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoeModel:
    return read_model(make_checkpoint("mixtral", tmp_path_factory.mktemp("model") / "model"))


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (128, 96), (2880, 2880), (2048, 1408)])
def test_sizes_that_the_kernel_takes(model: MoeModel, hidden: int, intermediate: int) -> None:
    check_sizes(replace(model, hidden=hidden, intermediate=intermediate))


@pytest.mark.parametrize(
    ("hidden", "intermediate", "words"),
    [
        (64, 48, "intermediate size of experts must be a multiple of 32 .*, but is 48"),
        (48, 64, "hidden size"),
    ],
)
def test_sizes_that_the_kernel_does_not_take(
    model: MoeModel, hidden: int, intermediate: int, words: str
) -> None:
    with pytest.raises(PreflightError, match=words):
        check_sizes(replace(model, hidden=hidden, intermediate=intermediate))


def test_the_kernel_itself_fails_for_such_sizes(tmp_path: Path) -> None:
    """Why they are refused: if this test fails one day, the refusal may go."""
    import torch
    from vllm.platforms import current_platform

    from tarragon.experts.kernels import ResidentExperts
    from tarragon.messages import ExpertId
    from tarragon.models.expert_weights import ExpertWeights

    current_platform.import_kernels()
    folder = make_checkpoint("mixtral", tmp_path / "m", hidden=64, intermediate=48)
    odd = read_model(folder)
    with pytest.raises(PreflightError, match="but is 48"):
        check_sizes(odd)
    experts = ResidentExperts(odd, ExpertWeights(odd))
    rows = torch.ones(1, odd.hidden, dtype=torch.bfloat16)
    experts.load(ExpertId(0, 0))
    with pytest.raises(RuntimeError, match="Check failed"):
        experts.run(0, rows, torch.zeros(1, dtype=torch.int32), torch.empty_like(rows))


# ------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "vocab.txt"],
)
def test_a_folder_with_a_tokenizer(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    check_tokenizer(tmp_path, [])


@pytest.mark.parametrize("argument", ["--tokenizer=/other", "--skip-tokenizer-init", "--skip_tokenizer_init"])
def test_a_tokenizer_elsewhere(argument: str, tmp_path: Path) -> None:
    check_tokenizer(tmp_path, ["--max-model-len", "8", argument])


@pytest.mark.parametrize("engine_args", [[], ["--tokenizer-mode", "slow"]])
def test_a_folder_without_a_tokenizer(engine_args: list[str], tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(PreflightError, match=r"has no tokenizer .*--tokenizer"):
        check_tokenizer(tmp_path, engine_args)


# ------------------------------------------------------------------ vLLM's flags


def test_flags_that_certainly_pass_do_pass() -> None:
    known = flags.serve_parser()._option_string_actions
    for name in APPLIES - {"dtype"}:
        flag = f"--{name.replace('_', '-')}"
        assert known[flag].dest == name, "else another flag would pass under this name"
        assert certainly_pass([flag])


@pytest.mark.parametrize(
    "engine_args",
    [
        [],
        ["--max-model-len", "4096", "--enforce-eager", "--seed", "-1"],
        ["--max_num_seqs=8"],
        ["--structured-outputs-config.backend", "xgrammar"],
        ["--api-key", "a", "b"],
    ],
)
def test_usual_flags_need_no_parser(engine_args: list[str]) -> None:
    assert certainly_pass(engine_args)


@pytest.mark.parametrize(
    "engine_args",
    [
        ["--enable-lora"],
        ["--max-model-len", "8", "--expert-wrokers", "4"],
        ["-tp", "2"],
        ["-O3"],
        ["--no-enable-prefix-caching"],
        ["--dtype", "float32"],
        ["stray"],
        ["stray", "--seed", "1"],
        ["--"],
    ],
)
def test_all_others_are_for_vllm(engine_args: list[str]) -> None:
    assert not certainly_pass(engine_args)


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        (["--expert-wrokers", "4"], "--expert-wrokers is not a setting of Tarragon or vLLM; the nearest is"),
        (["--enable-lora"], "--enable-lora is refused: LoRA"),
        (["-tp", "2"], "-tp is refused"),
        (["--dtype", "float32"], "--dtype float32 is refused"),
        (["stray"], "one MODEL is served, but stray follows it"),
    ],
)
def test_a_dry_run_refuses_the_flags_that_the_start_refuses(
    model: MoeModel,
    engine_args: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # It sets variables of this process and starts it anew.
    monkeypatch.setattr("tarragon.agent.environment.prepare", lambda: None)
    assert cli.main(["serve", model.path, "--dry-run", "--json", *engine_args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("tarragon: ")
    assert words in line


def test_a_dry_run_takes_harmless_values_of_refused_flags(
    model: MoeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tarragon.agent.environment.prepare", lambda: None)
    small = ("--kv-cache-bytes=1000000", "--worker-overhead-bytes=1000000")
    argv = [
        "serve",
        model.path,
        "--dry-run",
        "--json",
        *small,
        "--tensor-parallel-size",
        "1",
        "--no-enable-lora",
    ]
    assert cli.main(argv) == 0
    assert '"fits": true' in capsys.readouterr().out
