"""Every version of `attend` against softmax with an explicit mask in float64."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch
from _pytest.mark import ParameterSet
from lmcache_rag_kernels import attend, attend_weighing
from lmcache_rag_kernels.attend import _say_not_compiled, cpu, reference
from torch import Tensor

# Relative error of the whole output: the kernel computes in float32, and a bfloat16 result has 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# The reference rounds bfloat16 logits and weights as PyTorch does.
REFERENCE_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}

needs_cpp = pytest.mark.skipif(not cpu.compiled(), reason="the C++ extension is not compiled")
AVAILABLE = cpu.instruction_sets(torch.bfloat16) if cpu.compiled() else []


def _cpp(isa: str) -> ParameterSet:
    missing = "the C++ extension is not compiled" if not cpu.compiled() else f"this machine cannot run {isa}"
    return pytest.param(isa, id=f"cpp-{isa}", marks=pytest.mark.skipif(isa not in AVAILABLE, reason=missing))


VERSIONS = [pytest.param("reference", id="reference"), *(_cpp(isa) for isa in ("amx", "avx512", "avx2", "generic"))]


def _dtype(version: str) -> torch.dtype:
    return torch.bfloat16 if version == "amx" else torch.float32


def _version(name: str) -> Callable[..., None]:
    if name == "reference":
        return reference.attend

    def run(
        query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
    ) -> None:
        assert cpu.supports(query, key, value, positions, out)
        cpu.attend(query, key, value, positions, scale=scale, window=window, out=out, isa=name)

    return run


def _weights(query: Tensor, key: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """float64 `[heads, queries, tokens]`."""
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("nhd,thd->hnt", query.double(), keys) * scale
    token = torch.arange(key.shape[0])
    hidden = token > positions[:, None]
    if window is not None:
        hidden |= token <= positions[:, None] - window
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def _naive(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None) -> Tensor:
    values = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hnt,thd->nhd", _weights(query, key, positions, scale, window), values)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _inputs(
    *, n: int, tokens: int, kv_heads: int = 2, group: int = 1, head_size: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(n, kv_heads * group, head_size, dtype=dtype)
    key, value = torch.randn(2, tokens, kv_heads, head_size, dtype=dtype)
    return query, key, value, torch.randperm(tokens)[:n].sort().values


def _check(version: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor], window: int | None = None) -> None:
    query = inputs[0]
    scale = query.shape[-1] ** -0.5
    out = torch.full_like(query, torch.nan)
    _version(version)(*inputs, scale=scale, window=window, out=out)
    tolerance = (REFERENCE_TOLERANCE if version == "reference" else TOLERANCE)[query.dtype]
    error = _error(out, _naive(*inputs, scale=scale, window=window))
    print(f"relative error {error:.1e}")
    assert error < tolerance


@pytest.mark.parametrize("window", [None, 5, 100], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("n, tokens", [(1, 1), (1, 130), (7, 7), (7, 64), (64, 301), (129, 700)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_scattered_queries(version: str, n: int, tokens: int, window: int | None) -> None:
    _check(version, _inputs(n=n, tokens=tokens, dtype=_dtype(version)), window)


@pytest.mark.parametrize("head_size", [8, 64, 80, 128, 256], ids=lambda d: f"head-size-{d}")
@pytest.mark.parametrize("group", [1, 3, 4], ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("version", VERSIONS)
def test_heads_and_dtypes(version: str, dtype: torch.dtype, group: int, head_size: int) -> None:
    if version == "amx" and dtype is not torch.bfloat16:
        pytest.skip("AMX multiplies bfloat16")
    _check(version, _inputs(n=50, tokens=150, group=group, head_size=head_size, dtype=dtype))


@pytest.mark.parametrize("window", [None, 30], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("version", VERSIONS)
def test_contiguous_queries(version: str, window: int | None) -> None:
    query, key, value, _ = _inputs(n=129, tokens=149, group=3, dtype=_dtype(version))
    _check(version, (query, key, value, torch.arange(20, 149)), window)


@pytest.mark.parametrize("version", VERSIONS)
def test_repeated_positions(version: str) -> None:
    query, key, value, _ = _inputs(n=4, tokens=20, dtype=_dtype(version))
    _check(version, (query, key, value, torch.tensor([3, 3, 3, 11])))


@pytest.mark.parametrize("version", VERSIONS)
def test_many_kv_heads(version: str) -> None:
    # More than the kernel packs at a time.
    _check(version, _inputs(n=7, tokens=700, kv_heads=16, head_size=128, dtype=_dtype(version)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("version", VERSIONS)
def test_strided_views(version: str, dtype: torch.dtype) -> None:
    if version == "amx" and dtype is not torch.bfloat16:
        pytest.skip("AMX multiplies bfloat16")
    n, tokens, heads, kv_heads, head_size = 33, 140, 6, 2, 64
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_size, dtype=dtype)
    query = qkv[:n, :heads]
    by_head = torch.randn(2, kv_heads, tokens, head_size + 8, dtype=dtype)
    out = torch.zeros(n, heads + 1, head_size + 8, dtype=dtype)
    positions = torch.randperm(tokens)[:n].sort().values
    for key, value in (
        (qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]),
        (by_head[0].transpose(0, 1)[..., 8:], by_head[1].transpose(0, 1)[..., :-8]),
    ):
        view = out[:, 1:, 8:]
        _version(version)(query, key, value, positions, scale=0.125, window=None, out=view)
        expected = _naive(query, key, value, positions, scale=0.125, window=None)
        assert _error(view, expected) < (REFERENCE_TOLERANCE if version == "reference" else TOLERANCE)[dtype]
    assert not out[:, 0].any() and not out[..., :8].any(), "wrote outside of the view"


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_after_the_last_position_are_not_read(version: str) -> None:
    query, key, value, _ = _inputs(n=7, tokens=200, dtype=_dtype(version))
    positions = torch.tensor([0, 1, 64, 65, 100, 127, 130])
    key[131:] = torch.nan
    value[131:] = torch.nan
    out = torch.empty_like(query)
    _version(version)(query, key, value, positions, scale=0.125, window=None, out=out)
    expected = _naive(query, key[:131], value[:131], positions, scale=0.125, window=None)
    assert _error(out, expected) < TOLERANCE[query.dtype]


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_rows_between_windows_are_not_read(version: str) -> None:
    query, key, value, _ = _inputs(n=2, tokens=200, dtype=_dtype(version))
    positions = torch.tensor([10, 190])
    expected = _naive(query, key, value, positions, scale=0.125, window=8)
    key[11:183] = torch.nan
    value[11:183] = torch.nan
    out = torch.empty_like(query)
    _version(version)(query, key, value, positions, scale=0.125, window=8, out=out)
    assert _error(out, expected) < TOLERANCE[query.dtype]


@pytest.mark.parametrize("version", VERSIONS)
def test_large_and_growing_logits(version: str) -> None:
    # Logits to about 1,000: the running maximum is raised many times, and most weights underflow.
    query, key, value, positions = _inputs(n=64, tokens=300, dtype=_dtype(version))
    key *= torch.arange(1, 301)[:, None, None] * 0.3
    out = torch.empty_like(query)
    _version(version)(query, key, value, positions, scale=1.0, window=None, out=out)
    # A logit of 1,000 has an absolute error of about 1e-4 in float32.
    tolerance = max(2e-4, TOLERANCE[query.dtype])
    assert _error(out, _naive(query, key, value, positions, scale=1.0, window=None)) < tolerance


@pytest.mark.parametrize("version", VERSIONS)
def test_nan_in_a_visible_row_is_not_hidden(version: str) -> None:
    query, key, value, _ = _inputs(n=2, tokens=200, dtype=_dtype(version))
    value[50] = torch.nan
    out = torch.empty_like(query)
    _version(version)(query, key, value, torch.tensor([100, 150]), scale=0.125, window=None, out=out)
    assert out.isnan().all()


@needs_cpp
def test_reference_and_cpp_agree() -> None:
    inputs = _inputs(n=129, tokens=700, group=3)
    ours, theirs = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    cpu.attend(*inputs, scale=0.125, window=None, out=ours)
    reference.attend(*inputs, scale=0.125, window=None, out=theirs)
    assert _error(ours, theirs.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_size, dtype", [(20, torch.float32), (264, torch.float32), (64, torch.float64)], ids=str)
def test_other_inputs_take_the_reference(head_size: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n=7, tokens=40, head_size=head_size, dtype=dtype)
    out = torch.empty_like(inputs[0])
    assert not cpu.supports(*inputs, out)
    attend(*inputs, scale=0.125, window=None, out=out)
    assert _error(out, _naive(*inputs, scale=0.125, window=None)) < TOLERANCE[torch.float32]


def test_without_the_extension_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "_attend", None)
    _say_not_compiled.cache_clear()
    inputs = _inputs(n=7, tokens=40)
    out = torch.empty_like(inputs[0])
    with caplog.at_level(logging.WARNING):
        attend(*inputs, scale=0.125, window=None, out=out)
        attend(*inputs, scale=0.125, window=None, out=out)
    assert [r.message for r in caplog.records if "not compiled" in r.message] == [caplog.records[0].message]
    assert _error(out, _naive(*inputs, scale=0.125, window=None)) < TOLERANCE[torch.float32]
    _say_not_compiled.cache_clear()


def test_no_queries() -> None:
    query, key, value, positions = _inputs(n=0, tokens=40)
    attend(query, key, value, positions, scale=0.125, window=None, out=torch.empty_like(query))


@needs_cpp
@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": torch.tensor([3, 2])}, "ascending"),
        ({"positions": torch.tensor([0, 40])}, "positions"),
        ({"positions": torch.tensor([-1, 4])}, "positions"),
        ({"positions": torch.tensor([1])}, "positions"),
        ({"key": torch.zeros(40, 3, 64), "value": torch.zeros(40, 3, 64)}, "kv_heads"),
        ({"value": torch.zeros(39, 2, 64)}, "key and value"),
        ({"out": torch.zeros(2, 2, 64)}, "query and out"),
    ],
    ids=["descending", "too-large", "negative", "too-few", "kv-heads", "value-shape", "out-shape"],
)
def test_errors_name_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Tensor] = {
        "query": torch.zeros(2, 4, 64),
        "key": torch.zeros(40, 2, 64),
        "value": torch.zeros(40, 2, 64),
        "positions": torch.tensor([1, 2]),
        "out": torch.zeros(2, 4, 64),
    }
    with pytest.raises(ValueError, match=message):
        attend(**(arguments | change), scale=0.125, window=None)
    with pytest.raises(ValueError, match="scale"):
        attend(**arguments, scale=0.0, window=None)


@pytest.mark.skipif("amx" not in AVAILABLE, reason="this machine has no AMX")
def test_amx_leaves_its_registers_to_others() -> None:
    """oneDNN's products, which are in AMX too, in the same threads before and after."""
    inputs, weights = _inputs(n=64, tokens=300, group=3, dtype=torch.bfloat16), torch.randn(576, 576).bfloat16()
    rows = torch.randn(300, 576).bfloat16()
    expected, out = rows @ weights, torch.empty_like(inputs[0])
    for _ in range(3):
        cpu.attend(*inputs, scale=0.125, window=None, out=out, isa="amx")
        assert torch.equal(rows @ weights, expected)
    assert _error(out, _naive(*inputs, scale=0.125, window=None)) < TOLERANCE[torch.bfloat16]


