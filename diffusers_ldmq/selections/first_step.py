"""Single-step calibration ("Efficient Quantization Strategies for Latent Diffusion Models", local step 2): the
sampler's first step, where diffusion noise is maximal."""

from ..calls import Recording, SampleId


def first_step(recording: Recording, n: int | None = None) -> tuple[SampleId, ...]:
    """The first `n` trajectories (default: all) at the recording's largest timestep."""
    first = max(call.timestep for call in recording.calls)
    samples = recording.at((first,)).samples()
    return tuple(samples[: n or len(samples)])
