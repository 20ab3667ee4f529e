"""Range of a tensor: one file, one way to choose a scale and a zero point from what was seen."""

from ..registry import Registry
from .contract import Observer
from .minmax import MinMaxObserver, OneSidedMinMaxObserver
from .mse import MSEObserver

OBSERVERS: Registry[type[Observer]] = Registry("observer")
OBSERVERS.add("minmax", MinMaxObserver)
OBSERVERS.add("minmax-affine", OneSidedMinMaxObserver)
OBSERVERS.add("mse", MSEObserver)

__all__ = ["OBSERVERS", "MSEObserver", "MinMaxObserver", "Observer", "OneSidedMinMaxObserver"]
