"""Plan, calibrate, correct, quantize and verify until the target holds, or say by how much it cannot."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocator import give_back
from .artifacts import Calibration, Plan, Profile, Report, Trial
from .calibration import calibrate
from .calls import Recording
from .demands import keeps, refuse_overrun, short_db, too_slow
from .errors import PlanError
from .improving import Improved, Improver, improves
from .planners import Target, parse_target, plan_bytes, predict
from .planning import make_plan, meets_size, raise_plan
from .progress import StageProgress as Progress
from .quantization import quantize, quantized_for_now
from .selections import TDAC, find_selection
from .serialization import to_json
from .settings import Outcome, Settings
from .specs import parse_scheme
from .tables import LayerTable, LayerTimes
from .timing import measured_speedup
from .verification import verify

logger = logging.getLogger(__name__)

MARGIN_DB = 0.25
"""What a plan must spare beyond the gap between the sets once it has missed its target."""
MARGIN_SPEED = 1.02
"""How much more than what it missed by a plan must be faster."""
MOST_ROUNDS = 4
"""How often a plan is made again for speed before the target is given up."""

Load = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Job:
    """What stays the same while plans are tried. profile, times: None where nothing needs them; memory: a folder that
    keeps the finished units of reconstructions, None = nowhere; improved: what was made of each plan's calibration."""

    recording: Recording
    table: LayerTable
    profile: Profile | None
    times: LayerTimes | None
    settings: Settings
    target: Target | None
    told: Progress
    memory: Path | None = None
    improved: dict[str, Improved] = field(default_factory=dict)

    def until_met(self, denoiser: nn.Module, load: Load | None) -> tuple[Outcome, nn.Module]:
        """The outcome that keeps the target, and the quantized denoiser. load: gives the float denoiser anew.

        Raises PlanError, saying by how much, if the target is missed for good.
        """
        plan, margin, rounds = self.first_plan(), 0.0, 0
        while True:
            plan = self.raised_on_select(denoiser, plan, margin)
            outcome = self.run(denoiser, plan)
            speedup = self.speedup(denoiser, load)
            outcome = replace(outcome, report=replace(outcome.report, speedup=speedup))
            short, slow = short_db(self.target, outcome.report), self._slow(speedup)
            refuse_overrun(self.target, self.table, outcome.report)
            if short <= 0 and slow <= 1:
                self._tell_missed_plan(outcome)
                return outcome, denoiser
            if short > 0:
                gap = plan.reasons.get("measured_on_select_db", outcome.report.sqnr_db) - outcome.report.sqnr_db
                margin = max(gap, 0.0) + MARGIN_DB
                following = self.higher(plan, short + MARGIN_DB)
            else:
                rounds += 1
                following = self.faster(plan, slow) if rounds <= MOST_ROUNDS else None
            if load is None or following is None:
                raise PlanError(self._missed(outcome.report, short))
            plan, denoiser = following, load()

    def _tell_missed_plan(self, outcome: Outcome) -> None:
        """Say so where a plan that was given was made for an SQNR that it does not reach here."""
        if self.target is not None or self.settings.plan is None or outcome.plan.target is None:
            return
        try:
            short = short_db(parse_target(outcome.plan.target), outcome.report)
        except PlanError:
            return  # plans may be edited by hand; this text only says what the plan was once made for
        if short > 0:
            logger.warning(
                "the plan was made for %s and reaches %.1f dB on held-out calls; give --target to have it raised",
                outcome.plan.target,
                outcome.report.sqnr_db,
            )

    def first_plan(self) -> Plan:
        """The plan given, or the planner's."""
        plan = self.settings.plan
        if plan is None:
            return self.planned(self.target)
        if self.target is not None and not meets_size(plan, self.table, self.target):
            size = plan_bytes(self.table, plan.quantized())
            raise PlanError(
                f"target {self.target.text!r} is missed by the plan given, which takes {size / 1e6:.1f} MB; plan again"
            )
        return plan

    def planned(self, target: Target | None) -> Plan:
        """The planner's plan for a demand."""
        chosen = self.settings
        return make_plan(
            self.profile or self.table,
            target,
            planner=chosen.planner,
            scheme=chosen.scheme,
            keep_float=chosen.keep_float,
            times=self.times,
        )

    def higher(self, plan: Plan, more_db: float) -> Plan | None:
        """A plan that is better by so many dB: the budget planner's for a higher demand, or one more block in higher
        precision. None if there is none."""
        if self.profile is None:
            return None
        if self.settings.plan is not None or self.settings.planner != "budget":
            raised = raise_plan(plan, self.profile)
            return raised if raised is not None and keeps(self.target, raised, self.profile.table) else None
        assert self.target is not None
        now = self._demand(plan)
        return self._for_demand(replace(now, min_sqnr_db=(now.min_sqnr_db or 0.0) + more_db))

    def faster(self, plan: Plan, factor: float) -> Plan | None:
        """The planner's plan for a speed that is higher by a factor; None if there is none."""
        if self.settings.plan is not None or self.settings.planner == "uniform":
            return None
        now = self._demand(plan)
        return self._for_demand(replace(now, min_speedup=(now.min_speedup or 1.0) * factor * MARGIN_SPEED))

    def _demand(self, plan: Plan) -> Target:
        """What the planner was asked for when it made `plan`: at first the target, later more than that."""
        assert self.target is not None
        return replace(self.target, **plan.reasons.get("demanded", {}))

    def _for_demand(self, demand: Target) -> Plan | None:
        try:
            plan = self.planned(demand)
        except PlanError:
            return None
        asked = {"min_sqnr_db": demand.min_sqnr_db, "min_speedup": demand.min_speedup}
        return replace(plan, reasons={**plan.reasons, "demanded": asked})

    def raised_on_select(self, denoiser: nn.Module, plan: Plan, margin: float = 0.0) -> Plan:
        """The plan, raised until an SQNR target holds on the 'select' set with a margin in dB to spare: other calls
        and the compute dtype may cost that much. Raises PlanError if the target itself cannot be met."""
        if self.target is None or self.target.min_sqnr_db is None:
            return plan
        while True:
            calibration = self.calibrated(denoiser, plan)
            report = self._on_select(denoiser, calibration)
            if short_db(self.target, report) + margin > 0 and improves(self.settings):
                report = self._on_select(denoiser, self._improved(denoiser, plan, calibration).calibration)
            short = short_db(self.target, report)
            raised = self.higher(plan, max(short + margin, 0.0) + MARGIN_DB)
            if short + margin <= 0 or (raised is None and short <= 0):
                reasons = {**plan.reasons, "measured_on_select_db": report.sqnr_db}
                return replace(plan, reasons=reasons, target=self.target.text)
            if raised is None:
                raise PlanError(
                    f"target {self.target.text!r} cannot be met: the best plan reaches {report.sqnr_db:.1f} dB, "
                    f"{short:.1f} dB short; lower the target, or try {self.ways_out()}"
                )
            told = "%.1f dB on the calls that plans are chosen with, %.1f dB short of %s: planning higher"
            logger.info(told, report.sqnr_db, short + margin, self.target.text)
            plan = raised

    def _on_select(self, denoiser: nn.Module, calibration: Calibration) -> Report:
        with quantized_for_now(denoiser, calibration):
            return verify(denoiser, self.recording, on="select", progress=self.stage("check target"))

    def calibrated(self, denoiser: nn.Module, plan: Plan) -> Calibration:
        """States of the layers under a plan."""
        chosen = self.settings
        return calibrate(
            denoiser,
            plan,
            self.recording,
            selection=chosen.calibration,
            observer=chosen.observer,
            progress=self.stage("calibrate"),
        )

    def run(self, denoiser: nn.Module, plan: Plan) -> Outcome:
        """Calibrate, correct, quantize in place and verify."""
        give_back()
        improved = self._improved(denoiser, plan, self.calibrated(denoiser, plan))
        facts = self._quantized(denoiser, improved.calibration)
        plan = self._foretold(plan, improved.trials)
        give_back()
        report = verify(denoiser, self.recording, progress=self.stage("verify"))
        done = {"corrections": improved.trials, "reconstruction": improved.reconstruction}
        report = replace(report, calibration=facts, **done)
        return Outcome(self.recording, self.profile, plan, report, self.times)

    def _quantized(self, denoiser: nn.Module, calibration: Calibration) -> dict[str, Any]:
        """Facts of the calibration. The plain codes end here: only the packed ones live."""
        quantize(denoiser, calibration, dtype=self.settings.dtype, progress=self.stage("quantize"))
        self.improved.clear()
        return {
            "selection": calibration.selection,
            "observer": calibration.observer,
            "samples": calibration.samples,
            "forward_calls": calibration.forward_calls,
            "sampler_calls": calibration.sampler_calls,
            **self._scores(calibration.samples),
        }

    def _improved(self, denoiser: nn.Module, plan: Plan, calibration: Calibration) -> Improved:
        """The calibration of a plan, corrected and reconstructed as asked; done once for a plan."""
        key = str(plan.quantized())
        if key not in self.improved:
            improver = Improver(self.recording, self.table, self.profile, self.settings, self.target, self.told)
            self.improved.clear()
            self.improved[key] = improver.improve(denoiser, calibration, self.memory)
        return self.improved[key]

    def _scores(self, samples: int) -> dict[str, Any]:
        """Why so many samples of each step were chosen, where scores of the steps decided it."""
        selection, features = find_selection(self.settings.calibration), self.recording.features
        if not samples or features is None or not isinstance(selection, TDAC):
            return {}
        return {"scores": to_json(selection.scores(features, samples))}

    def _foretold(self, plan: Plan, trials: tuple[Trial, ...]) -> Plan:
        """The plan with the profile's prediction, counting what kept corrections brought at their layers."""
        if self.profile is None:
            return plan
        left = {t.layer: 10 ** ((t.layer_db[0] - t.layer_db[1]) / 10) for t in trials if t.kept}
        prediction, schemes = predict(self.profile).corrected(left), plan.quantized()
        if not all(scheme in prediction.total[name] for name, scheme in schemes.items()):
            return plan  # a plan that was given may have schemes that were never measured
        reasons = {**plan.reasons, "predicted_curve_db": prediction.curve_db(schemes)}
        return replace(plan, reasons=reasons, predicted_sqnr_db=prediction.sqnr_db(schemes))

    def speedup(self, denoiser: nn.Module, load: Load | None) -> float | None:
        """Measured over the float model in its fastest dtype; None where no target asks for it."""
        if self.target is None or self.target.min_speedup is None or load is None:
            return None
        self.told("check speed", 0, 1)
        batch = self.recording.batch(self.recording.only("verify").calls[0])
        found = measured_speedup(denoiser, load, batch)
        self.told("check speed", 1, 1)
        return found

    def _slow(self, speedup: float | None) -> float:
        """By what factor a demand on speed is missed; at most 1 where it holds or there is none."""
        asked = self.target.min_speedup if self.target else None
        return 0.0 if asked is None or speedup is None else asked / speedup

    def _missed(self, report: Report, short: float) -> str:
        """The message for a target that is given up."""
        assert self.target is not None
        if short > 0:
            return (
                f"target {self.target.text!r} is missed by {short:.1f} dB on held-out calls "
                f"({report.sqnr_db:.1f} dB measured); lower the target, or try {self.ways_out()}"
            )
        return too_slow(self.target, report, self.times)

    def ways_out(self) -> str:
        """What else could reach an SQNR that this plan does not."""
        ways = ["--dtype float32"] if self.settings.dtype not in (None, torch.float32) else []
        ways += ["--planner budget"] if self.settings.planner != "budget" else []
        ways += ["--corrections auto"] if self.settings.corrections == "none" else []
        ways += ["--scheme w8a16"] if parse_scheme(self.settings.scheme).is_integer else ["more float layers"]
        return ", ".join(ways)

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress of one stage."""
        return lambda done, whole: self.told(name, done, whole)
