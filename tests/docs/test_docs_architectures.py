"""The page of architectures names what is served, and every other MoE class of the installed vLLM."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

from tests.docs_pages import ROOT

from tarragon.models.layouts import ARCHITECTURES

_CLASS = re.compile(r"`(\w+For(?:CausalLM|ConditionalGeneration))`")
_IS_MOE = re.compile(r"\bFusedMoE|\bfused_moe\b|MoE\(")

DENSE = frozenset({"PanguEmbeddedForCausalLM", "Qwen3_5ForCausalLM"})
"""Their modules hold MoE classes too."""


@cache
def vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def registered() -> dict[str, tuple[str, str]]:
    """Text generation classes of the installed vLLM: (module, class) by the name in config.json."""
    source = (vllm_folder() / "model_executor/models/registry.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS":
            found: dict[str, tuple[str, str]] = ast.literal_eval(node.value)
            return found
    raise AssertionError("vLLM keeps its registry elsewhere")


def has_experts(module: str) -> bool:
    """Whether the source of a model's module builds layers of experts."""
    if "." in module:
        files = sorted((vllm_folder().parent / module.replace(".", "/")).rglob("*.py"))
    else:
        files = [vllm_folder() / "model_executor/models" / f"{module}.py"]
    return any(_IS_MOE.search(file.read_text(encoding="utf-8")) for file in files)


def test_the_page_names_every_moe_class_that_is_not_served() -> None:
    _, _, section = (ROOT / "docs/architectures.md").read_text(encoding="utf-8").partition("not served yet\n")
    named = _CLASS.findall(section)
    assert len(named) == len(set(named))
    classes = registered()
    assert set(named) <= set(classes), "the installed vLLM does not have them"
    assert not set(named) & set(ARCHITECTURES), "they are served"
    moe = {name for name, (module, _) in classes.items() if has_experts(module)} - DENSE
    assert moe - set(named) - set(ARCHITECTURES) == set()
    # Their experts are those of the classes that they inherit from.
    assert set(named) - moe == {"LongcatFlashNgramForCausalLM", "MistralLarge3ForCausalLM"}
