"""The integer programme solver: right, quiet, and plain about programmes without a solution."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import LinearConstraint

from diffusers_ldmq.planners.solver import least


def test_the_least_of_all_choices_is_found() -> None:
    rng = np.random.default_rng(0)
    cost, weight = rng.random(12), rng.random(12)
    groups = np.kron(np.eye(4), np.ones(3))
    rows = [LinearConstraint(groups, 1, 1), LinearConstraint(weight, -np.inf, 1.2)]
    chosen = least(cost, np.ones(12, dtype=bool), rows)
    assert chosen is not None
    choices = [[g * 3 + k for g, k in enumerate(ks)] for ks in itertools.product(range(3), repeat=4)]
    fitting = [c for c in choices if weight[c].sum() <= 1.2]
    assert 0 < len(fitting) < len(choices)
    assert cost[chosen].sum() == pytest.approx(min(cost[c].sum() for c in fitting), rel=1e-3)
    assert list(chosen) in fitting


def test_what_is_not_usable_is_not_chosen() -> None:
    rows = [LinearConstraint(np.ones((1, 3)), 1, 1)]
    assert least(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]), rows) == [1]
    assert least(np.ones(3), np.zeros(3, dtype=bool), rows) is None


def test_nothing_is_found_where_the_rows_contradict_each_other() -> None:
    rows = [LinearConstraint(np.ones((1, 3)), 1, 1), LinearConstraint(np.ones((1, 3)), 2, 2)]
    assert least(np.ones(3), np.ones(3, dtype=bool), rows) is None


NOISY = """
import ctypes, os, sys
import numpy as np
from scipy.optimize import LinearConstraint
from diffusers_ldmq.planners import solver

real = solver.milp
def shouting(*args, **kwargs):
    ctypes.CDLL(None).puts(b"from C, buffered")
    if "closed" not in sys.argv:
        os.write(1, b"from C, at once\\n")
    return real(*args, **kwargs)
solver.milp = shouting
print("before")
found = solver.least(np.ones(2), np.ones(2, dtype=bool), [LinearConstraint(np.ones((1, 2)), 1, 1)])
print("after", len(found), file=sys.stderr if "closed" in sys.argv else sys.stdout)
"""


def noisy(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NOISY, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)  # pyright: ignore


def test_what_c_code_writes_while_it_solves_never_reaches_standard_output() -> None:
    done = noisy()
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nafter 1\n", "")


@pytest.mark.skipif(os.name != "posix", reason="needs preexec_fn")
def test_it_solves_without_a_standard_output_too() -> None:
    done = noisy("closed", preexec_fn=lambda: os.close(1))
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("after 1\n")


def test_an_infeasible_programme_of_some_size_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    groups = np.kron(np.eye(60), np.ones(5))
    rows = [LinearConstraint(groups, 1, 1), LinearConstraint(rng.random(300), -np.inf, 0.01)]
    assert least(rng.random(300), np.ones(300, dtype=bool), rows) is None
    assert capfd.readouterr() == ("", "")
