"""Observers against independent computations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusers_ldmq.affine import SMALLEST_SCALE, QParams, qdq
from diffusers_ldmq.errors import CalibrationError, LDMQError
from diffusers_ldmq.observers import OBSERVERS, Observer
from diffusers_ldmq.specs import QuantSpec

INT8, INT4 = QuantSpec(8, "tensor"), QuantSpec(4, "tensor")

SAMPLES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda g: torch.randn(4, 1000, generator=g),
    "one-sided": lambda g: torch.nn.functional.silu(3 * torch.randn(4, 1000, generator=g)),
    "outlier": lambda g: torch.cat([torch.randn(3999, generator=g), torch.tensor([50.0])]),
    "heavy-tailed": lambda g: torch.randn(4000, generator=g) ** 5,
    "all-positive": lambda g: torch.rand(4000, generator=g) + 5,
    "constant": lambda g: torch.full((4000,), -3.0),
    "tiny": lambda g: torch.randn(4000, generator=g) * 1e-20,
    "huge": lambda g: torch.randn(4000, generator=g) * 1e20,
    "zero": lambda g: torch.zeros(4000),
}


@pytest.fixture(params=sorted(SAMPLES))
def sample(request: pytest.FixtureRequest) -> Tensor:
    return SAMPLES[request.param](torch.Generator().manual_seed(0))


@pytest.fixture(params=list(OBSERVERS))
def observer(request: pytest.FixtureRequest) -> Observer:
    return OBSERVERS[request.param]()


def seen(name: str, *values: Tensor) -> Observer:
    observer = OBSERVERS[name]()
    for value in values:
        observer.update(value)
    return observer


def squared_error(x: Tensor, qparams: QParams, spec: QuantSpec) -> float:
    return float((qdq(x, qparams, spec).double() - x.double()).square().sum())


@pytest.mark.parametrize("spec", [INT8, INT4], ids=["int8", "int4"])
def test_minmax_puts_the_largest_magnitude_at_the_highest_code(sample: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = seen("minmax", sample).qparams(spec)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert int(zero_point) == 0
    expected = sample.abs().max() / (127 if spec is INT8 else 7)
    assert float(scale) == max(float(expected), SMALLEST_SCALE)


@pytest.mark.parametrize("spec", [INT8, INT4], ids=["int8", "int4"])
def test_a_one_sided_range_gets_a_zero_point_that_keeps_zero_exact(sample: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = seen("minmax-affine", sample).qparams(spec)
    low, high = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
    if max(-low, high) < 2 * min(-low, high):
        assert torch.equal(scale, sample.abs().max() / (127 if spec is INT8 else 7))
        assert int(zero_point) == 0
    elif high > low:
        assert float(scale) == pytest.approx((high - low) / (255 if spec is INT8 else 15), rel=1e-6)
    assert float(qdq(torch.zeros(1), QParams(scale, zero_point), spec)) == 0.0


def test_a_zero_point_gains_nearly_a_bit_on_one_sided_data() -> None:
    x = SAMPLES["one-sided"](torch.Generator().manual_seed(0))
    symmetric = squared_error(x, seen("minmax", x).qparams(INT8), INT8)
    affine = squared_error(x, seen("minmax-affine", x).qparams(INT8), INT8)
    assert 10 * math.log10(symmetric / affine) > 5


@pytest.mark.parametrize("spec", [INT8, INT4], ids=["int8", "int4"])
def test_mse_is_never_worse_than_minmax_in_squared_error(sample: Tensor, spec: QuantSpec) -> None:
    least = squared_error(sample, seen("mse", sample).qparams(spec), spec)
    for other in ("minmax", "minmax-affine"):
        full = squared_error(sample, seen(other, sample).qparams(spec), spec)
        # the histogram knows values to half a bin of 4096, an 8-bit code is 16 bins
        assert least <= full * 1.01 + 1e-12 * float(sample.double().square().sum())


def test_mse_clips_an_outlier_where_that_pays() -> None:
    x = SAMPLES["outlier"](torch.Generator().manual_seed(0))
    clipped, full = seen("mse", x).qparams(INT4), seen("minmax", x).qparams(INT4)
    assert float(clipped.scale) < 0.95 * float(full.scale)
    assert squared_error(x, clipped, INT4) < 0.9 * squared_error(x, full, INT4)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_merging_equals_one_pass(name: str, sample: Tensor) -> None:
    parts = sample.flatten().chunk(3)
    parts = (parts[0] * 0.01, parts[1], parts[2] * 3)  # ranges that make the histogram grow both ways
    whole = seen(name, *parts).qparams(INT8)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        merged = seen(name)
        for index in order:
            merged.merge(seen(name, parts[index]))
        assert torch.equal(merged.qparams(INT8).scale, whole.scale)
        assert torch.equal(merged.qparams(INT8).zero_point, whole.zero_point)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", ["first", "last"])
def test_nan_and_infinity_are_remembered_and_refused(observer: Observer, bad: float, position: str) -> None:
    good, broken = torch.randn(10), torch.tensor([1.0, bad])
    for value in (broken, good) if position == "first" else (good, broken):
        observer.update(value)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        observer.qparams(INT8)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_nan_survives_merging(name: str) -> None:
    merged = seen(name, torch.randn(10))
    merged.merge(seen(name, torch.tensor([torch.nan])))
    merged.update(torch.randn(10))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        merged.qparams(INT8)


def test_an_observer_that_saw_nothing_refuses(observer: Observer) -> None:
    observer.update(torch.empty(0, 4))
    with pytest.raises(CalibrationError, match="was observed"):
        observer.qparams(INT8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_observed(observer: Observer, dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    observer.update(x)
    assert float(observer.qparams(INT8).scale) == pytest.approx(float(x.float().abs().max()) / 127, rel=0.15)


def test_memory_does_not_grow_with_the_number_of_calls(observer: Observer) -> None:
    def held() -> int:
        return sum(value.numel() for value in vars(observer).values() if isinstance(value, Tensor))

    observer.update(torch.randn(100))
    after_one = held()
    for _ in range(20):
        observer.update(torch.randn(1000) * 10)
    assert held() == after_one


def test_an_unknown_observer_lists_the_known_ones() -> None:
    with pytest.raises(LDMQError, match="unknown observer 'best'; known: minmax, minmax-affine, mse"):
        OBSERVERS["best"]
