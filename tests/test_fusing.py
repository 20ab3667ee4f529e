"""Adapters fused into one quantized layer of every scheme, and taken out again."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from diffusers_ldmq.affine import weight_codes
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.fusing import KEPT, fuse, held_by, is_fusible, to_fuse, unfuse
from diffusers_ldmq.layers import QuantizedLayer, quantize_layer
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.specs import SCHEMES, LayerState, parse_scheme

QUANTIZED = (*SCHEMES[1:], "w4a16-g8")
KINDS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(48, 32),
    "conv": lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2),
    "conv 1x1 without bias": lambda: nn.Conv2d(16, 32, 1, bias=False),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def made(kind: str, scheme: str) -> tuple[Any, Any, Tensor]:
    """(float layer, its quantized twin, an input)."""
    torch.manual_seed(0)
    layer = KINDS[kind]()
    x = nn.functional.silu(torch.randn(4, 48) if kind == "linear" else torch.randn(2, 16, 8, 8))
    observer = OBSERVERS["minmax-affine"]()
    observer.update(x)
    return layer, quantize_layer(layer, layer_state("layer", layer, parse_scheme(scheme), observer)), x


def adapted(base: Any, *names: str, **options: Any) -> Any:
    """peft's adapter layer around `base`, with seeded adapters of rank 4; the same for every base of a shape."""
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=True, **options)
    kind = LoraLinear if isinstance(base, nn.Linear) else LoraConv2d
    if isinstance(base, nn.Conv2d):
        vars(base._parameters["weight"])["dim"] = lambda: 4  # as lora.add_adapter does while a model gets its adapters
    layer: Any = kind(base, names[0], r=4, lora_alpha=8, config=config)
    for name in names[1:]:
        layer.update_layer(name, 4, 8, config=config)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        for part in (layer.lora_A[name], layer.lora_B[name]):
            for value in part.parameters():
                value.data.copy_(torch.randn_like(value) * 0.1)
    layer.set_adapter(list(names))
    vars(base._parameters["weight"]).pop("dim", None)
    return layer.eval()


def fuse_all(layer: Any, *names: str, scale: float = 1.0) -> None:
    """What `fuse_lora` does with one layer."""
    assert is_fusible(layer)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells that others are merged already
        chosen = to_fuse(layer, list(names) or None)
        scales = {name: layer.scaling[name] * scale for name in chosen}
        fuse(layer, held_by(layer.base_layer), scales, False, torch.float32)


