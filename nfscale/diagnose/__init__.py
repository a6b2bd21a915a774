"""Why a field learns as it does: activations and spectra at its start, the tangent kernel along its training."""

from nfscale.diagnose.activations import LayerStatistics, layer_statistics
from nfscale.diagnose.kernel import KernelStatistics, kernel_along_training, kernel_statistics, tangent_kernel
from nfscale.diagnose.spectrum import SpectrumStatistics, field_spectrum, power_spectrum, spectrum_statistics
from nfscale.diagnose.subject import Subject, subject_of
from nfscale.diagnose.training import Moment, along_training

__all__ = [
    "KernelStatistics",
    "LayerStatistics",
    "Moment",
    "SpectrumStatistics",
    "Subject",
    "along_training",
    "field_spectrum",
    "kernel_along_training",
    "kernel_statistics",
    "layer_statistics",
    "power_spectrum",
    "spectrum_statistics",
    "subject_of",
    "tangent_kernel",
]
