"""Evaluation: cases, metrics, the runner and its report."""

from kedit.evaluation.api import evaluate as evaluate
from kedit.evaluation.cases import EditCase as EditCase
from kedit.evaluation.cases import Kind as Kind
from kedit.evaluation.cases import Probe as Probe
from kedit.evaluation.metrics import METRICS as METRICS
from kedit.evaluation.metrics import Metric as Metric
from kedit.evaluation.report import EvalReport as EvalReport
