"""Subjects that somebody else wrote: loaded from a file or an entry point, and asked what they declare."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

import reference
from reference import DeepseekV32Config

from .subjects import ALL, MODEL_CAPABILITIES, OPERATORS, Factory, Subject, operator_capabilities


def from_file(path: Path, name: str) -> Callable[..., Any]:
    """The callable `name` of the Python file `path`.

    Raises:
        ValueError: no such file, one that does not load, or no such callable in it.
    """
    if not path.is_file():
        raise ValueError(f"--subject names the file {path}, which does not exist.")
    module_spec = importlib.util.spec_from_file_location(f"v32_subject_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--subject names the file {path}, which is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--subject: {path} does not load: {type(error).__name__}: {error}.") from error
    if not callable(factory := getattr(module, name, None)):
        raise ValueError(f"--subject: {path} has no factory called {name!r}.")
    return cast(Callable[..., Any], factory)


def declared(given: Callable[..., Any], spec: str) -> Subject:
    """The subject behind `given`: a factory of models, or a function without parameters that returns operators.

    Raises:
        ValueError: it cannot be called, or its capabilities are not declared, or not known.
    """
    name = spec.rpartition(":")[2] or spec
    if _takes_nothing(given):
        return _operators(given, name, spec)
    capabilities = _checked(_of_model(given, spec), ALL - {"model"}, spec) | {"model"}
    return Subject(name, cast(Factory, given), capabilities, spec)


def _takes_nothing(given: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(given).parameters.values()
    except (TypeError, ValueError):
        return False
    return not parameters


def _operators(given: Callable[..., Any], name: str, spec: str) -> Subject:
    try:
        found = given()
    except Exception as error:
        raise ValueError(f"--subject {spec}: calling it as {name}() raised {type(error).__name__}: {error}.") from error
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"--subject {spec} takes no arguments, so that it must return a dictionary of operators; "
            f"it returned {found!r}."
        )
    for operator, function in found.items():
        if operator not in OPERATORS:
            raise ValueError(f"--subject {spec} offers {operator!r}; operators are {', '.join(OPERATORS)}.")
        if not callable(function):
            raise ValueError(f"--subject {spec}: its {operator} is {function!r}, which cannot be called.")
        _checked(getattr(function, "capabilities", ()), frozenset(OPERATORS[operator]), f"{spec}, {operator}")
    return Subject(name, None, operator_capabilities(found), spec, dict(found))


def _of_model(factory: Callable[..., Any], spec: str) -> Any:
    """What the factory declares itself, or the module that it builds.

    A module derived from the reference's class can do all that the reference can, unless it says otherwise.
    """
    found = getattr(factory, "capabilities", None)
    if found is not None:
        return found
    config = DeepseekV32Config.preset("tiny")
    with torch.device("meta"):
        state = reference.DeepseekV32ForCausalLM(config).state_dict()
    try:
        zeros = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
        module = factory(config, zeros, device=torch.device("cpu"), dtype=torch.float32)
    except Exception as error:
        raise ValueError(
            f"--subject {spec}: calling it as factory(config, state_dict, device=, dtype=) raised "
            f"{type(error).__name__}: {error}."
        ) from error
    found = getattr(module, "capabilities", None)
    if found is None and isinstance(module, reference.DeepseekV32ForCausalLM):
        found = ALL - {"model"}
    if found is None:
        raise ValueError(
            f"--subject {spec} declares no capabilities; give the factory or its module an attribute "
            f"capabilities = frozenset({{…}}) with any of {', '.join(c for c in MODEL_CAPABILITIES if c != 'model')}."
        )
    return found


def _checked(found: Any, known: frozenset[str], what: str) -> frozenset[str]:
    if not isinstance(found, (set, frozenset, list, tuple)):
        raise ValueError(f"--subject {what}: its capabilities are {found!r}; they must be a set of names.")
    if unknown := sorted(map(str, set(found) - known)):
        raise ValueError(f"--subject {what} declares {unknown[0]!r}; capabilities are {', '.join(sorted(known))}.")
    return frozenset(found)
