"""The native ops: right, bit for bit invariant, and strict about what they are given."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tarragon import native
from tarragon.native import build, ops
from tarragon.native.build import NativeError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build.build()
    native.load()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(7)
    yield
    torch.set_num_threads(before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits: equality of these also tells -0 from 0 and one NaN from another."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c as the linear does it: rounded once where the CPU has a fused multiply-add."""
    if "fma" in native.instruction_set():
        return (a.astype(np.float64) * b + c).astype(np.float32)  # the product is exact in float64
    return a * b + c


# ------------------------------------------------------------------ linear: right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 576, 1152), (5, 37, 50), (130, 1030, 33), (7, 1, 1), (64, 700, 16)]
)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_linear_is_close_to_float64(
    m: int, k: int, n: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    out = native.linear(x, native.pack_linear(weight), bias, n)
    addend = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    wanted = x.double() @ weight.double().T + addend
    # Each of the k float32 sums may lose half a unit of the partial sums' bound; then one rounding.
    slack = (k + 1) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + addend.abs())
    assert out.dtype == dtype
    assert ((out.double() - wanted).abs() <= slack + ULP[dtype] * wanted.abs()).all()


def test_linear_is_one_chain_over_k_then_the_bias_then_one_rounding() -> None:
    m, k, n = 3, 701, 20
    x, weight, bias = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.randn(n)
    chain = np.zeros((m, n), np.float32)
    for i in range(k):
        chain = fused(x[:, i, None].float().numpy(), weight[None, :, i].float().numpy(), chain)
    wanted = torch.from_numpy(chain + bias.numpy()).bfloat16()
    assert torch.equal(bits(native.linear(x, native.pack_linear(weight), bias, n)), bits(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_the_conversions(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one, small = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), 2.0**-9 + 2.0**-12, dtype=dtype)
    for weight in (one, small):
        out = native.linear(values[:, None], native.pack_linear(weight), None, 1)[:, 0]
        wanted = (values.float() * weight[0, 0].float() + 0.0).to(dtype)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(bits(out)[~wanted.isnan()], bits(wanted)[~wanted.isnan()])


def test_linear_takes_leading_dimensions_and_no_rows() -> None:
    weight = torch.randn(24, 40)
    packed = native.pack_linear(weight)
    x = torch.randn(2, 3, 40)
    flat = native.linear(x.view(6, 40), packed, None, 24)
    assert torch.equal(native.linear(x, packed, None, 24), flat.view(2, 3, 24))
    assert torch.equal(native.linear(x[0, 0], packed, None, 24), flat[0])
    assert native.linear(torch.empty(0, 40), packed, None, 24).shape == (0, 24)
    empty = native.linear(torch.empty(5, 0), native.pack_linear(torch.empty(24, 0)), torch.ones(24), 24)
    assert torch.equal(empty, torch.ones(5, 24))


def test_a_bad_row_spoils_only_itself() -> None:
    x, weight = torch.randn(9, 64), torch.randn(17, 64)
    packed = native.pack_linear(weight)
    clean = native.linear(x, packed, None, 17)
    x[4, 3] = float("inf")
    x[6, 0] = float("nan")
    out = native.linear(x, packed, None, 17)
    healthy = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(out[healthy], clean[healthy])
    assert out[6].isnan().all()
    assert not out[4].isfinite().any()


# ------------------------------------------------------------------ linear: batch-invariant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1152, 576), (50, 37), (16, 1), (1, 129), (100, 1025), (35, 4099)])
def test_a_row_does_not_depend_on_its_batch(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(513, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    packed = native.pack_linear(weight)
    torch.set_num_threads(1)
    whole = native.linear(x, packed, bias, n)
    alone = torch.cat([native.linear(x[i : i + 1], packed, bias, n) for i in range(80)])
    assert torch.equal(bits(whole[:80]), bits(alone))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for m in (*range(1, 71), 128, 513):
            assert torch.equal(bits(native.linear(x[:m], packed, bias, n)), bits(whole[:m])), (threads, m)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_place_or_stride(threads: int) -> None:
    torch.set_num_threads(threads)
    n, k = 200, 333
    wide, packed = torch.randn(140, 2 * k + 5).bfloat16(), native.pack_linear(torch.randn(n, k).bfloat16())
    strided = wide[:, 3 : 3 + k]
    plain = native.linear(strided.contiguous(), packed, None, n)
    assert torch.equal(bits(native.linear(strided, packed, None, n)), bits(plain))
    assert torch.equal(bits(native.linear(strided[1::3], packed, None, n)), bits(plain[1::3]))
    transposed = strided.T.contiguous().T
    assert torch.equal(bits(native.linear(transposed, packed, None, n)), bits(plain))
    order = torch.randperm(140)
    assert torch.equal(bits(native.linear(strided[order], packed, None, n)), bits(plain[order]))


def test_packing_takes_strided_weights() -> None:
    wide = torch.randn(40, 130).bfloat16()
    plain = native.pack_linear(wide[:, 5:69].contiguous())
    assert torch.equal(native.pack_linear(wide[:, 5:69]), plain)
    assert torch.equal(native.pack_linear(wide[:, 5:69].T.contiguous().T), plain)
    assert plain.shape == (3, 64, 16)


_SHIM = """
#include "linear_kernel.h"
extern "C" void portable_linear(const void* x, const void* weight, void* packed, void* out, long rows, long k,
                                long n, int storage) {
  using namespace tarragon;
  const auto kind = static_cast<Storage>(storage);
  pack_panels(weight, packed, n, k, k, kind, 0, panel_count(n));
  LinearCall call{x, packed, nullptr, out, k, rows, k, n, kind, kind};
  linear_run(call, 0, linear_tasks(call));
}
extern "C" const char* portable_set() { return tarragon::linear_instruction_set(); }
"""


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel as CPUs without AVX2 get it, but with this CPU's multiply-add."""
    folder = tmp_path_factory.mktemp("portable")
    (folder / "shim.cpp").write_text(_SHIM)
    library = folder / "portable.so"
    flags = ["-O1", "-march=native", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi"]
    sources = [str(folder / "shim.cpp"), str(build.SOURCES / "linear_kernel.cpp")]
    command = [build.find_compiler(), *flags, "-DTARRAGON_PORTABLE", f"-I{build.SOURCES}", *sources]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=200)
    loaded = ctypes.CDLL(str(library))
    loaded.portable_set.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 65, 70), (2, 65, 70), (3, 65, 70), (23, 600, 37), (65_536, 1, 1)]
)
def test_the_portable_kernel_gives_the_same_bits(
    portable: ctypes.CDLL, m: int, k: int, n: int, dtype: torch.dtype
) -> None:
    assert portable.portable_set().decode().startswith("portable")
    assert ("fma" in portable.portable_set().decode()) == ("fma" in native.instruction_set())
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    if k == 1 and x.element_size() == 2:
        x = (
            torch.arange(m).to(torch.int16).view(dtype)[:, None]
        )  # every value there is, subnormals and NaN too
        weight = torch.full((n, k), 2.0**-9 + 2.0**-12, dtype=dtype)
    packed = torch.empty((n + 15) // 16, k, 16, dtype=dtype)
    out = torch.empty(m, n, dtype=dtype)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, packed, out)]
    numbers = [ctypes.c_long(number) for number in (m, k, n)]
    portable.portable_linear(*pointers, *numbers, ctypes.c_int(DTYPES.index(dtype)))
    wanted = native.linear(x, native.pack_linear(weight), None, n)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(bits(out)[~out.isnan()], bits(wanted)[~out.isnan()])


