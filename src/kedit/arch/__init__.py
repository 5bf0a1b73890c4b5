"""Typed access to the parts of a model that editing reads and writes."""

from kedit.arch.experts import Experts as Experts
from kedit.arch.lookup import weight_of as weight_of
from kedit.arch.model import ModelArch as ModelArch
from kedit.arch.model import Site as Site
from kedit.arch.table import ARCHITECTURES as ARCHITECTURES
from kedit.arch.table import ArchSpec as ArchSpec
from kedit.arch.weight import Weight as Weight
from kedit.placement import unwrap as unwrap
