"""Evaluation: cases, metrics, the runner and its report."""

from kedit.evaluation.api import evaluate as evaluate
from kedit.evaluation.cases import EditCase as EditCase
from kedit.evaluation.cases import Kind as Kind
from kedit.evaluation.cases import Probe as Probe
from kedit.evaluation.metrics import METRICS as METRICS
from kedit.evaluation.metrics import Metric as Metric
from kedit.evaluation.report import EvalReport as EvalReport
from kedit.evaluation.selection import KnownCases as KnownCases
from kedit.evaluation.selection import known_cases as known_cases
from kedit.evaluation.selection import split_by_subject as split_by_subject
