"""Neural collapse: moments of features, exact over ranks, and the metrics they give. Needs torch alone.

Every metric is a function in `nc_dist.nc.metrics`; `summary` computes all of them.
"""

from nc_dist.nc.halves import HalvedMoments
from nc_dist.nc.metrics import Summary, summary
from nc_dist.nc.moments import ClassMoments, NotFinite
from nc_dist.nc.second_pass import Classifier, SecondPass, combined
from nc_dist.nc.statistics import Moments, Statistics, Undefined
from nc_dist.nc.watch import watch

__all__ = [
    "ClassMoments",
    "Classifier",
    "HalvedMoments",
    "Moments",
    "NotFinite",
    "SecondPass",
    "Statistics",
    "Summary",
    "Undefined",
    "combined",
    "summary",
    "watch",
]
