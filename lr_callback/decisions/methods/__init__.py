"""Methods: rules that choose, for every layer, what it becomes under one budget."""

from __future__ import annotations

from lr_callback.decisions.methods.alds import ALDS as ALDS
from lr_callback.decisions.methods.alds import OBJECTIVES as OBJECTIVES
from lr_callback.decisions.methods.alds import best_method as best_method
from lr_callback.decisions.methods.alds import check_method as check_method
from lr_callback.decisions.methods.base import Choice as Choice
from lr_callback.decisions.methods.base import Method as Method
from lr_callback.decisions.methods.base import Solution as Solution
from lr_callback.decisions.methods.base import Terms as Terms
from lr_callback.decisions.methods.base import cost_of as cost_of
from lr_callback.decisions.methods.price import PCA as PCA
from lr_callback.decisions.methods.price import LRank as LRank
from lr_callback.decisions.methods.rules import ALDSK as ALDSK
from lr_callback.decisions.methods.rules import ALDSError as ALDSError
from lr_callback.decisions.methods.rules import ALDSSimple as ALDSSimple
from lr_callback.decisions.methods.rules import EnergyThreshold as EnergyThreshold
from lr_callback.decisions.methods.rules import SingularValueThreshold as SingularValueThreshold
from lr_callback.decisions.methods.rules import UniformRank as UniformRank