# ------------------------------------------------------------------ linear: errors, tracing, threads


@pytest.mark.parametrize(
    ("x", "bias", "n", "error"),
    [
        (torch.zeros(2, 9), None, 20, ValueError),
        (torch.zeros(2, 8), None, 33, ValueError),
        (torch.zeros(2, 8), torch.zeros(19), 20, ValueError),
        (torch.zeros(2, 8).bfloat16(), None, 20, TypeError),
        (torch.zeros(2, 8), torch.zeros(20, dtype=torch.int32), 20, TypeError),
    ],
)
def test_linear_refuses_what_does_not_fit(
    x: torch.Tensor, bias: torch.Tensor | None, n: int, error: type[Exception]
) -> None:
    packed = native.pack_linear(torch.zeros(20, 8))
    with pytest.raises(error):
        native.linear(x, packed, bias, n)


def test_packing_refuses_other_types_and_shapes() -> None:
    with pytest.raises(TypeError, match="weight must be bfloat16"):
        native.pack_linear(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        native.pack_linear(torch.zeros(4))
    with pytest.raises(ValueError, match="pack_linear"):
        native.linear(torch.zeros(2, 8), torch.zeros(20, 8), None, 20)


def test_linear_stays_whole_under_the_compiler() -> None:
    packed, bias = native.pack_linear(torch.randn(20, 8)), torch.randn(20)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(str(graph.code))
        return graph

    def model(x: torch.Tensor) -> torch.Tensor:
        return native.linear(x + 1, packed, bias, 20) * 2

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1
    assert "torch.ops.tarragon.linear.default" in graphs[0]
    tests = ("test_schema", "test_faketensor")
    arguments = (torch.randn(3, 8), packed, bias, 20)
    torch.library.opcheck(torch.ops.tarragon.linear.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.tarragon.pack_linear.default, (torch.randn(20, 8),), test_utils=tests)


def test_the_interpreter_lock_is_free_during_a_linear() -> None:
    torch.set_num_threads(1)
    weight = native.pack_linear(torch.zeros(16_384, 576).bfloat16())
    x = torch.zeros(256, 576).bfloat16()
    native.linear(x, weight, None, 16_384)
    span: list[float] = []
    began = threading.Event()

    def work() -> None:
        began.set()
        span.append(time.perf_counter())
        native.linear(x, weight, None, 16_384)
        span.append(time.perf_counter())

    for _ in range(10):
        span.clear()
        began.clear()
        thread = threading.Thread(target=work)
        thread.start()
        assert began.wait(10)
        ticks = []
        while thread.is_alive():
            ticks.append(time.perf_counter())
        start, end = span
        middle = (start + (end - start) * 0.25, start + (end - start) * 0.75)
        if any(middle[0] < tick < middle[1] for tick in ticks):
            return
    pytest.fail("no Python ran while the linear did")


def test_loading_starts_no_thread_and_a_fork_can_compute() -> None:
    script = """
import os, torch
from tarragon import native
before = len(os.listdir("/proc/self/task"))
native.load()
assert len(os.listdir("/proc/self/task")) == before, "loading started a thread"
if (child := os.fork()) == 0:
    torch.set_num_threads(2)
    x = torch.ones(64, 512).bfloat16()
    out = native.linear(x, native.pack_linear(torch.ones(512, 512).bfloat16()), None, 512)
    os._exit(0 if (out == 512).all() and len(os.listdir("/proc/self/task")) > 1 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ building


def test_the_build_is_named_by_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library_path()
    assert path.exists()
    assert build.build() == (path, False)
    monkeypatch.setattr(build, "cpu_features", lambda: "another CPU")
    assert build.library_path() != path


def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: "another CPU")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeError, match=r"no C\+\+ compiler was found: install g\+\+"):
        build.build()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: "another CPU")
    monkeypatch.setattr(build, "_COMPILE_FLAGS", ("-std=no-such-language",))
    with pytest.raises(NativeError, match="no-such-language"):
        build.build()
    assert not build.library_path().exists()


def test_loading_what_is_not_built_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: "another CPU")
    monkeypatch.setattr(ops, "_loaded", False)
    with pytest.raises(NativeError, match=r"python -m tarragon\.native\.build"):
        native.load()
