"""One set of names for file, environment and flags: which wins, what is refused, what is told about it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from tarragon import cli
from tarragon.config import Config, ConfigError, Settings, load, load_settings
from tarragon.config_text import as_toml, reference
from tarragon.options import descriptions, unit

ROOT = Path(__file__).parents[2]


def toml(folder: Path, text: str) -> Path:
    file = folder / "tarragon.toml"
    file.write_text(text)
    return file


def test_the_later_source_wins_and_is_named(tmp_path: Path) -> None:
    file = toml(tmp_path, "[tarragon]\nport = 9001\nexpert_workers = 5\nattention_workers = 4\n")
    environ = {"TARRAGON_PORT": "9002", "TARRAGON_EXPERT_WORKERS": "6", "PATH": "/bin"}
    config, sources = load_settings(file, environ, {"port": 9003, "host": None})
    assert (config.port, config.expert_workers, config.attention_workers) == (9003, 6, 4)
    assert sources["port"] == "--port"
    assert sources["expert_workers"] == "TARRAGON_EXPERT_WORKERS"
    assert sources["attention_workers"] == str(file)
    assert sources["host"] == "default"
    assert set(sources) == set(Config.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tarragon]\nkv-cache-bytes = 1", "kv-cache-bytes is not a setting; the nearest is kv_cache_bytes"),
        ("[tarragon]\nexpert_worker = 1", "the nearest is expert_workers"),
        ("[tarragon]\nqqqq = 1", "qqqq is not a setting"),
        ("[tarragon]\nport = 'many'", "port in {file}: Expected `int`, got `str`"),
        ("[tarragno]\nport = 1", "settings belong in a table named tarragon, but there is 'tarragno'"),
        ("tarragon = 1", "tarragon must be a table"),
        ("[tarragon", "cannot read the configuration file {file}"),
        ("[tarragon]\nlog_format = 'xml'", "log_format must be one of text, json, but is 'xml'"),
    ],
)
def test_a_fault_in_the_file_names_the_file_and_the_nearest_setting(
    tmp_path: Path, text: str, words: str
) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert words.format(file=file) in str(caught.value)


def test_a_misspelt_variable_is_refused_but_a_foreign_one_is_not() -> None:
    with pytest.raises(
        ConfigError, match="TARRAGON_EXPERT_WORKER is not a setting; the nearest is TARRAGON_E"
    ):
        load(environ={"TARRAGON_EXPERT_WORKER": "3"})
    assert load(environ={"TARRAGON_SERVICE_HOST": "10.0.0.1", "TARRAGON_ADMIN_KEY": "x"}) == Config()


def test_a_value_of_the_wrong_type_names_where_it_stands() -> None:
    with pytest.raises(ConfigError, match="bad configuration: TARRAGON_PORT: Expected `int`, got `str`"):
        load(environ={"TARRAGON_PORT": "tcp://10.0.0.1:80"})


def test_an_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="--expert-worker is not a setting; the nearest is --expert-workers"
    ):
        load(environ={}, flags={"expert_worker": 3})


def test_what_is_printed_is_a_file_that_sets_the_same(tmp_path: Path) -> None:
    settings = load_settings(None, {"TARRAGON_PORT": "9002"}, {"host": "::1", "probe_silence_ms": 1.5})
    text = as_toml(settings)
    assert load(toml(tmp_path, text), {}) == settings.config
    assert set(tomllib.loads(text)["tarragon"]) == set(Config.__struct_fields__)
    [line] = [line for line in text.splitlines() if line.startswith("port =")]
    assert line.split() == ["port", "=", "9002", "#", "TARRAGON_PORT"]


def test_the_command_prints_values_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--expert-workers", "7"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["expert_workers", "=", "7", "#", "--expert-workers"] in lines
    assert ["attention_workers", "=", "2", "#", "default"] in lines
    assert cli.main(["config", "--expert-workers", "0"]) == 2
    assert "expert_workers must be at least 1" in capsys.readouterr().err


def test_the_reference_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "run: tarragon config --markdown > docs/configuration.md"


def test_every_setting_says_what_it_means_and_in_which_unit() -> None:
    texts = descriptions()
    assert list(texts) == list(Config.__struct_fields__)
    assert [name for name, found in texts.items() if not found.text] == []
    assert all(found.line.endswith(("s", ".", ";", ")", "e", "d")) for found in texts.values())
    units = {field.name: unit(field) for field in msgspec.structs.fields(Config)}
    assert units["kv_cache_bytes"] == units["expert_memory_bytes_max"] == "bytes"
    assert units["probe_silence_ms"] == "milliseconds"
    assert units["batch_join_wait_us_max"] == "microseconds"
    assert units["drain_timeout_s"] == units["restart_backoff_s_max"] == "seconds"
    assert units["expert_workers"] == "number"


def test_the_help_has_every_setting_with_unit_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in Config.__struct_fields__:
        assert f"--{name.replace('_', '-')} " in shown, name
    [line] = [line for line in shown.splitlines() if "--kv-cache-bytes " in line]
    assert "BYTES" in line
    assert "Paged KV cache of each attention worker." in line
    assert str(Config().kv_cache_bytes) in line
    for group in {found.group for found in descriptions().values()}:
        assert f"─ {group[0].upper()}{group[1:]} ─" in shown, group


def test_values_of_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    text = as_toml(Settings(config, dict.fromkeys(Config.__struct_fields__, "default")))
    assert "hidden" not in text
    monkeypatch.setattr("tarragon.config_text._SECRET", ("host",))
    text = as_toml(Settings(config, dict.fromkeys(Config.__struct_fields__, "default")))
    assert "127.0.0.1" not in text
    assert 'host = "(hidden)"' in text
