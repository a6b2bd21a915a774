"""Why a field learns as it does: activations and spectra at its start, kernel and Hessian along its training."""

from nfscale.diagnose.activations import LayerStatistics, layer_statistics
from nfscale.diagnose.hessian import (
    ExtremesMoment,
    HessianMoment,
    extremes_along_training,
    hessian_along_training,
)
from nfscale.diagnose.kernel import KernelStatistics, kernel_along_training, kernel_statistics, tangent_kernel
from nfscale.diagnose.rates import RatesStatistics, rates_by_layer, rates_compared
from nfscale.diagnose.spectrum import SpectrumStatistics, field_spectrum, power_spectrum, spectrum_statistics
from nfscale.diagnose.subject import Subject, subject_of
from nfscale.diagnose.training import Moment, along_training

__all__ = [
    "ExtremesMoment",
    "HessianMoment",
    "KernelStatistics",
    "LayerStatistics",
    "Moment",
    "RatesStatistics",
    "SpectrumStatistics",
    "Subject",
    "along_training",
    "extremes_along_training",
    "field_spectrum",
    "hessian_along_training",
    "kernel_along_training",
    "kernel_statistics",
    "layer_statistics",
    "power_spectrum",
    "rates_by_layer",
    "rates_compared",
    "spectrum_statistics",
    "subject_of",
    "tangent_kernel",
]
