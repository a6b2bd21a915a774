"""What a machine is doing: CPU, memory, GPUs, under the names that MLflow's system metrics have."""

import shutil
import subprocess

_CPU_SECONDS = 0.2  # over which the load is taken
_GPU_QUERY = "index,utilization.gpu,memory.used,memory.total"
_GPU_SECONDS = 5.0
_MEGABYTE = 1e6


def measured() -> dict[str, float]:
    """Utilisation of this machine by name, with the unit in the name; what cannot be measured here is left out."""
    return _processor() | _gpus()


def _processor() -> dict[str, float]:
    try:
        import psutil
    except ImportError:
        return {}
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(interval=_CPU_SECONDS),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
    }


def _gpus() -> dict[str, float]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    try:
        said = subprocess.run(
            [command, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_GPU_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parsed_gpus(said.stdout)


def parsed_gpus(said: str) -> dict[str, float]:
    """What `nvidia-smi` says, a line for each GPU: index, utilisation in percent, used and total memory in MiB."""
    found = {}
    for line in said.splitlines():
        index, *numbers = (part.strip() for part in line.split(","))
        try:
            utilisation, used, total = map(float, numbers)
        except ValueError:  # [N/A], of a part of a GPU
            continue
        found[f"gpu_{index}_utilization_percentage"] = utilisation
        found[f"gpu_{index}_memory_usage_megabytes"] = used * 1.048576
        found[f"gpu_{index}_memory_usage_percentage"] = 100 * used / total if total else 0.0
    return found
