"""Which of vLLM's flags pass, which are refused and in what words, and what Tarragon sets itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.gateway import flags
from tarragon.gateway.flag_table import APPLIES, HARMLESS, OWN, REFUSED
from tarragon.gateway.flags import FlagError, ModelRefused, split_flags


def boot(model: str, *argv: str, **settings: Any) -> Boot:
    return Boot(
        cluster="c",
        secret=bytes(32),
        worker_id="gateway",
        role="gateway",
        epoch=1,
        model=model,
        config=Config(**settings),
        engine_args=argv,
    )


def test_every_flag_of_the_installed_vllm_is_decided_once() -> None:
    theirs = {action.dest for action in flags.serve_parser()._actions}
    ours = [*APPLIES, *OWN, *REFUSED]
    assert sorted(ours) == sorted(set(ours)), "a flag is decided twice"
    assert theirs - set(ours) == set(), "vLLM has flags that nobody has decided"
    assert set(ours) - theirs == set(), "the table has flags that vLLM no longer has"
    assert set(HARMLESS) <= set(OWN) | set(REFUSED)


def test_reasons_are_clauses_that_complete_the_sentence() -> None:
    for reason in {*OWN.values(), *REFUSED.values()}:
        assert not reason.endswith("."), reason
        assert "\n" not in reason
        assert reason[0].islower() or reason.startswith(("Tarragon", "LoRA", "KV", "--", "`")), reason


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--max-model-len", "4096", "--enforce-eager", "--seed", "-1"],
        ["--max_num_seqs=8", "--api-key", "a", "b"],
        ["--structured-outputs-config.backend", "xgrammar"],
        ["--override-generation-config", '{"temperature": 0}'],
    ],
)
def test_flags_that_apply_pass_as_they_are(argv: list[str]) -> None:
    assert split_flags(argv) == tuple(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--tensor-parallel-size", "1"],
        ["-tp=1"],
        ["--no-enable-lora"],
        ["--load-format", "safetensors"],
        ["--no-trust-remote-code"],
        ["--runner", "generate"],
        ["--api-server-count", "1"],
    ],
)
def test_refused_flags_pass_with_a_value_that_changes_nothing(argv: list[str]) -> None:
    assert split_flags(argv) == tuple(argv)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is refused: attention, experts and"),
        (["-tp", "2"], "-tp is refused: attention, experts"),
        (["--data_parallel_size=2"], "--data_parallel_size is refused: attention"),
        (["--enable-expert-parallel"], "--enable-expert-parallel is refused: Tarragon places the experts"),
        (["--enable-eplb"], "--enable-eplb is refused: Tarragon places"),
        (["--distributed-executor-backend", "mp"], "refused: each attention worker runs its engine"),
        (["--kv-transfer-config", '{"kv_connector": "x"}'], "refused: KV caches are checkpointed"),
        (["--speculative-config", '{"num_speculative_tokens": 1}'], "speculative decoding is not supported"),
        (["--enable-lora"], "--enable-lora is refused: LoRA adapters are not supported"),
        (["--lora-modules", "a=/b"], "LoRA adapters are not supported"),
        (["--quantization", "fp8"], "quantised weights are not supported"),
        (["-q", "fp8"], "-q is refused: quantised"),
        (["--cpu-offload-gb", "1"], "weights stay in the memory"),
        (["--trust-remote-code"], "code that comes with a model is never run"),
        (["--api-server-count", "2"], "--api-server-count is refused"),
        (["--headless"], "--headless is refused"),
        (["--limit-mm-per-prompt", '{"image": 1}'], "multimodal input is not supported"),
        (["--limit-mm-per-prompt.image", "1"], "multimodal input is not supported"),
        (["--kv-cache-memory-bytes", "5G"], "--kv-cache-bytes sets"),
        (["--port", "9"], "Tarragon's own --port"),
        (["-O3"], "kernels are chosen"),
        (["-cc.mode", "0"], "kernels are chosen"),
        (["--no-swa-bounded-replay"], "KV caches are checkpointed"),
        (["--max-model-len", "auto"], "--max-model-len auto is refused"),
    ],
)
def test_flags_that_do_not_apply_are_refused_by_name(argv: list[str], sentence: str) -> None:
    with pytest.raises(FlagError) as refusal:
        split_flags(["--enforce-eager", *argv])
    message = str(refusal.value)
    assert sentence in message
    assert message.endswith(".")
    assert message.count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--max-modl-len", "5"], "--max-model-len"),
        (["--atention-workers", "5"], "--attention-workers"),
        (["--max-num-se", "5"], "--max-num-seqs"),  # no abbreviations: they change meaning with vLLM
        (["-dx", "2"], "-d"),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest_name(argv: list[str], nearest: str) -> None:
    with pytest.raises(FlagError, match=f"is not a setting of Tarragon or vLLM; the nearest is {nearest}"):
        split_flags(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-num-seqs", "many"],
        ["--max-num-seqs"],
        ["--dtype", "int3"],
        ["one", "two"],
        ["--enable-auto-tool-choice"],
        ["--enable-log-outputs"],
        ["--chat-template", "/does/not/exist.jinja"],
        ["--structured-outputs-config", "{"],
    ],
)
def test_malformed_flags_do_not_end_the_process(argv: list[str]) -> None:
    with pytest.raises(FlagError):
        split_flags(argv)


def test_tarragon_has_the_last_word() -> None:
    args = flags.serve_args(
        boot(
            "/models/tiny", "--enforce-eager", "--uvicorn-log-level", "info", kv_cache_bytes=5 << 20, port=81
        )
    )
    assert (args.model, args.host, args.port) == ("/models/tiny", "127.0.0.1", 81)
    assert args.served_model_name == ["tiny", "/models/tiny"]
    assert (args.load_format, args.distributed_executor_backend) == ("safetensors", "uni")
    assert (args.async_scheduling, args.trust_remote_code) == (False, False)
    assert args.kv_cache_memory_bytes == 5 << 20
    assert args.max_num_queued_reqs == Config().requests_live_max
    assert args.enforce_eager
    assert args.uvicorn_log_level == "info"
    assert flags.serve_args(boot("tiny", "--served-model-name", "x", "y")).served_model_name == ["x", "y"]


def test_engine_args_are_those_of_the_server() -> None:
    args = flags.engine_args(boot("/models/tiny", "--max-num-seqs", "7"))
    assert (args.model, args.max_num_seqs, args.load_format) == ("/models/tiny", 7, "safetensors")
    assert args.distributed_executor_backend == "uni"


@pytest.mark.parametrize(
    ("flags_given", "stored"),
    [
        ((), "float32"),
        (("--dtype", "auto"), "float16"),
        (("--dtype=half",), "float16"),
        (("--dtype", "float"), "float32"),
        (("--dtype", "bfloat16"), "bfloat16"),
    ],
)
def test_the_type_of_the_experts_may_be_asked_for(flags_given: tuple[str, ...], stored: str) -> None:
    flags.check_dtype(flags_given, stored)


@pytest.mark.parametrize(
    ("asked", "stored"), [("float32", "bfloat16"), ("half", "bfloat16"), ("bfloat16", "float32")]
)
def test_another_type_is_refused(asked: str, stored: str) -> None:
    with pytest.raises(FlagError, match=f"--dtype {asked} is refused.* {stored}"):
        flags.check_dtype(("--dtype", asked), stored)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights (fp8)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantised weights (awq)"),
        ({"vision_config": {"depth": 2}}, "multimodal model (vision_config)"),
        ({"audio_config": {"depth": 2}}, "multimodal model (audio_config)"),
    ],
)
def test_models_that_are_not_served_are_refused(
    document: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelRefused) as refusal:
        flags.check_model(tmp_path)
    assert sentence in str(refusal.value)
    assert "not supported" in str(refusal.value)


def test_plain_models_pass_and_missing_ones_do_not(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"no readable config\.json"):
        flags.check_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelRefused, match=r"no readable config\.json"):
        flags.check_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "quantization_config": null}')
    flags.check_model(tmp_path)
