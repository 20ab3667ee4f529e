"""Integer attention against floating point, compiled and in torch operators."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffusers_ldmq.backends.native import native_status
from diffusers_ldmq.integer_attention import STEPS, integer_attention
from diffusers_ldmq.metrics import sqnr


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways to work."""
    monkeypatch.setenv("LDMQ_NATIVE", "1" if request.param else "0")
    native_status.cache_clear()
    if request.param and native_status().library is None:
        pytest.skip(native_status().reason)
    yield request.param
    native_status.cache_clear()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, keys: int, channels: int = 40, value_channels: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """As diffusers hands them over: heads are a transposed view."""
    widths = ((tokens, channels), (keys, channels), (keys, value_channels))
    query, key, value = (drawn(2, n, 3, width, seed=n + width).transpose(1, 2) for n, width in widths)
    return query, key, value


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("tokens", "keys", "channels"), [(1, 1, 8), (7, 300, 40), (1100, 513, 40), (64, 77, 160)])
def test_it_is_close_to_float_attention(tokens: int, keys: int, channels: int) -> None:
    query, key, value = qkv(tokens, keys, channels, 24)
    expected = scaled_dot_product_attention(query, key, value)
    measured = integer_attention(query, key, value)
    assert measured.shape == expected.shape
    assert sqnr(expected, measured) > 30


@pytest.mark.usefixtures("native")
def test_attention_to_thousands_of_keys_alike_is_their_mean() -> None:
    """A scale of 1/255 for every row would round all weights to zero."""
    query, key, value = qkv(3, 5000)
    measured = integer_attention(torch.zeros_like(query), key, value)
    assert sqnr(value.mean(-2, keepdim=True).expand_as(measured), measured) > 40


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_small_weights_that_round_to_zero_are_not_missed(offset: float) -> None:
    """Sharp rows over thousands of keys: half of the weight is in codes of 0 and 1, whose rounding shows."""
    query, key, value = qkv(64, 4096)
    expected = scaled_dot_product_attention(2 * query, key, value + offset)
    assert sqnr(expected, integer_attention(2 * query, key, value + offset)) > 25


@pytest.mark.usefixtures("native")
def test_scales_dtypes_and_leading_axes_are_minded() -> None:
    query, key, value = qkv(30, 40)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3)
    assert sqnr(expected, integer_attention(query, key, value, scale=0.3)) > 30
    half = [x.bfloat16() for x in (query, key, value)]
    assert integer_attention(half[0], half[1], half[2]).dtype == torch.bfloat16
    one = integer_attention(query[0, 0], key[0, 0], value[0, 0])
    assert sqnr(integer_attention(query, key, value)[0, 0], one) > 100


@pytest.mark.usefixtures("native")
def test_a_token_far_louder_than_others_leaves_them_alone() -> None:
    query, key, value = qkv(50, 60)
    alone = integer_attention(query, key, value)
    query[:, :, 7] *= 1000
    assert torch.equal(integer_attention(query, key, value)[:, :, 8:], alone[:, :, 8:])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_show(which: int, number: float) -> None:
    tensors = qkv(20, 300)
    tensors[which][0, 0, 3, 2] = number
    measured = integer_attention(*tensors)
    assert not measured[0, 0, 3].isfinite().all()
    assert measured[0, 1].isfinite().all()


@pytest.mark.parametrize("shape", [(20, 30), (2, 1, 1, 30), (2, 3, 20, 30)])
def test_masks_hide_and_add(shape: tuple[int, ...]) -> None:
    query, key, value = qkv(20, 30)
    added = drawn(*shape)
    hidden = (added > -1).index_fill(-1, torch.tensor([0]), True)  # noqa: FBT003  # every row sees the first key
    for mask in (added, hidden):
        expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert sqnr(expected, integer_attention(query, key, value, mask)) > 30


def test_compiled_equals_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    if native_status().library is None:
        pytest.skip(native_status().reason)
    query, key, value = qkv(70, 400)
    compiled = integer_attention(query, key, value)
    monkeypatch.setenv("LDMQ_NATIVE", "0")
    native_status.cache_clear()
    plain = integer_attention(query, key, value)
    native_status.cache_clear()
    # codes of weights may differ by one where exponentials differ in the last bits
    assert sqnr(plain, compiled) > 60


def test_what_falls_on_the_grid_is_exact() -> None:
    """Two weights of 255 and one of 0: the output is the mean of two codes."""
    query = torch.tensor([[127.0, 0.0]])
    key = torch.tensor([[127.0, 0.0], [127.0, 0.0], [-127.0, 0.0]])
    value = torch.tensor([[127.0], [0.0], [-127.0]])
    assert STEPS == 255
    assert integer_attention(query, key, value, scale=1.0).item() == pytest.approx(63.5, rel=1e-6)


def test_autocast_does_not_reach_the_integers() -> None:
    query, key, value = qkv(20, 30)
    alone = integer_attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(integer_attention(query, key, value), alone)
