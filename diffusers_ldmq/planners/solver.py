"""scipy's integer programme solver, kept quiet: its HiGHS writes stray lines to the process's standard output, past
Python and whatever its options say, and output that machines read (`--json`) must hold nothing else."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from ..errors import PlanError

OPTIONS = {"mip_rel_gap": 1e-3, "time_limit": 60.0}
STDOUT = 1
TIMED_OUT = 1
"""scipy's status of a search that was given up."""


def least(
    objective: NDArray[np.float64], usable: NDArray[np.bool_], rows: Sequence[LinearConstraint]
) -> NDArray[np.int64] | None:
    """Indices of the 0/1 variables that are 1 where the objective is least within 0.1 %; None if the rows cannot be
    fulfilled. objective, usable: [n]; variables that are not usable stay 0."""
    with _silent():
        solution = milp(
            objective,
            integrality=np.ones(len(usable)),
            bounds=Bounds(0, usable.astype(float)),  # pyright: ignore[reportArgumentType]
            constraints=rows,
            options=OPTIONS,
        )
    if solution.x is None and solution.status == TIMED_OUT:
        raise PlanError(
            f"no plan was found in {OPTIONS['time_limit']:.0f} seconds; ask for less, or take --planner hybrid"
        )
    return None if solution.x is None else np.flatnonzero(solution.x > 0.5)


@contextmanager
def _silent() -> Iterator[None]:
    """What C code writes to standard output while this is open is lost."""
    if sys.stdout is not None:  # as under pythonw, or where descriptor 1 was closed
        sys.stdout.flush()
    try:
        kept = os.dup(STDOUT)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT)
            yield
    finally:
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C still buffers belongs to nowhere, too
        os.dup2(kept, STDOUT)
        os.close(kept)
