"""Every grammar is compiled by the backend that the gateway chose for it, on every worker alike.

vLLM has one backend per engine: that of the first request which needs one. What came first differs from
worker to worker, so that one and the same schema would be read in two ways, and a text that goes on
elsewhere could end in another form than it began.
"""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import Future
from typing import Any, Final

from vllm.v1.structured_output import StructuredOutputManager

_BACKENDS: Final = {
    "xgrammar": "backend_xgrammar:XgrammarBackend",
    "guidance": "backend_guidance:GuidanceBackend",
    "outlines": "backend_outlines:OutlinesBackend",
    "lm-format-enforcer": "backend_lm_format_enforcer:LMFormatEnforcerBackend",
}
"""vLLM's classes, by the name that it notes in a request's parameters."""
FIRST_CHOICE: Final = "xgrammar"
"""What vLLM takes by itself where it can."""


class Grammars(StructuredOutputManager):
    """vLLM's manager, with one backend per kind; their masks have one layout."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._backends: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Build the backend that most requests need: the first of them would stop all others for a second."""
        chosen = self.vllm_config.structured_outputs_config.backend
        if self.vllm_config.model_config.skip_tokenizer_init:
            return
        try:
            self.backend_of(chosen if chosen in _BACKENDS else FIRST_CHOICE)
        except Exception as error:  # requests with a grammar will be told; all others can be served
            print(f"no grammars: {type(error).__name__}: {error}", file=sys.stderr)

    def backend_of(self, name: str) -> Any:
        """The backend called ``name``, built when it is first needed. Raises ValueError for unknown ones."""
        if name not in self._backends:
            if name not in _BACKENDS:
                raise ValueError(f"there is no structured output backend {name}")
            module, _, class_name = _BACKENDS[name].partition(":")
            made = getattr(importlib.import_module(f"vllm.v1.structured_output.{module}"), class_name)
            self._backends[name] = made(
                self.vllm_config,
                tokenizer=self.tokenizer,
                vocab_size=self.vllm_config.model_config.get_vocab_size(),
            )
            if len(self._backends) == 1:
                self.backend = self._backends[name]  # whoever allocates the mask takes this one
        return self._backends[name]

    def grammar_init(self, request: Any) -> None:
        structured = request.structured_output_request
        if structured is None:
            return
        try:
            backend = self.backend_of(request.sampling_params.structured_outputs._backend)
            structured.grammar = self.executor.submit(compile_with, backend, request)
        except Exception as error:  # the scheduler fails this request, as it does when compiling fails
            structured.grammar = Future()
            structured.grammar.set_exception(error)

    def clear_backend(self) -> None:
        others = [backend for backend in self._backends.values() if backend is not self.backend]
        self._backends.clear()
        super().clear_backend()  # waits for whoever compiles
        for backend in others:
            backend.destroy()


def compile_with(backend: Any, request: Any) -> Any:
    """The compiled grammar of a request; raises what ``backend`` raises for one that it cannot take."""
    kind, specification = request.structured_output_request.structured_output_key
    stops = request.sampling_params.all_stop_token_ids
    return backend.compile_grammar(kind, specification, stop_token_ids=stops)


def install() -> None:
    """Make vLLM's engine core build this manager (once per process)."""
    from vllm.v1.engine import core

    core.StructuredOutputManager = Grammars
