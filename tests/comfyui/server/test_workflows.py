"""The workflows of the MODEL route on a real server, with stock loaders and a small random checkpoint."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui.server.comfy_server import Server
from comfyui.server.facts import Facts
from comfyui.server.images import pictures, psnr
from comfyui.server.prompts import changed, node_of, small, workflow

PRESETS = ("Safe", "Balanced", "Smallest")


def ran(server: Server, prompt: dict[str, Any]) -> Any:
    """The result of a prompt that must work."""
    result = server.run(prompt)
    assert result.error is None, (result.message(), result.error["traceback"][-3:])
    return result


def is_alive(picture: np.ndarray) -> bool:
    """Whether there is something in a random model's picture: neither one colour nor NaN."""
    return bool(np.isfinite(picture).all() and picture.std() > 0.02)


def texts(result: Any) -> str:
    """All that Preview as Text nodes show."""
    return "\n".join(text for output in result.outputs.values() for text in output.get("text", []))


def saved_models(server: Server) -> list[Path]:
    return sorted((server.base / "models" / "ldmq_models").rglob("*"))


@pytest.fixture(scope="module")
def quantized(stock_server: Server) -> Any:
    """The workflow that quantizes and saves, with few steps and pixels."""
    return ran(stock_server, small(workflow("quantize_and_save_a_checkpoint")))


def float_picture(server: Server) -> np.ndarray:
    """What the stock nodes alone draw with the checkpoint."""
    prompt = small(workflow("quantize_and_save_a_checkpoint"))
    checkpoint = node_of(prompt, "CheckpointLoaderSimple")
    prompt[node_of(prompt, "KSampler")]["inputs"]["model"] = [checkpoint, 0]
    stock = {number: node for number, node in prompt.items() if "ldmq" not in node["class_type"]}
    return pictures(server, ran(server, {k: n for k, n in stock.items() if n["class_type"] != "PreviewAny"}).outputs)[0]


def test_quantize_and_save(stock_server: Server, quantized: Any, facts: Facts) -> None:
    (picture,) = pictures(stock_server, quantized.outputs)
    assert is_alive(picture)
    (file,) = saved_models(stock_server)
    assert file.name == "my-model-ldmq_00001_.safetensors"
    assert file.name in texts(quantized)
    assert "w8a8" in texts(quantized)
    distance = psnr(float_picture(stock_server), picture)
    assert distance > 15
    told = f"{quantized.seconds:.0f} s; file of {file.stat().st_size / 1e6:.1f} MB; PSNR to the float model's picture"
    facts.add("quantize_and_save_a_checkpoint", f"{told} {distance:.1f} dB")


def test_load_with_a_lora(stock_server: Server, quantized: Any, facts: Facts) -> None:
    prompt = small(workflow("load_quantized_with_lora"))
    with_lora = ran(stock_server, prompt)
    (picture,) = pictures(stock_server, with_lora.outputs)
    assert is_alive(picture)
    (without,) = pictures(
        stock_server, ran(stock_server, changed(prompt, "LoraLoaderModelOnly", strength_model=0.0)).outputs
    )
    assert psnr(without, picture) < 40, "the LoRA does something"
    assert psnr(pictures(stock_server, quantized.outputs)[0], without) > 100, "the file is the model that was saved"
    (again,) = pictures(stock_server, ran(stock_server, changed(prompt, "SaveImage", filename_prefix="again")).outputs)
    assert psnr(again, picture) > 100
    told = f"{with_lora.seconds:.0f} s; without the LoRA the picture of the quantized model before saving, exactly"
    facts.add("load_quantized_with_lora", told)


def test_compare(stock_server: Server, facts: Facts) -> None:
    result = ran(stock_server, small(workflow("compare_float_and_quantized")))
    (picture,) = pictures(stock_server, result.outputs)
    assert is_alive(picture)
    assert picture.shape[1] > 2 * 64, "pictures side by side"
    decibels = [float(text) for text in re.findall(r"(-?[\d.]+) dB", texts(result))]
    assert decibels
    assert max(decibels) > 15
    facts.add("compare_float_and_quantized", f"{result.seconds:.0f} s; {texts(result).splitlines()[0]}")


def test_profile_report(stock_server: Server, facts: Facts) -> None:
    result = ran(stock_server, small(workflow("profile_report")))
    (chart,) = pictures(stock_server, result.outputs)
    assert chart.std() > 0.02
    assert min(chart.shape[:2]) >= 300
    told = texts(result)
    assert told.count("dB") >= 3
    shown = [output for output in result.outputs.values() if any(i["type"] == "temp" for i in output.get("images", []))]
    assert len(shown) == 1 + len(PRESETS), "charts on the nodes themselves"
    facts.add("profile_report", f"{result.seconds:.0f} s; four charts")


def test_our_file_stops_the_stock_loader(stock_server: Server, quantized: Any, facts: Facts) -> None:
    target = stock_server.base / "models" / "diffusion_models"
    target.mkdir(exist_ok=True)
    link = target / "ours.safetensors"
    link.symlink_to(saved_models(stock_server)[0])
    prompt = small(workflow("load_quantized_with_lora"))
    loader = node_of(prompt, "ldmq_load_model")
    told = [number for number, node in prompt.items() if node["class_type"] == "PreviewAny"]
    stock = {number: node for number, node in prompt.items() if number not in told}
    stock[loader] = {"class_type": "UNETLoader", "inputs": {"unet_name": link.name, "weight_dtype": "default"}}
    result = stock_server.run(stock)
    link.unlink()
    assert result.error is not None, "the codes of convolutions must never be taken for weights"
    assert result.error["node_type"] == "UNETLoader"
    facts.add("our file given to the stock loader", "stops with an error, draws nothing")