@needs_cpp
def test_what_an_instruction_set_does_not_take() -> None:
    inputs = _inputs(n=2, tokens=40)
    with pytest.raises(ValueError, match="cannot run 'amx' in float32"):
        cpu.attend(*inputs, scale=0.125, window=None, out=torch.empty_like(inputs[0]), isa="amx")


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_and_calling_threads(threads: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n=64, tokens=300, group=3, dtype=dtype)
    expected = _naive(*inputs, scale=0.125, window=None)
    errors: list[float] = []

    def call() -> None:
        out = torch.empty_like(inputs[0])
        for _ in range(3):
            out.fill_(torch.nan)
            attend(*inputs, scale=0.125, window=None, out=out)
            errors.append(_error(out, expected))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
        callers = [threading.Thread(target=call) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(errors) == 9
    assert max(errors) < TOLERANCE[dtype]


def test_attend_weighing_in_half_precision() -> None:
    """Products beyond float16's range, though the logits are not."""
    query, key, value, positions = _inputs(n=9, tokens=50)
    query, key, value = (query * 100).half(), (key * 100).half(), value.half()
    out = torch.empty_like(query)
    mass = attend_weighing(query, key, value, positions, scale=0.01, window=None, out=out)
    assert out.isfinite().all()
    assert float(mass.sum()) == pytest.approx(9 * query.shape[1], rel=1e-2)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", [_cpp(isa) for isa in ("avx512", "avx2", "generic")])
@pytest.mark.parametrize(
    ("tokens", "n", "kv_heads", "group", "head_size", "window"),
    [(200, 70, 2, 3, 64, None), (200, 70, 2, 3, 64, 30), (1300, 33, 3, 3, 64, None), (65, 65, 4, 1, 80, None),
     (129, 40, 1, 8, 128, 64), (9, 1, 1, 1, 8, None)],
)  # fmt: skip
def test_cpp_weighs(
    isa: str, dtype: torch.dtype, tokens: int, n: int, kv_heads: int, group: int, head_size: int, window: int | None
) -> None:
    query, key, value, positions = _inputs(
        n=n, tokens=tokens, kv_heads=kv_heads, group=group, head_size=head_size, dtype=dtype
    )
    out, expected_out = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
    mass, again = torch.ones(tokens), torch.zeros(tokens)  # what is there is added to
    asked = {"scale": 0.125, "window": window, "out": out, "isa": isa}
    cpu.attend(query, key, value, positions, mass=mass, **asked)
    cpu.attend(query, key, value, positions, mass=again, **asked)
    expected = reference.attend_weighing(
        query.float(), key.float(), value.float(), positions, scale=0.125, window=window, out=expected_out
    )
    assert _error(mass - 1, expected) < 1e-5 and _error(again, expected) < 1e-6
    assert _error(out.float(), expected_out) < TOLERANCE[dtype]
    once_more = torch.zeros(tokens)
    cpu.attend(query, key, value, positions, mass=once_more, **asked)
    assert torch.equal(once_more, again)  # whichever thread computes what


@needs_cpp
def test_a_mass_of_other_keys_is_refused() -> None:
    query, key, value, positions = _inputs(n=4, tokens=20)
    with pytest.raises(ValueError, match="one element per key"):
        cpu.attend(
            query, key, value, positions, scale=1.0, window=None, out=torch.empty_like(query), mass=torch.zeros(19)
        )


@pytest.mark.parametrize("window", [None, 30], ids=lambda w: f"window-{w}")
def test_attend_weighing(window: int | None) -> None:
    query, key, value, positions = _inputs(n=70, tokens=200, group=3)
    out = torch.full_like(query, torch.nan)
    mass = attend_weighing(query, key, value, positions, scale=0.125, window=window, out=out)
    assert _error(out, _naive(query, key, value, positions, scale=0.125, window=window)) < 2e-6
    assert mass.sum() == pytest.approx(70 * 6, rel=1e-5)
    assert _error(mass, _weights(query, key, positions, 0.125, window).sum((0, 1))) < 2e-6
