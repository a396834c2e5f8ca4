"""ONNX Runtime's own format, which its reduced builds for phones read: `<component>.ort`.

The graph is optimized while it is written, for processors of phones. `required_operators.config`
next to it lists the operators and types that all components need: `--include_ops_by_config` of ONNX
Runtime's build leaves the others out (onnxruntime.ai, "Reduced operator config file"). A file of
this format ends at 2 GB. In half precision a CPU would get casts for good, so there is none.
"""

import contextlib
import warnings
from pathlib import Path

import onnxruntime
from onnxruntime.tools.ort_format_model import create_config_from_models

from laptop.errors import BadInput
from laptop.export.arrays import ArrayFunction
from laptop.export.job import Job
from laptop.export.targets import VERIFIED
from laptop.export.to_onnx import onnx_session
from laptop.export.to_onnx.ort_kernels import sort_kernels_
from laptop.export.to_onnx.target import in_temporary_folder, make

OPERATORS = "required_operators.config"
LARGEST = 2 << 30  # bytes of a flatbuffer
X86 = ["NchwcTransformer"]  # optimizers whose results run on x86 only


def export(job: Job) -> None:
    """Write the component of `job`; `BadInput` where it is too large for the format."""
    with in_temporary_folder(job) as plain:
        make(plain)
        size = sum(file.stat().st_size for file in plain.path.parent.iterdir())
        if size > LARGEST:
            raise BadInput(
                f"{job.component} in {job.precision} has {size / 1e9:.1f} GB; the ORT format ends "
                "at 2.1 GB. Ask for ort:int8, or for onnx, which ONNX Runtime reads on phones too."
            )
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(job.path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.add_session_config_entry("session.qdqisint8allowed", "1")  # as ARM has it
        onnxruntime.InferenceSession(
            str(plain.path), options, ["CPUExecutionProvider"], disabled_optimizers=X86
        )
    sort_kernels_(job.path)


def complete(_model: str, folder: Path) -> None:
    """Write the list of operators for a reduced build."""
    with contextlib.chdir(folder), warnings.catch_warnings():  # so that it names no folder
        warnings.simplefilter("ignore", ResourceWarning)  # of its open files
        files = sorted(Path().glob("*.ort"))
        create_config_from_models(files, Path(OPERATORS), enable_type_reduction=True)


def load(path: Path) -> ArrayFunction:
    """The file as a function, computed by ONNX Runtime on the CPU."""
    return onnx_session.load(path)


def checked(_precision: str) -> str | None:
    """The state of an artifact that ran here: ONNX Runtime runs everywhere."""
    return VERIFIED
