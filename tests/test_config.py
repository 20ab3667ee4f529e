"""LDMQConfig: what it takes, what it says of itself, and which descriptions it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_files import INTACT, config_edited, first_layer
from diffusers import UNet2DModel

from diffusers_ldmq import LDMQConfig, make_plan
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.families import layer_table

CONFIG_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda c: c.update(format_version=2), r"format_version 2.*pip install -U diffusers-ldmq"),
    "negative": (lambda c: c.update(format_version=-1), "format_version is -1, expected 1"),
    "string": (lambda c: c.update(format_version="1"), "format_version is '1', expected 1"),
    "bool": (lambda c: c.update(format_version=True), "format_version is True, expected 1"),
    "unknown key": (lambda c: c.update(surprise=1), r"unknown keys \['surprise'\]"),
    "no layers": (lambda c: c.update(layers={}), "names no layers"),
    "layers list": (lambda c: c.update(layers=[1]), "'layers' is a list, expected an object"),
    "entry string": (lambda c: c["layers"].update(conv_in="w8a8"), "layer 'conv_in': expected scheme and tensors"),
    "entry key": (lambda c: first_layer(c).update(bits=8), "expected scheme and tensors"),
    "tensors string": (lambda c: first_layer(c).update(tensors="weight"), "expected scheme and tensors"),
    "tensors numbers": (lambda c: first_layer(c).update(tensors=[1, ["weight"]]), "expected scheme and tensors"),
    "unknown scheme": (lambda c: first_layer(c).update(scheme="w3a8"), "unknown scheme 'w3a8'"),
    "number scheme": (lambda c: first_layer(c).update(scheme=8), "unknown scheme 8"),
    "float scheme": (lambda c: first_layer(c).update(scheme="float"), "layer '.*': .*float"),
    "scheme and tensors differ": (lambda c: first_layer(c).update(scheme="w8a16"), "a w8a16 layer has tensors"),
    "tensor not named": (lambda c: first_layer(c)["tensors"].remove("weight_scale"), "always .*weight_scale"),
    "bias not named": (lambda c: first_layer(c)["tensors"].remove("bias"), "'bias': the checkpoint holds this tensor"),
    "unknown tensor": (lambda c: first_layer(c)["tensors"].append("surprise"), "surprise"),
    "absent layer": (
        lambda c: c["layers"].update(absent={"scheme": "w8a8", "tensors": []}),
        "names layer 'absent', which UNet2DModel lacks",
    ),
    "a norm": (
        lambda c: c["layers"].update(conv_norm_out={"scheme": "w8a8", "tensors": []}),
        "names layer 'conv_norm_out', which UNet2DModel lacks",
    ),
    "layer left out": (lambda c: c["layers"].pop(next(iter(c["layers"]))), "holds this tensor|dtype"),
    "compute dtype": (lambda c: c.update(compute_dtype="load"), "compute_dtype"),
    "compute dtype number": (lambda c: c.update(compute_dtype=32), "compute_dtype"),
}


@pytest.mark.parametrize("damage", list(CONFIG_DAMAGES))
def test_a_damaged_config_is_refused(damage: str, tmp_path: Path) -> None:
    edit, match = CONFIG_DAMAGES[damage]
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(config_edited(INTACT, tmp_path, edit))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": ({"plan": "w3a16"}, "unknown scheme 'w3a16'; use one of .*w8a16"),
    "0 bits": ({"plan": "w0a16"}, "unknown scheme 'w0a16'"),
    "number": ({"plan": 8}, "plan is a int; expected a scheme's name, a Plan, the path of a plan.json, or a dict"),
    "bool": ({"plan": True}, "plan is a bool"),
    "nan": ({"plan": float("nan")}, "plan is a float"),
    "list": ({"plan": ["w8a16"]}, "plan is a list"),
    "empty": ({"plan": {}}, "the plan is empty"),
    "number scheme": ({"plan": {"conv_in": 8}}, "plan, 'conv_in': the scheme is 8, expected e.g. w8a16"),
    "unknown in dict": ({"plan": {"conv_in": "int8"}}, "unknown scheme 'int8'"),
    "no such file": ({"plan": "no/such/plan.json"}, "no/such/plan.json: no such file"),
    "calibrated": ({"plan": "w8a8"}, "scheme w8a8 has calibrated activations.*QuantizedLDMPipeline.*`ldmq quantize`"),
    "calibrated in dict": ({"plan": {"mid_block": "w4a8"}}, "layer 'mid_block': scheme w4a8 has calibrated"),
    "newer plan": ({"plan": {"format_version": 9, "planner": "x"}}, "format_version 9, expected 1 to 1"),
    "names as text": ({"plan": "w8a16", "modules_to_not_convert": "conv_in"}, "is 'conv_in', expected a list of names"),
    "names as number": ({"plan": "w8a16", "modules_to_not_convert": 3}, "is 3, expected a list of names"),
    "names of numbers": ({"plan": "w8a16", "modules_to_not_convert": [1]}, r"is \[1\], expected a list of names"),
    "mistyped": ({"plan": "w8a16", "module_to_not_convert": []}, "unknown keys .*mistyped.*modules_to_not_convert"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_cannot_be_meant_is_refused_g3(wrong: str) -> None:
    arguments, match = WRONG[wrong]
    with pytest.raises(LDMQError, match=match):
        LDMQConfig(**arguments)


def test_a_plan_is_a_scheme_a_plan_its_dict_its_file_or_schemes_by_name(denoiser_of: Any, tmp_path: Path) -> None:
    plan = make_plan(layer_table(denoiser_of("pixel")), planner="uniform", scheme="w4a16")
    plan.save(tmp_path / "plan.json")
    forms = [LDMQConfig(form).plan for form in (plan, plan.to_dict(), tmp_path / "plan.json", f"{tmp_path}/plan.json")]
    assert all(form == forms[0] for form in forms)
    assert LDMQConfig("w8a16").plan == "w8a16"
    assert LDMQConfig({"mid_block": "w8a16"}).plan == {"mid_block": "w8a16"}


def test_a_config_is_json_without_paths_g2_g4_g33(tmp_path: Path, denoiser_of: Any) -> None:
    make_plan(layer_table(denoiser_of("pixel")), planner="uniform", scheme="w8a16").save(tmp_path / "plan.json")
    for config in (LDMQConfig("w8a16", ["conv_in"]), LDMQConfig(tmp_path / "plan.json")):
        text = json.dumps(config.to_dict())
        assert str(tmp_path) not in text
        assert LDMQConfig(**json.loads(text)).to_dict() == config.to_dict()
        assert json.loads(repr(config).partition(" ")[2]) == config.to_dict()


def test_the_method_is_an_enumeration_whose_value_diffusers_reads_g1() -> None:
    assert LDMQConfig("w8a16").quant_method.value == "ldmq"


def test_the_callers_lists_are_never_changed_g6() -> None:
    names, plan = ["conv_in"], {"mid_block": "w8a16"}
    config = LDMQConfig(plan, names)
    config.modules_to_not_convert.append("x")
    config.plan["y"] = "w8a16"
    assert (names, plan) == (["conv_in"], {"mid_block": "w8a16"})


def test_a_config_of_another_library_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_method is 'gguf', expected 'ldmq'"):
        LDMQConfig(quant_method="gguf")


def test_a_config_survives_its_own_dictionary() -> None:
    data = json.loads((INTACT / "config.json").read_text())["quantization_config"]
    assert LDMQConfig(**data).to_dict() == data
    assert json.loads(repr(LDMQConfig(**data)).partition(" ")[2]) == data