def output(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state().tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """True if both hold the same names with the same dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def bits(scheme: str) -> int:
    spec = parse_scheme(scheme).weight
    assert spec is not None
    return spec.bits


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_fused_adapter_changes_the_output_as_the_attached_one_does(kind: str, scheme: str) -> None:
    layer, base, x = made(kind, scheme)
    truth = output(adapted(layer, "a"), x)
    plain = output(base, x)
    adapter = adapted(base, "a")
    attached = output(adapter, x)
    assert sqnr(attached, plain) < 15  # the adapter's own effect is far above the noise
    fuse_all(adapter)
    fused = output(adapter, x)
    assert adapter.merged_adapters == ["a"]
    assert torch.equal(fused, output(base, x))  # all of it is in the base layer
    if bits(scheme) == 8:
        # the weight is rounded a second time, in the steps of the sum, which are wider
        assert sqnr(truth, fused) > max(sqnr(truth, attached) - 8, 35)
    else:  # the very same numbers, only added elsewhere
        assert sqnr(attached, fused) > 100


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_unfusing_restores_every_tensor_bit_for_bit(kind: str, scheme: str) -> None:
    _, base, x = made(kind, scheme)
    before = tensors(base)
    adapter = adapted(base, "a", "b")
    attached = output(adapter, x)
    fuse_all(adapter, "b")
    fuse_all(adapter, "a", scale=0.5)
    assert not same(tensors(base), before)
    output(adapter, x)  # packs
    adapter.unmerge()  # what diffusers' pipelines call
    assert same(tensors(base), before)
    assert not adapter.merged
    assert KEPT not in vars(adapter)
    assert torch.equal(output(adapter, x), attached)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4", "w4a16-g8"])
def test_below_8_bits_the_codes_stay_and_the_adapters_run_beside_them(kind: str, scheme: str) -> None:
    _, base, _ = made(kind, scheme)
    before = tensors(base)
    adapter = adapted(base, "a", "b")
    fuse_all(adapter)
    after = tensors(base)
    assert base.rank == 8
    assert after.keys() - before.keys() == {"low_rank_a", "low_rank_b"}
    assert same({name: after[name] for name in before}, before)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w8a8-dyn"])
def test_at_8_bits_only_codes_and_weight_scales_change(kind: str, scheme: str) -> None:
    """What the layer reads does not change, so the range of its input does not either."""
    _, base, _ = made(kind, scheme)
    before = tensors(base)
    fuse_all(adapted(base, "a"))
    after = tensors(base)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight", "weight_scale"}


def test_requantizing_4_bit_weights_would_erase_the_adapter() -> None:
    """Why there is a branch: an adapter of the usual size changes almost no 4-bit code."""
    from diffusers_ldmq.affine import dequantize_weight, quantize_weight
    from diffusers_ldmq.affine import weight_qparams_mse as scales

    layer, base, _ = made("linear", "w4a16")
    state, spec = base.state(), parse_scheme("w4a16").weight
    assert spec is not None
    delta = torch.randn(32, 48) * layer.weight.std() * 0.02
    weight = dequantize_weight(state, layer.weight.shape) + delta
    codes, scale = quantize_weight(weight, scales(weight, spec), spec)
    again = dequantize_weight(replace(state, weight=codes, weight_scale=scale), weight.shape)
    assert sqnr(delta, again - dequantize_weight(state, weight.shape)) < 3


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_a_second_fuse_rounds_nothing_twice(kind: str, scheme: str) -> None:
    _, base, _ = made(kind, scheme)
    adapter = adapted(base, "a", "b")
    fuse_all(adapter, "a", "b")
    together = tensors(base)
    adapter.unmerge()
    fuse_all(adapter, "a")
    adapter.set_scale("a", 7.0)  # of the attached one; what is fused keeps the scale that it was fused with
    fuse_all(adapter, "b")
    assert adapter.merged_adapters == ["a", "b"]
    assert same(tensors(base), together)


def test_fusing_twice_the_same_adapter_adds_it_once() -> None:
    _, base, _ = made("linear", "w8a16")
    adapter = adapted(base, "a")
    fuse_all(adapter)
    once = tensors(base)
    assert not _chosen(adapter)
    assert same(tensors(base), once)


def _chosen(adapter: Any) -> list[str]:
    with pytest.warns(UserWarning, match="already merged"):
        return to_fuse(adapter, None)


def test_an_adapter_deleted_while_fused_stays_in_until_unfused() -> None:
    layer, base, x = made("linear", "w8a16")
    truth = output(adapted(layer, "a", "b"), x)
    before = tensors(base)
    adapter = adapted(base, "a", "b")
    fuse_all(adapter, "a")
    adapter.delete_adapter("a")
    fuse_all(adapter, "b")
    assert sqnr(truth, output(adapter, x)) > 35
    adapter.unmerge()
    assert same(tensors(base), before)


def test_lora_scale_scales_what_is_fused_and_nothing_else() -> None:
    layer, base, x = made("linear", "w8a16")
    twin = adapted(layer, "a")
    twin.scale_layer(0.25)
    adapter = adapted(base, "a")
    attached = output(adapter, x)
    fuse_all(adapter, scale=0.25)
    assert sqnr(output(twin, x), output(adapter, x)) > 35
    adapter.unmerge()
    assert torch.equal(output(adapter, x), attached)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_adapters_bias_goes_into_the_layers_bias(kind: str, scheme: str) -> None:
    _, base, x = made(kind, scheme)
    before = tensors(base)
    adapter = adapted(base, "a", lora_bias=True)
    attached = output(adapter, x)
    fuse_all(adapter)
    assert not torch.equal(tensors(base)["bias"], before["bias"])
    assert sqnr(attached, output(adapter, x)) > 30
    adapter.unmerge()
    assert same(tensors(base), before)


def test_more_directions_than_the_weight_has_fold_into_an_exact_branch(kind: str) -> None:
    _, base, x = made(kind, "w4a16")
    names = tuple("abcdefghijklm")  # rank 4 each: 52 beside a smaller side of 32 or 16
    adapter = adapted(base, *names)
    attached = output(adapter, x)
    fuse_all(adapter)
    assert base.rank == min(base.geometry.shape[0], base.geometry.columns)
    assert sqnr(attached, output(adapter, x)) > 100


def test_a_branch_that_is_there_already_is_kept_in_front(kind: str) -> None:
    _, base, x = made(kind, "w4a8")
    rows, columns = base.geometry.shape[0], base.geometry.columns
    a, b = torch.randn(3, columns).half().float(), torch.randn(rows, 3).half().float()
    base.load_state(replace(base.state(), low_rank_a=a, low_rank_b=b))
    before = tensors(base)
    adapter = adapted(base, "a")
    attached = output(adapter, x)
    fuse_all(adapter)
    assert base.rank == 7
    assert torch.equal(tensors(base)["low_rank_a"][:3], a)
    assert torch.equal(tensors(base)["low_rank_b"][:, :3], b)
    assert sqnr(attached, output(adapter, x)) > 100
    adapter.unmerge()
    assert same(tensors(base), before)


def test_a_branch_takes_the_layers_floating_dtype() -> None:
    _, base, _ = made("linear", "w4a16")
    base.load_state(replace(base.state(), bias=base.bias.detach().bfloat16()))
    fuse_all(adapted(base, "a"))
    assert base.low_rank_a.dtype == base.low_rank_b.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_nan_and_inf_are_refused_and_change_nothing(scheme: str, value: float) -> None:
    _, base, _ = made("linear", scheme)
    before = tensors(base)
    adapter = adapted(base, "a")
    adapter.lora_A["a"].weight.data[0, 0] = value
    with pytest.raises(LDMQError, match="NaN or Inf in the sum with a; the adapter file is damaged"):
        fuse_all(adapter)
    assert same(tensors(base), before)
    assert adapter.base_layer is base
    assert not adapter.merged


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_copy_of_a_fused_layer_is_unfused_by_itself(scheme: str, copied: Callable[[Any], Any]) -> None:
    _, base, x = made("linear", scheme)
    before = tensors(base)
    adapter = adapted(base, "a")
    fuse_all(adapter)
    output(adapter, x)  # packed forms survive neither way of copying
    fused = tensors(base)
    twin = copied(adapter)
    assert torch.equal(output(twin, x), output(adapter, x))
    twin.unmerge()
    assert same(tensors(twin.base_layer), before)
    assert same(tensors(base), fused)
    assert adapter.merged


def test_disabling_fused_adapters_takes_them_out() -> None:
    """peft's forward unmerges where adapters are disabled; also in inference mode the layer stays usable."""
    _, base, x = made("linear", "w8a8")
    plain = output(base, x)
    adapter = adapted(base, "a")
    attached = output(adapter, x)
    fuse_all(adapter)
    adapter.enable_adapters(False)
    with torch.inference_mode():
        assert torch.equal(adapter(x), plain)
    adapter.enable_adapters(True)
    assert torch.equal(output(adapter, x), attached)
    x.requires_grad_()
    adapter(x).sum().backward()  # an inference tensor in the layer would raise


def test_a_layer_cast_while_fused_comes_back_in_its_new_dtype() -> None:
    _, base, _ = made("linear", "w4a8")
    before = tensors(base)
    adapter = adapted(base, "a")
    fuse_all(adapter)
    base.to(torch.bfloat16)
    adapter.unmerge()
    after = tensors(base)
    assert after.pop("bias").dtype == torch.bfloat16
    del before["bias"]
    assert same(after, before)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_a_layer_dequantized_while_fused_is_the_fused_float_layer_and_can_be_unfused(scheme: str) -> None:
    _, base, x = made("linear", scheme)
    adapter = adapted(base, "a")
    attached, original = output(adapter, x), base.dequantize().weight.clone()
    fuse_all(adapter)
    fused = output(adapter, x)
    adapter.base_layer = base.dequantize()
    assert sqnr(fused, output(adapter, x)) > 90
    adapter.unmerge()
    assert torch.equal(adapter.base_layer.weight, original)
    assert sqnr(attached, output(adapter, x)) > 90


def test_a_float_layer_gets_its_very_weights_back() -> None:
    """peft subtracts what it added, which leaves rounding errors behind."""
    layer, _, x = made("linear", "w8a16")
    weight = layer.weight.clone()
    adapter = adapted(layer, "a")
    fuse_all(adapter, scale=0.3)
    assert not torch.equal(layer.weight, weight)
    unfuse(adapter)
    assert torch.equal(layer.weight, weight)
    assert not adapter.merged
    assert output(adapter, x).isfinite().all()


def test_offloaded_weights_are_refused_with_the_call_that_helps() -> None:
    _, base, _ = made("linear", "w8a16")
    adapter = adapted(base, "a")
    base.to("meta")
    with pytest.raises(LDMQError, match=r"its weights are offloaded; call pipe.remove_all_hooks\(\), fuse"):
        fuse_all(adapter)


def test_the_codes_of_an_8_bit_layer_really_hold_the_sum() -> None:
    """The integers themselves, exactly: those of the dequantized weight plus the adapter, min-max per row."""
    _, base, _ = made("linear", "w8a16")
    before: LayerState = base.state()
    adapter = adapted(base, "a")
    delta = adapter.get_delta_weight("a").detach()
    fuse_all(adapter)
    after = base.state()
    shape = torch.Size((32, 48))
    whole = weight_codes(before, shape).float() * before.weight_scale[:, None] + delta
    scale = whole.abs().amax(1) / 127
    assert torch.equal(after.weight_scale, scale)
    assert torch.equal(weight_codes(after, shape), (whole * (1 / scale)[:, None]).round().to(torch.int8))
