"""Typed access to the parts of a model that editing reads and writes."""

from kedit.models.arch import ModelArch as ModelArch
from kedit.models.arch import Site as Site
from kedit.models.architectures import ARCHITECTURES as ARCHITECTURES
from kedit.models.architectures import ArchSpec as ArchSpec
from kedit.models.experts import Experts as Experts
from kedit.models.offload import unwrap as unwrap
from kedit.models.parameters import weight_of as weight_of
from kedit.models.weight import Weight as Weight
