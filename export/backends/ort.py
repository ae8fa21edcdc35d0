"""The onnxruntime backends: one per execution provider, each with its real arithmetic and placement said aloud.

onnxruntime falls back in silence three ways: a provider that fails to load is replaced by the CPU, single nodes that it
lacks go to the CPU, and half-precision operators are computed in float32 between casts. So the providers are read back
after loading, the placement of every node is recorded and judged, and for models that store narrow values the optimised
graph is read to see what each product is really computed in.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data

from lowprec.errors import MissingDependencyError, NoKernelError, UnsupportedError
from lowprec.export.backends.arithmetic import describe, narrow_storage, product_types
from lowprec.export.backends.base import OnnxBackend, Session, narrowed, onnx_model
from lowprec.export.backends.cuda import missing_driver
from lowprec.export.onnx_files import first_line
from lowprec.export.tensors import specs_of
from lowprec.packages import is_installed

CPU = "CPUExecutionProvider"
# What providers leave to the CPU on purpose: arithmetic on shapes, a few numbers each.
_SHAPE_OPS = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather"}
    | {"Identity", "Max", "Min", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze"}
    | {"Sub", "Unsqueeze", "Where"}
)


class OrtSession(Session):
    """An onnxruntime session on one provider."""

    def __init__(
        self, session: Any, model: onnx.ModelProto, arithmetic: str, placement: Mapping[str, int] | None = None
    ) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = specs_of([value for value in model.graph.input if value.name not in weights])
        super().__init__(inputs, specs_of(model.graph.output), arithmetic, placement)
        self._session = session

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [spec.name for spec in self.outputs]
        cast = {spec.name: narrowed(feeds[spec.name], spec) for spec in self.inputs}
        try:
            values = self._session.run(names, cast)
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise UnsupportedError(f"onnxruntime cannot run this model on this batch: {first_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


class OnnxRuntime(OnnxBackend):
    """onnxruntime on one execution provider.

    Args:
        name: of the backend.
        summary: one line for people.
        provider: onnxruntime's name of it.
        extra: what `pip install lowprec[...]` brings it.
        options: of the provider.
        device: where it computes, in words.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        provider: str,
        extra: str,
        options: Mapping[str, str] | None = None,
        device: str = "on the CPU",
    ) -> None:
        self.name, self.summary, self.provider = name, summary, provider
        self._extra, self._options, self._device = extra, dict(options or {}), device

    def unavailable(self) -> str | None:
        """Why onnxruntime, or the one with this provider, is not here, or None."""
        if not is_installed("onnxruntime"):
            return f"onnxruntime is not installed; pip install lowprec[{self._extra}]"
        import onnxruntime

        return missing_provider(self.provider, onnxruntime.get_available_providers(), self._extra)

    def cannot_run(self) -> str | None:
        """None on a CPU; else whether the NVIDIA driver is missing."""
        return None if self.provider == CPU else missing_driver()

    def copies_weights(self, precision: str) -> bool:
        """Narrow ones are widened when the graph is optimised; float32 ones stay mapped."""
        return precision != "fp32"

    def _open(self, artefact: str | Path | onnx.ModelProto) -> Session:
        import onnxruntime

        model = onnx_model(artefact)
        source = model.SerializeToString() if isinstance(artefact, onnx.ModelProto) else str(artefact)
        stored = narrow_storage(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone: it warns of every optimised graph that is written
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        is_large = any(uses_external_data(tensor) for tensor in model.graph.initializer)
        if is_large:
            # Weights that are mapped stay so: prepacking would copy them all, for speed that a verdict has no use of.
            options.add_session_config_entry("session.disable_prepacking", "1")
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            if stored and not is_large:
                options.optimized_model_filepath = str(optimised)
            session = self._load(source, options)
            computed = product_types(onnx.load(optimised)) if optimised.exists() else None
        check_providers(self.provider, session.get_providers())
        nodes = [
            (subgraph.ep_name, node.name, node.op_type)
            for subgraph in session.get_provider_graph_assignment_info()
            for node in subgraph.get_nodes()
        ]
        placement = checked_placement(self.provider, nodes)
        return OrtSession(session, model, describe(stored, computed, self._device), placement)

    def _load(self, source: str | bytes, options: Any) -> Any:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

        try:
            return onnxruntime.InferenceSession(source, options, providers=[(self.provider, self._options)])
        except NoKernel as error:
            raise NoKernelError(
                f"onnxruntime has no kernel for an operator of this model: {first_line(error)}"
            ) from None
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise UnsupportedError(f"onnxruntime cannot load this model: {first_line(error)}") from error

    def open_plain(self, model: onnx.ModelProto) -> Session:
        """A model in memory, without any optimisation: what its own operators compute, in the types it declares."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a model that it cannot run is told by the exception
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = self._load(model.SerializeToString(), options)
        return OrtSession(session, model, f"the types that the graph declares, {self._device}, not optimised")


def missing_provider(provider: str, available: Iterable[str], extra: str) -> str | None:
    """Why an onnxruntime that was built with some providers has not this one, or None."""
    built = [name.removesuffix("ExecutionProvider") for name in available]
    if provider.removesuffix("ExecutionProvider") in built:
        return None
    return (
        f"this onnxruntime was built for {', '.join(built)} and lacks {provider}; pip uninstall onnxruntime, then "
        f"pip install lowprec[{extra}]"
    )


def check_providers(asked: str, found: list[str]) -> None:
    """Raises `MissingDependencyError` unless the provider asked for is the one that onnxruntime loaded first."""
    if not found or found[0] != asked:
        raise MissingDependencyError(
            f"asked onnxruntime for {asked}, found {', '.join(found) or 'no provider'}: it fell back in silence; "
            "install the package and the driver that this provider needs"
        )


def checked_placement(asked: str, nodes: Iterable[tuple[str, str, str]]) -> dict[str, int]:
    """How many nodes ran on each provider.

    Args:
        asked: the provider.
        nodes: provider, name and operator of each node, as onnxruntime assigned them.

    Raises:
        UnsupportedError: a node that does more than arithmetic on shapes is on another provider.
    """
    nodes = list(nodes)
    fallen = [f"{name} ({kind})" for where, name, kind in nodes if where != asked and kind not in _SHAPE_OPS]
    if fallen:
        more = f" and {len(fallen) - 5} more" if len(fallen) > 5 else ""
        raise UnsupportedError(
            f"asked onnxruntime for {asked}, and it placed {', '.join(fallen[:5])}{more} on another provider; "
            "it has no kernel for them in this type"
        )
    return dict(Counter(where for where, _, _ in nodes))
