"""LDM-Q Plan: a precision for every layer, by a preset in words."""

from typing import Any

from comfy_api.latest import io, ui

from ..presets import DEFAULT, PRESETS, preset_plan
from ..running import running, show_text
from ..sockets import PLAN, PROFILE, schema, text_output


class LDMQPlan(io.ComfyNode):
    """PROFILE, preset -> PLAN, chart, text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_plan",
            display_name="LDM-Q Plan",
            description="Choose a precision for every layer: few bits where a layer bears them, more where it does "
            "not.",
            search_aliases=["int8", "int4", "quantize", "preset", "mixed precision"],
            inputs=[
                PROFILE.Input("profile", tooltip="From LDM-Q Profile, of the same model."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULT,
                    tooltip="\n".join(preset.explanation for preset in PRESETS.values()),
                ),
            ],
            outputs=[
                PLAN.Output("plan", tooltip="For LDM-Q Calibrate and LDM-Q Quantize."),
                io.Image.Output("chart", tooltip="Size of every block before and after, and the predicted quality."),
                text_output("The plan in words: size, predicted quality, what comes next."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, profile: dict[str, Any], preset: str) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Planning") as task:
            task.check()
            from ..charts import plan_chart
            from ..payloads import from_plan, to_profile
            from ..texts import plan_text

            measured = to_profile(profile)
            plan, words = preset_plan(measured, preset)
            task.check()
            chart, text = plan_chart(plan, measured), plan_text(plan, measured, words)
        show_text(cls, text)
        return io.NodeOutput(from_plan(plan), chart, text, ui=ui.PreviewImage(chart, cls=cls))
