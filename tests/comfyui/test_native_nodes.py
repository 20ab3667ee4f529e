"""The nodes of the MODEL route, run with a real ComfyUI in this process on a tiny MODEL, from profile to comparison."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.tiny_models import conditioning, latent, sample, sqnr, tiny_model

from diffusers_ldmq import reconstruction
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.learning import LearningSettings

SAMPLING = {"steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


class Vae:
    """Decodes latents to pictures by showing three of their channels."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, h, w, 3] in 0..1."""
        return torch.sigmoid(latent[:, :3].movedim(1, -1)).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture
def folders(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models folder, somewhere of its own, with the pack's folders in it."""
    import folder_paths

    stock = folder_paths.folder_names_and_paths
    known = {kind: paths for kind, paths in stock.items() if not kind.startswith("ldmq_")}
    known["diffusion_models"] = ([str(tmp_path / "diffusion_models")], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    from comfyui_nodes.files import register_folders

    register_folders()
    return tmp_path


def run(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a node as ComfyUI does, its defaults where nothing else is given."""
    from comfyui_nodes.nodes import NODES

    node = next(node for node in NODES if node.GET_SCHEMA().node_id == node_id)
    told = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return clone.EXECUTE_NORMALIZED(**told | inputs).result


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What takes long and is the same for all tests."""
    return {}


@pytest.fixture
def profile(folders: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What LDM-Q Profile gives of the tiny model, made once."""
    if not known:
        known["profile"], known["chart"], known["text"] = run("ldmq_profile", model=tiny_model(), **scene())
    return known["profile"]


def scene(**more: Any) -> dict[str, Any]:
    """Conditioning and latent of the tiny model."""
    return {"positive": conditioning(), "negative": conditioning(seed=2), "latent_image": latent(), **SAMPLING, **more}


def test_every_native_node_does_its_part(folders: Path, profile: dict[str, Any], known: dict[str, Any]) -> None:
    model = tiny_model()
    before = sample(model)
    assert "119 Linear and Conv2d layers" in known["text"]
    assert f"in {profile['profile']['settings']['cost_in_calls']} calls of the model" in known["text"]
    assert known["chart"].shape[0] == 1
    plan, _, told = run("ldmq_plan", profile=profile, preset="Balanced")
    assert "Predicted:" in told
    ranges, told = run("ldmq_calibrate", model=model, plan=plan, **scene())
    assert "the first sampling step" in told
    quantized, told = run("ldmq_quantize", model=model, plan=plan, calibration=ranges)
    assert "no calibration" not in told
    image, told = run("ldmq_compare", reference=model, model=quantized, vae=Vae(), **scene(seed=5))
    assert image.shape[2] == 3 * 64
    assert "worst" in told
    (told,) = run("ldmq_save_model", model=quantized, filename_prefix="sub/tiny")
    assert "tiny_00001_.safetensors" in told
    assert (folders / "ldmq_models" / "sub" / "tiny_00001_.safetensors").is_file()
    assert torch.equal(sample(model), before), "the MODEL that went in is as it was"
    assert sqnr(before, sample(quantized)) > 15


def test_calibrating_as_planned_looks_at_the_plan_s_steps(profile: dict[str, Any]) -> None:
    inputs = {"profile": profile, "planner": "uniform", "calibration": "uniform"}
    plan, *_ = run("ldmq_plan_advanced", **inputs)
    for given, expected in (({}, "uniform"), ({"selection": "first-step"}, "first-step")):
        ranges, _ = run("ldmq_calibrate", model=tiny_model(), plan=plan, **scene(**given))
        assert ranges["selection"] == expected


def test_quantize_learns_where_it_is_asked_to(profile: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    brief = replace(reconstruction.QUICK, learning=LearningSettings(iterations=2, batch=4), samples=4)
    monkeypatch.setitem(reconstruction.PRESETS, "quick", brief)
    from comfyui_nodes.running import Task

    stages: list[tuple[str, int]] = []
    monkeypatch.setattr(Task, "stage", lambda self, name, done, total: stages.append((name, done)))
    model = tiny_model()
    plan, *_ = run("ldmq_plan_advanced", profile=profile, planner="uniform", scheme="w4a8-dyn")
    inputs = {"model": model, "plan": plan}
    for missing in ("positive", "negative", "latent_image"):
        given = {name: value for name, value in scene().items() if name != missing}
        with pytest.raises(LDMQError, match=f"connect {missing} as to LDM-Q Calibrate"):
            run("ldmq_quantize", reconstruct="quick", **inputs, **given)
    plain, told = run("ldmq_quantize", **inputs)
    assert "rounding learned" not in told
    assert {name for name, _ in stages} == {"Quantizing"}
    learned, told = run("ldmq_quantize", reconstruct="quick", **inputs, **scene())
    assert "rounding learned: " in told
    assert [name for name, _ in stages if name == "Reconstructing"]
    assert not torch.equal(sample(plain), sample(learned))


def test_without_a_calibration_the_node_says_what_runs_instead(profile: dict[str, Any]) -> None:
    model = tiny_model()
    plan, _, told = run("ldmq_plan_advanced", profile=profile, planner="uniform", scheme="w8a8")
    assert "Next: LDM-Q Calibrate" in told
    _, told = run("ldmq_quantize", model=model, plan=plan)
    assert "no calibration" in told
    assert "w8a8-dyn" in told


def test_a_plan_for_another_model_is_refused_by_calibrate_and_quantize(profile: dict[str, Any]) -> None:
    plan, *_ = run("ldmq_plan", profile=profile, preset="Balanced")
    other = tiny_model("flux")
    flux = scene(positive=conditioning("flux"), negative=conditioning("flux", 2), latent_image=latent("flux"))
    for node, inputs in (("ldmq_quantize", {}), ("ldmq_calibrate", flux)):
        with pytest.raises(LDMQError, match=r"input_blocks\..*another model"):
            run(node, model=other, plan=plan, **inputs)


def test_stopping_at_any_node_ends_it_and_the_next_run_works(profile: dict[str, Any]) -> None:
    management = sys.modules["comfy.model_management"]
    model = tiny_model()
    before = sample(model)
    plan, *_ = run("ldmq_plan_advanced", profile=profile, planner="uniform", scheme="w8a8")
    nodes = {
        "ldmq_profile": scene(),
        "ldmq_calibrate": scene(plan=plan, selection="uniform"),
        "ldmq_quantize": scene(plan=plan, reconstruct="quick"),
        "ldmq_compare": {**scene(seed=5), "reference": model, "vae": Vae()},
    }
    for node, inputs in nodes.items():
        with pytest.MonkeyPatch.context() as patched:
            calls = _stop_after(3, management, patched)
            with pytest.raises(management.InterruptProcessingException):
                run(node, model=model, **inputs)
            assert calls[0] == 3, node
        management.interrupt_current_processing(False)
        assert torch.equal(sample(model), before)


def test_stopping_what_plans_and_handles_files_ends_it_and_leaves_no_file(
    folders: Path, profile: dict[str, Any]
) -> None:
    from comfyui.cut_models import quantized_cut, sample_cut

    management = sys.modules["comfy.model_management"]
    quantized = quantized_cut("w8a8-dyn", "w8a16")
    before = sample_cut(quantized)
    run("ldmq_save_model", model=quantized, filename_prefix="cut")
    nodes = {
        "ldmq_plan": (2, {"profile": profile, "preset": "Balanced"}),
        "ldmq_plan_advanced": (2, {"profile": profile, "save_as": "x"}),
        "ldmq_save_model": (3, {"model": quantized}),
        "ldmq_export": (3, {"model": quantized}),
        "ldmq_load_model": (3, {"model_file": "cut_00001_.safetensors"}),
    }
    kept = _files(folders)
    for node, (count, inputs) in nodes.items():
        with pytest.MonkeyPatch.context() as patched:
            calls = _stop_after(count, management, patched)
            with pytest.raises(management.InterruptProcessingException):
                run(node, **inputs)
            assert calls[0] == count, node
        management.interrupt_current_processing(False)
        assert _files(folders) == kept, node
    assert torch.equal(sample_cut(quantized), before)
    loaded, _ = run("ldmq_load_model", model_file="cut_00001_.safetensors")
    assert sqnr(before, sample_cut(loaded)) > 60


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stop_after(count: int, management: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The user presses Stop at the count-th time that anything asks."""
    calls, ask = [0], management.throw_exception_if_processing_interrupted

    def asked() -> None:
        calls[0] += 1
        if calls[0] == count:
            management.interrupt_current_processing(True)
        ask()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", asked)
    return calls


def test_texts_reach_the_node_through_the_server(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: told.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    from comfyui_nodes.running import running, show_text

    node = type("Node", (), {"hidden": SimpleNamespace(unique_id="12")})
    with running(node, "Profiling") as task:
        task(1, 2)
    show_text(node, "done")
    assert told == [("12", "Profiling ..."), ("12", "Profiling: 50 %"), ("12", "done")]


def test_a_saved_model_is_loaded_and_an_exported_one_opens_in_the_stock_loader(folders: Path) -> None:
    import folder_paths
    from comfyui.cut_models import cut_model, quantized_cut, sample_cut

    quantized, reference = quantized_cut("w8a8-dyn", "w8a16"), sample_cut(cut_model())
    (told,) = run("ldmq_save_model", model=quantized, filename_prefix="cut")
    assert "cut_00001_.safetensors" in told
    assert _offered("ldmq_load_model", "model_file") == ["(none)", "cut_00001_.safetensors"]
    loaded, told = run("ldmq_load_model", model_file="cut_00001_.safetensors")
    assert "w8a8-dyn" in told
    assert sqnr(sample_cut(quantized), sample_cut(loaded)) > 60
    (told,) = run("ldmq_export", model=loaded, filename_prefix="cut")
    path = folders / "diffusion_models" / "cut_00001_.safetensors"
    assert str(path.parent) in told
    assert folder_paths.get_filename_list("ldmq_models") == ["cut_00001_.safetensors"]
    assert path.is_file()
    _stock_loads(path, reference)


def _stock_loads(path: Path, reference: torch.Tensor) -> None:
    import comfy.quant_ops
    import comfy.sd
    from comfyui.cut_models import sample_cut

    if "int8_tensorwise" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI does not know int8_tensorwise, so the exported file was not opened in its own loader")
    assert sqnr(reference, sample_cut(comfy.sd.load_diffusion_model(str(path)))) > 20


def _offered(node_id: str, name: str) -> list[str]:
    from comfyui_nodes.nodes import NODES

    node = next(node for node in NODES if node.GET_SCHEMA().node_id == node_id)
    return next(i for i in node.define_schema().inputs if i.id == name).options


def test_load_model_wants_exactly_one_source(folders: Path) -> None:
    for given, found in (({}, "neither is"), ({"model_file": "a.safetensors", "folder_or_hub_id": "me/x"}, "both are")):
        with pytest.raises(LDMQError, match=f"folder_or_hub_id {found} given"):
            run("ldmq_load_model", **given)
    with pytest.raises(LDMQError, match="press R"):
        run("ldmq_load_model", model_file="gone.safetensors")


@pytest.mark.parametrize("node_id", ["ldmq_save_model", "ldmq_export"])
def test_a_float_model_is_neither_saved_nor_exported_and_nothing_is_left(folders: Path, node_id: str) -> None:
    with pytest.raises(LDMQError, match="LDM-Q Quantize"):
        run(node_id, model=tiny_model(), filename_prefix="x")
    with pytest.raises(LDMQError, match="leaves ComfyUI's folder"):
        run(node_id, model=tiny_model(), filename_prefix="../../x")
    assert not [path for path in folders.rglob("*") if path.is_file()]


def test_a_file_that_is_no_model_of_ours_is_refused(folders: Path) -> None:
    from safetensors.torch import save_file

    (folders / "ldmq_models").mkdir(exist_ok=True)
    save_file({"a": torch.zeros(1)}, folders / "ldmq_models" / "foreign.safetensors")
    (folders / "ldmq_models" / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    for name in ("foreign.safetensors", "cut.safetensors"):
        with pytest.raises(LDMQError, match=name):
            run("ldmq_load_model", model_file=name)
