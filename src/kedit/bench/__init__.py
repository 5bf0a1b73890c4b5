"""Experiments over many evaluations: the paper's table on any model, and sweeps of hyper-parameters."""

from kedit.bench.choice import GammaChoice as GammaChoice
from kedit.bench.choice import choose_gamma as choose_gamma
from kedit.bench.experiment import Experiment as Experiment
from kedit.bench.rows import Row as Row
from kedit.bench.suite import Suite as Suite
from kedit.bench.sweep import Sweep as Sweep
