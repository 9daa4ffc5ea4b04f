"""nc_dist: distributed training for the study of transfer learning through neural collapse."""

__version__ = "0.1.0"
