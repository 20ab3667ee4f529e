"""LDM-Q Plan (Advanced): planner, scheme and target of one's own; plans saved to and loaded from models/ldmq_plans."""

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..files import NO_FILE, PLANS, existing, fingerprint, listed, name_answer, new_file
from ..payloads import SELECTIONS
from ..running import running, show_text
from ..sockets import PLAN, PROFILE, SELECTED, accepted, schema, text_output

if TYPE_CHECKING:
    from diffusers_ldmq.artifacts import Plan, Profile

PLANNERS = ("budget", "hybrid", "uniform")
SCHEMES = ("w8a8", "w8a8-dyn", "w8a16", "w4a8", "w4a8-dyn", "w4a16", "w4a16-g64")


class LDMQPlanAdvanced(io.ComfyNode):
    """PROFILE, target, planner, scheme -> PLAN, chart, text; or a plan file -> the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return schema(
            "ldmq_plan_advanced",
            display_name="LDM-Q Plan (Advanced)",
            description="Like LDM-Q Plan, with a target, planner and scheme of your own; saves plans and loads saved "
            "ones.",
            search_aliases=["int8", "int4", "quantize", "mixed precision", "target", "load plan", "save plan"],
            inputs=[
                PROFILE.Input(
                    "profile",
                    optional=True,
                    tooltip="From LDM-Q Profile, of the same model. Not needed for a plan that is loaded.",
                ),
                io.String.Input(
                    "target",
                    default="",
                    tooltip="What the quantized model must keep: sqnr>=30dB, size<=0.3x (of fp32), size<=900MB, "
                    "int8>=80% (of the work), or several with commas between. Empty: the planner's own rule.",
                ),
                io.Combo.Input(
                    "planner",
                    options=list(PLANNERS),
                    default="budget",
                    tooltip="budget: least noise within the target, layer by layer. hybrid: from a cut-off block on, "
                    "the rest of the network in higher precision. uniform: every layer alike.",
                ),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default="w8a8",
                    tooltip="Lowest precision: w = bits of the weights, a = bits of the layer's input (16: floating "
                    "point). -dyn takes the input's range from every call and needs no LDM-Q Calibrate. -g64: one "
                    "scale for 64 inputs, for the planner uniform only.",
                ),
                accepted(
                    io.String.Input,
                    "keep_float",
                    default="default",
                    advanced=True,
                    tooltip="Layers or blocks that stay in floating point, names with commas between; none: quantize "
                    "all; default: what the planner would keep.",
                ),
                accepted(
                    io.Combo.Input,
                    "calibration",
                    options=list(SELECTIONS),
                    default=SELECTIONS[0],
                    advanced=True,
                    tooltip=f"What LDM-Q Calibrate looks at for this plan. {SELECTED}",
                ),
                io.Combo.Input(
                    "load_plan",
                    options=[NO_FILE, *listed(PLANS)],
                    default=NO_FILE,
                    tooltip="A plan in models/ldmq_plans to use instead of making one; everything above is then "
                    "ignored. Press R to refresh the list.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="Name to save the plan under in models/ldmq_plans, a number is added. Empty: not saved.",
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
    def validate_inputs(cls, save_as: str | None = None) -> bool | str:
        """Refuse a name that leaves the folder before anything runs."""
        return name_answer(save_as or None)

    @classmethod
    def fingerprint_inputs(cls, load_plan: str = NO_FILE, **others: Any) -> str:
        """Run again when the plan file changes."""
        return fingerprint(PLANS, load_plan)

    @classmethod
    def execute(
        cls,
        target: str,
        planner: str,
        scheme: str,
        keep_float: str,
        calibration: str,
        load_plan: str,
        save_as: str,
        profile: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Run the node."""
        with running(cls, "Planning") as task:
            task.check()
            from ..charts import plan_chart
            from ..payloads import from_plan, to_profile, with_selection
            from ..texts import plan_text

            measured = None if profile is None else to_profile(profile)
            if load_plan == NO_FILE:
                plan = with_selection(_made(measured, target, planner, scheme, keep_float), calibration)
            else:
                plan = _loaded(load_plan, measured)
            task.check()
            text = plan_text(plan, measured)
            if save_as:
                path = new_file(PLANS, save_as)
                plan.save(path)
                text += f"\nSaved as {path.name} in models/ldmq_plans."
            chart = plan_chart(plan, measured)
        show_text(cls, text)
        return io.NodeOutput(from_plan(plan), chart, text, ui=ui.PreviewImage(chart, cls=cls))


def _made(profile: "Profile | None", target: str, planner: str, scheme: str, keep_float: str) -> "Plan":
    from diffusers_ldmq.errors import PlanError
    from diffusers_ldmq.planning import make_plan

    if profile is None:
        raise PlanError("there is no profile to plan from; connect an LDM-Q Profile, or choose a file in load_plan")
    if planner == "hybrid" and scheme != profile.curve.scheme:
        raise PlanError(
            f"the planner hybrid needs a block curve in {scheme}, and LDM-Q Profile measured one in "
            f"{profile.curve.scheme}; choose the planner budget, or the scheme {profile.curve.scheme}"
        )
    if planner == "budget" and scheme not in profile.settings.get("schemes", [scheme]):
        raise PlanError(
            f"LDM-Q Profile does not measure {scheme}, and the planner budget needs that; choose the planner uniform, "
            "or another scheme"
        )
    return make_plan(
        profile, target.strip() or None, planner=planner, scheme=scheme, keep_float=keep_float.strip() or "default"
    )


def _loaded(name: str, profile: "Profile | None") -> "Plan":
    from diffusers_ldmq.artifacts import Plan
    from diffusers_ldmq.errors import PlanError

    plan = Plan.load(existing(PLANS, name))
    if profile is not None and profile.table.fingerprint != plan.fingerprint:
        raise PlanError(
            f"{name} is a plan for another model ({plan.denoiser}, {len(plan.layers)} layers) than the profile is of "
            f"({profile.table.denoiser}, {len(profile.table.layers)} layers); choose another file, or set load_plan to "
            f"{NO_FILE} to make one"
        )
    return plan
