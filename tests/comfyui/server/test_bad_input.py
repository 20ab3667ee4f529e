"""What users of the MODEL route get wrong: a clear message on the node, a server that lives, a next run that works."""

from pathlib import Path
from typing import Any

import pytest
from comfyui.frontend.object_info import object_info
from comfyui.server.comfy_server import Server
from comfyui.server.facts import Facts
from comfyui.server.prompts import changed, node_of, small, without, workflow

from diffusers_ldmq.artifacts import LayerChoice, Plan

STOP_SECONDS = 1.0
FOREIGN_PLAN = "of-another-model.json"


@pytest.fixture(scope="module")
def plan_file(stock_server: Server) -> str:
    """Name of a plan for the checkpoint: profiled once, for all tests."""
    prompt = with_plan(small(workflow("quantize_and_save_a_checkpoint")), save_as="shared")
    prompt[node_of(prompt, "ldmq_plan_advanced")]["inputs"]["profile"] = [node_of(prompt, "ldmq_profile"), 0]
    kept = ("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "ldmq_profile", "ldmq_plan_advanced")
    ran = stock_server.run({number: node for number, node in prompt.items() if node["class_type"] in kept})
    assert ran.error is None, ran.error
    (file,) = (stock_server.base / "models" / "ldmq_plans").glob("shared*.json")
    return file.name


def with_plan(prompt: dict[str, Any], **inputs: str) -> dict[str, Any]:
    """The same with LDM-Q Plan (advanced) in the place of LDM-Q Plan."""
    known = object_info()["ldmq_plan_advanced"]["input"]["required"]
    given = {name: options["default"] for name, (_, options) in known.items()} | inputs
    return {**prompt, node_of(prompt, "ldmq_plan"): {"class_type": "ldmq_plan_advanced", "inputs": given}}


def loading(name: str, workflow_name: str = "compare_float_and_quantized") -> dict[str, Any]:
    """A workflow, small, whose plan comes from a file: nothing is profiled."""
    prompt = with_plan(small(workflow(workflow_name)), load_plan=name)
    return without(prompt, "ldmq_profile")


@pytest.fixture
def compared(plan_file: str, survivor: Server) -> dict[str, Any]:
    """Calibrate, quantize and compare, small, with the shared plan."""
    return loading(plan_file)


def failed(server: Server, prompt: dict[str, Any], kind: str, *words: str) -> str:
    """The message of a run that must fail on that node: in one line, with these words, and no library's own words."""
    ran = server.run(prompt)
    assert ran.error is not None, "it worked"
    assert ran.error["node_type"] == kind, ran.error
    message = ran.message()
    for word in words:
        assert word.lower() in message.lower(), message
    assert len(message.splitlines()) == 1, message
    assert len(message) < 700, message
    return message


def models(server: Server) -> set[Path]:
    """Everything in folders that nodes write to, unfinished files too."""
    folders = [server.base / "models" / name for name in ("ldmq_models", "ldmq_plans", "diffusion_models")]
    return {path for folder in folders for path in folder.rglob("*")}


def test_a_plan_for_another_model(stock_server: Server, survivor: Server, facts: Facts) -> None:
    folder = stock_server.base / "models" / "ldmq_plans"
    folder.mkdir(exist_ok=True)
    layers = {f"encoder.{number}.to_q": LayerChoice("w8a16", "by hand") for number in range(5)}
    Plan("UNetModel", "0123456789abcdef", "uniform", layers).save(folder / FOREIGN_PLAN)
    message = failed(stock_server, loading(FOREIGN_PLAN), "ldmq_calibrate", "encoder.0.to_q", "LDM-Q Profile")
    prompt = without(loading(FOREIGN_PLAN), "ldmq_calibrate")
    del prompt[node_of(prompt, "ldmq_quantize")]["inputs"]["calibration"]
    assert failed(stock_server, prompt, "ldmq_quantize", "encoder.0.to_q") == message
    (folder / FOREIGN_PLAN).unlink()
    facts.add("a plan for another model", message)


@pytest.mark.parametrize("kind", ["ldmq_profile", "ldmq_calibrate", "ldmq_quantize"])
def test_a_model_that_is_quantized_already(
    stock_server: Server, compared: dict[str, Any], kind: str, facts: Facts
) -> None:
    given = small(workflow("compare_float_and_quantized"))
    again = {**(given if kind == "ldmq_profile" else compared)[node_of(given, kind)]["inputs"]}
    prompt = without(compared, "PreviewAny", "SaveImage", "ldmq_compare")
    prompt["80"] = {"class_type": kind, "inputs": {**again, "model": [node_of(compared, "ldmq_quantize"), 0]}}
    prompt["81"] = {"class_type": "PreviewAny", "inputs": {"source": ["80", 2 if kind == "ldmq_profile" else 1]}}
    facts.add(f"a quantized MODEL given to {kind}", failed(stock_server, prompt, kind, "quantized", "already"))


def with_input(compared: dict[str, Any], kind: str, name: str, probe: str) -> dict[str, Any]:
    """A run in which that input of that node comes from a probe."""
    prompt = small(workflow("compare_float_and_quantized")) if kind == "ldmq_profile" else compared
    needed = {"model": [node_of(prompt, "CheckpointLoaderSimple"), 0]} if probe == "probe_out_of_memory" else {}
    changes = {name: ["80", 0]}
    return {**changed(prompt, kind, **changes), "80": {"class_type": probe, "inputs": needed}}


@pytest.mark.parametrize("kind", ["ldmq_profile", "ldmq_calibrate", "ldmq_compare"])
def test_an_empty_latent(stock_server: Server, compared: dict[str, Any], kind: str, facts: Facts) -> None:
    prompt = with_input(compared, kind, "latent_image", "probe_empty_latent")
    facts.add(f"an empty latent given to {kind}", failed(stock_server, prompt, kind, "latent", "empty"))


@pytest.mark.parametrize("kind", ["ldmq_profile", "ldmq_calibrate", "ldmq_compare"])
def test_out_of_memory(stock_server: Server, compared: dict[str, Any], kind: str, facts: Facts) -> None:
    name = "reference" if kind == "ldmq_compare" else "model"
    prompt = with_input(compared, kind, name, "probe_out_of_memory")
    facts.add(f"out of memory in {kind}", failed(stock_server, prompt, kind, "out of memory", "smaller latent"))


@pytest.mark.parametrize("prefix", ["../../x", "/tmp/x", "", "a/../../../x", "..\\..\\x", ".hidden"])
@pytest.mark.parametrize("kind", ["ldmq_save_model", "ldmq_export"])
def test_a_model_is_never_saved_outside_of_its_folder(
    stock_server: Server, survivor: Server, kind: str, prefix: str
) -> None:
    before = models(stock_server)
    prompt = small(workflow("quantize_and_save_a_checkpoint"))
    prompt = {number: node for number, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"}
    inputs = {"model": [*prompt, 0], "filename_prefix": prefix, "overwrite": False}
    refused = stock_server.refusals({**prompt, "80": {"class_type": kind, "inputs": inputs}})
    assert refused["80"]["errors"]
    assert models(stock_server) == before


def damaged(folder: Path) -> dict[str, Path]:
    """Files that are no models of ours."""
    import torch
    from safetensors.torch import save_file

    files = {name: folder / f"{name}.safetensors" for name in ("truncated", "foreign", "no-tensors-at-all", "empty")}
    save_file({"a.weight": torch.ones(4, 4)}, files["foreign"])
    files["truncated"].write_bytes(files["foreign"].read_bytes()[:-17])
    files["no-tensors-at-all"].write_bytes(b"<!doctype html><title>404</title>")
    files["empty"].write_bytes(b"")
    return files


@pytest.mark.parametrize("name", ["truncated", "foreign", "no-tensors-at-all", "empty"])
def test_a_file_that_is_no_model_of_ours(stock_server: Server, survivor: Server, name: str, facts: Facts) -> None:
    folder = stock_server.base / "models" / "ldmq_models"
    folder.mkdir(exist_ok=True)
    files = damaged(folder)
    prompt = changed(small(workflow("load_quantized_with_lora")), "ldmq_load_model", model_file=files[name].name)
    message = failed(stock_server, prompt, "ldmq_load_model", files[name].name)
    for file in files.values():
        file.unlink()
    facts.add(f"LDM-Q Load model: {name} file", message.replace(str(stock_server.base), "..."))


@pytest.mark.parametrize("kind", ["ldmq_profile", "ldmq_calibrate", "ldmq_compare"])
def test_stop(stock_server: Server, compared: dict[str, Any], kind: str, facts: Facts) -> None:
    names = {"ldmq_profile": "Profiling", "ldmq_calibrate": "Calibrating", "ldmq_compare": "Comparing"}
    before = models(stock_server)
    prompt = small(workflow("compare_float_and_quantized")) if kind == "ldmq_profile" else compared
    more = {"steps": 40, "selection": "uniform"} if kind == "ldmq_calibrate" else {"steps": 40}
    with stock_server.listen() as listener:
        ident = stock_server.queue(changed(prompt, kind, **more))
        listener.wait_for(f"{names[kind]}: ")
        seconds, worked = stock_server.stopped(ident)
    assert worked <= STOP_SECONDS
    assert models(stock_server) == before
    facts.add(f"Stop in {kind}", f"{seconds:.2f} s, {worked:.2f} of the CPU's; nothing left behind")
