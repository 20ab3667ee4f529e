"""LDM-Q Save model and LDM-Q Load model in a real ComfyUI."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui import tiny_models
from comfyui.cut_models import cut_model, fp32_bytes, quantized_cut, sample_cut
from comfyui.model_files import edited
from comfyui.quantizing import plan_of, quantized
from comfyui.tiny_models import lora, sample, sqnr, tiny_model

from diffusers_ldmq.errors import CheckpointError, LDMQError

SCHEMES = [("w8a8-dyn", "w8a16"), ("w8a8-dyn", "w8a8-dyn"), ("w4a16-g64", "w4a16-g64")]


def save(model: Any, path: Path, **options: Any) -> Path:
    from comfyui_nodes.native.model_files import save_model

    save_model(model, path, **options)
    return path


def load(path: Path) -> Any:
    from comfyui_nodes.native.model_files import load_model

    return load_model(path)


def with_lora(model: Any, file: dict[str, torch.Tensor]) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(file), 1.0, 1.0)[0]


@pytest.fixture(scope="module")
def saved(imported_comfy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 8 bits."""
    with torch.inference_mode():
        return save(quantized_cut("w8a8-dyn", "w8a16"), tmp_path_factory.mktemp("saved") / "model.safetensors")


@pytest.mark.parametrize(("linear", "conv"), SCHEMES)
def test_a_loaded_model_draws_what_the_quantized_one_drew(linear: str, conv: str, comfy: ModuleType, tmp_path: Path):
    model = quantized_cut(linear, conv)
    expected = sample_cut(model)
    path = save(model, tmp_path / "model.safetensors")
    loaded = load(path)
    assert torch.equal(sample_cut(loaded), expected)
    assert torch.equal(sample_cut(loaded), expected)
    assert save(loaded, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert loaded.model_size() == pytest.approx(model.model_size(), rel=1e-3)
    assert loaded.clone().model_size() == loaded.model_size()


def test_a_lora_on_a_loaded_model_comes_and_goes(comfy: ModuleType, saved: Path):
    model = load(saved)
    file = lora(model, [name for name, _ in _layers(model)], 0.3)
    before = sample_cut(model)
    patched = with_lora(model, file)
    assert len(patched.patches) == len(_layers(model))
    changed = sample_cut(patched)
    float_model = cut_model()
    expected = sample_cut(with_lora(float_model, file))
    assert sqnr(expected, changed) > sqnr(expected, before) + 10
    assert sqnr(expected, changed) > sqnr(sample_cut(float_model), before) - 5
    assert torch.equal(sample_cut(model), before)


def test_a_lora_is_saved_as_part_of_the_integers(comfy: ModuleType, saved: Path, tmp_path: Path):
    model = load(saved)
    patched = with_lora(model, lora(model, [name for name, _ in _layers(model)], 0.3))
    expected = sample_cut(patched)
    assert torch.equal(sample_cut(load(save(patched, tmp_path / "model.safetensors"))), expected)
    assert save(model, tmp_path / "without.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("loader", ["load_diffusion_model", "load_checkpoint_guess_config"])
def test_stock_loaders_stop_with_an_error_at_our_file(loader: str, comfy: ModuleType, saved: Path):
    with pytest.raises(RuntimeError, match="detect model type"):
        getattr(comfy.sd, loader)(str(saved))


def test_a_float_model_is_refused_naming_the_node_to_use(comfy: ModuleType, tmp_path: Path):
    with pytest.raises(LDMQError, match="LDM-Q Quantize"):
        save(tiny_model(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_comfyui_does_not_know_is_refused(comfy: ModuleType, tmp_path: Path):
    path = save(quantized(tiny_model()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="LDM-Q Pipeline loader") as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_of_another_architecture_in_part_is_refused(comfy: ModuleType, saved: Path, tmp_path: Path):
    """Every tensor that the header names is there, but the model has others."""
    import json

    from comfyui_nodes.native.model_format import read_description
    from diffusers_ldmq.serialization import to_json

    name = "out.0.weight"
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())
    said = to_json(read_description(path))
    said["floats"].remove(name)
    edited(path, f"ldmq.{name}", None, {"ldmq": json.dumps(said)})
    with pytest.raises(CheckpointError, match=r"module 'out.0', tensor 'weight': the file lacks"):
        load(path)


def test_an_interrupted_save_leaves_nothing_and_the_model_works(comfy: ModuleType, saved: Path, tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise comfy.model_management.InterruptProcessingException

    model = load(saved)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(model, tmp_path / "model.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert save(model, tmp_path / "model.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_of_comfyuis_own_can_be_saved_and_loaded(
    kind: str, comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # one head of the width that ComfyUI's recognition of Flux counts on
    wide = tiny_models.FLUX | {"hidden_size": 128, "num_heads": 1, "axes_dim": [16, 56, 56]}
    monkeypatch.setitem(tiny_models.MODELS, "flux", ("Flux", wide))
    model = quantized(tiny_model(kind), "w8a16", "w8a16")
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert type(loaded.model) is type(model.model)
    # its float tensors were rounded to 16 bits
    assert sqnr(sample(model, kind), sample(loaded, kind)) > 45


def test_progress_is_told_of_every_layer(comfy: ModuleType, tmp_path: Path):
    told: list[tuple[int, int]] = []
    model = quantized(tiny_model())
    save(model, tmp_path / "model.safetensors", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (2 * len(_layers(model)),) * 2
    assert len({done for done, _ in told}) == 2 * len(_layers(model))


def test_what_the_model_predicts_is_stored(comfy: ModuleType, tmp_path: Path):
    from comfyui_nodes.native.operations import set_sampling

    model = quantized_cut("w8a16", "w8a16")
    set_sampling(model.model, "V_PREDICTION", {"zsnr": True})
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert loaded.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    assert loaded.model.model_sampling.zsnr
    assert torch.equal(sample_cut(loaded), sample_cut(model))


@pytest.mark.parametrize(("sampling", "stored"), [("v_prediction", True), ("x0", False)])
def test_a_model_sampling_patch_is_stored_or_missed_in_words(
    sampling: str, stored: bool, comfy: ModuleType, tmp_path: Path
):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from comfyui_nodes.native.export import export_model
    from comfyui_nodes.native.model_files import save_model

    model = ModelSamplingDiscrete().patch(quantized_cut("w8a16", "w8a16"), sampling, True)[0]
    told = save_model(model, tmp_path / "model.safetensors")
    assert ("ModelSampling node behind LDM-Q Load model" in told) is not stored
    assert "ModelSampling node behind" in export_model(model, tmp_path / "exported.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert torch.equal(sample_cut(loaded), sample_cut(model)) is stored


def test_nodes_that_want_a_model_of_their_own_get_it(comfy: ModuleType, saved: Path):
    model = load(saved)
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    assert torch.equal(sample_cut(again), sample_cut(model))


def test_several_gpus_get_loaded_models_only(comfy: ModuleType, saved: Path):
    model = load(saved)
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no sampling on several GPUs: that it is refused was not tested")
    twin = model.deepclone_multigpu()
    assert twin.model is not model.model
    assert torch.equal(sample_cut(twin), sample_cut(model))
    fresh = quantized_cut("w8a16", "w8a16")
    fresh.cached_patcher_init = (cut_model, ())
    with pytest.raises(LDMQError, match="LDM-Q Load model"):
        fresh.deepclone_multigpu()


def test_a_loaded_model_is_not_quantized_again(comfy: ModuleType, saved: Path):
    from comfyui_nodes.native.patching import quantize_model

    model = load(saved)
    with pytest.raises(LDMQError, match="quantized"):
        quantize_model(model, plan_of(cut_model(), "w8a16", "w8a16"), None)


MEASURED = """
import gc, os, sys
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.model_management, comfy.sample, comfy.sd, comfy.supported_models, torch
torch.set_num_threads(1)
from comfyui.cut_models import sample_cut
from comfyui.tiny_models import sample, tiny_model
from comfyui_nodes.native.model_files import load_model
from diffusers_ldmq.allocator import give_back

def resident():
    gc.collect()
    give_back()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with torch.inference_mode():
    sample(tiny_model())  # what sampling imports and allocates is not the model's
    comfy.model_management.unload_all_models()
    before = resident()
    model = load_model(sys.argv[1])
    loaded = resident() - before
    sample_cut(model, steps=1)
    print(loaded, resident() - before, model.model_size())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc: not measured")
@pytest.mark.parametrize(("scheme", "file_share"), [("w8a8-dyn", 0.28), ("w4a16", 0.16)])
def test_file_and_memory_are_as_small_as_promised(
    scheme: str, file_share: float, comfy: ModuleType, comfy_path: Path, tmp_path: Path
):
    """SD 1.5 cut to 107 million parameters; the process that loads it has never held floats of it."""
    model = quantized_cut(scheme, scheme, stages=2)
    fp32 = fp32_bytes(model)
    path = save(model, tmp_path / "model.safetensors")
    assert path.stat().st_size <= file_share * fp32
    root = Path(__file__).parents[2]
    variables = {"COMFYUI_PATH": str(comfy_path), "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)],
        env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, stepped, size = map(int, done.stdout.split())
    assert loaded <= 0.35 * fp32
    assert stepped <= 0.35 * fp32
    assert size == pytest.approx(model.model_size(), rel=1e-3)


def _layers(model: Any) -> list[tuple[str, Any]]:
    from comfyui_nodes.native.patching import quantized_layers_of

    return list(quantized_layers_of(model).items())
