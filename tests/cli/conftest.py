"""A tiny pipeline for the command line, quantized and profiled once, and a way to run commands."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffusers_ldmq.__main__ import main
from diffusers_ldmq.demo import demo_model

PROMPTS = ["red apple", "rocket", "bear", "dolphin"]


class Result(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with 'error:'."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error:")]
        return line

    def is_refused(self, *expected: str) -> None:
        """Assert exit code 2, nothing on stdout and one line of error that holds every expected text."""
        assert self.code == 2
        assert self.out == ""
        assert "Traceback" not in self.err
        for text in expected:
            assert text in self.error

    def is_interrupted(self) -> None:
        """Assert exit code 130 and one line of error."""
        assert self.code == 130
        assert "interrupted" in self.error
        assert "Traceback" not in self.err


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image folder: the bundled model with a tiny random denoiser."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=pipe.text_encoder.config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    pipe.register_modules(unet=unet)
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    pipe.save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(scope="session")
def prompts(tiny: Path) -> Path:
    return tiny.parent / "prompts.txt"


@pytest.fixture
def ldmq(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def quantized(tiny: Path, prompts: Path) -> Path:
    """The tiny pipeline, quantized by the command; tests must not change it."""
    out = tiny.parent / "quantized"
    with pytest.raises(SystemExit) as stop:
        main(
            ["quantize", str(tiny), "--out", str(out), "--prompts", str(prompts), "--steps", "3", "--dtype", "float32"]
        )
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="session")
def profile_file(tiny: Path, prompts: Path) -> Path:
    out = tiny.parent / "profile.json"
    with pytest.raises(SystemExit) as stop:
        main(["profile", str(tiny), "-o", str(out), "--prompts", str(prompts), "--steps", "3"])
    assert stop.value.code == 0
    return out


@pytest.fixture
def as_result() -> type[Result]:
    """For commands run in a process of their own: (exit code, stdout, stderr) -> Result."""
    return Result
