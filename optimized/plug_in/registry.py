"""What is replaced in transformers while the plug-in is in, and how it is put back.

Two seams:

1. `register_patch_mapping`, for the parts of a model: layer, attention, indexer. `from_pretrained` and `from_config` build
   with it by themselves; while a constructor is called directly, the names in its own module are replaced.
2. For the models themselves, backbone and causal LM, there is no seam: whoever imported the class holds it. So their
   `__init__` is wrapped: what it has built becomes a model of our subclass, which has the same name.

No name of transformers stays replaced between two constructions. (A name that is looked up while it is replaced can stay
so for good: transformers' lazy modules remember what they found.)

A model is what it was built as. One that was built while the plug-in was in keeps our operators after it is out, also
when a backward recomputes its layers; one that was built before keeps transformers'.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any

import transformers
from packaging.version import Version

# The first and the last minor version that the tests of the plug-in run on.
TESTED_VERSIONS = ((5, 17), (5, 23))

_lock = threading.RLock()
_held: list["PlugIn"] = []
_undo = ExitStack()


class PlugIn:
    """One call of `plug_into_transformers`: `unplug` or the end of a `with` block takes it back."""

    def unplug(self) -> None:
        """Put transformers back as it was, unless another call still holds the plug-in; a second time does nothing."""
        with _lock:
            if self not in _held:
                return
            _held.remove(self)
            if not _held:
                _undo.close()

    def __enter__(self) -> "PlugIn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unplug()


def plug_into_transformers() -> PlugIn:
    """Make transformers' `DeepseekV32ForCausalLM` and `GlmMoeDsaForCausalLM` compute by the operators of `optimized.ops`.

    Models that are built from now on, by `from_pretrained`, `from_config` or a constructor, keep their parameters'
    names, checkpoints, caches and plans; they hold no L×L tensor, and their indexers can be trained:

        model(**batch, output_indexer_kl_loss=True).indexer_kl_loss      nats a row, summed over indexers
        config.indexer_kl_coef = 1.0          loss = lm_loss + indexer_kl_coef · indexer_kl_loss, for Trainer
        config.use_sparse_attention = False   attention over every visible key, and the loss of eq. 3: the warm-up
        config.detach_indexer_input = False   lets the KL loss reach the layers below

    Calls may be nested; the last `unplug` restores transformers.

    Returns:
        A handle whose `unplug()` takes this call back; also a context manager that does so at its end.

    Raises:
        RuntimeError: a version of transformers that the plug-in was not tested on.
        ValueError: one of the classes has a patch of somebody else.
    """
    check_version(transformers.__version__)
    with _lock:
        if not _held:
            _install()
        handle = PlugIn()
        _held.append(handle)
    return handle


def check_version(version: str) -> None:
    """Refuse a transformers of `version`, unless the plug-in was tested on it.

    Raises:
        RuntimeError: it is outside of `TESTED_VERSIONS`.
    """
    lowest, highest = TESTED_VERSIONS
    parsed = Version(version)
    if parsed.is_prerelease or not lowest <= parsed.release[:2] <= highest:
        tested = " to ".join(".".join(map(str, edge)) for edge in TESTED_VERSIONS)
        raise RuntimeError(
            f"transformers is {version}, but plug_into_transformers is tested on releases {tested}: install one of these."
        )


def _install() -> None:
    # Here, because another version of transformers may lack what these modules import.
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    from . import deepseek_v32, glm_moe_dsa

    families = (deepseek_v32, glm_moe_dsa)
    parts = {name: part for family in families for name, part in family.PARTS.items()}
    if taken := sorted(parts.keys() & get_patch_mapping().keys()):
        raise ValueError(
            f"transformers' patch mapping has an entry of somebody else for {taken[0]}; unregister_patch_mapping it first."
        )
    with ExitStack() as undo:
        for family in families:
            # Building a model under a patch mapping writes into this table of the class that all models share.
            recorded = family.upstream_base._can_record_outputs
            undo.callback(_put_back, recorded, dict(recorded))
            for name in family.PARTS:
                # transformers leaves them replaced when a construction fails.
                undo.callback(setattr, family.upstream, name, getattr(family.upstream, name))
            for original, ours in family.MODELS.items():
                undo.callback(setattr, original, "__init__", original.__init__)
                _wrap_init(original, ours, family.PARTS)
                # By this table transformers finds the outputs that it records. It is filled when a model is constructed,
                # by the class which that has then. The models stay, and so do their entries.
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(ours), ours._can_record_outputs)
        register_patch_mapping(parts)
        undo.callback(_unregister, parts)
        _hush_aliases(undo)
        _undo.push(undo.pop_all())


def _hush_aliases(undo: ExitStack) -> None:
    """Keeps transformers' alias modules from importing their targets when they are asked for their names.

    `apply_patches` asks every module. Versions before 5.23 have an alias for each image processor, some of which cannot
    be imported without torchvision. None of them holds a name that is replaced.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "__dir__" in (names := vars(module)):
            undo.callback(names.__setitem__, "__dir__", names["__dir__"])
            names["__dir__"] = list


def _unregister(parts: dict[str, Any]) -> None:
    """Takes our entries out of transformers' patch mapping, as far as nobody has cleared or overwritten them."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    unregister_patch_mapping([name for name, part in get_patch_mapping().items() if parts.get(name) is part])


def _put_back(table: dict[str, Any], entries: dict[str, Any]) -> None:
    table.clear()
    table.update(entries)


def _wrap_init(original: type[Any], ours: type[Any], parts: dict[str, Any]) -> None:
    init: Callable[..., None] = original.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with _parts_replaced(sys.modules[original.__module__], parts):
            init(self, *args, **kwargs)
        if type(self) is original:
            self.__class__ = ours

    __init__.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    original.__init__ = __init__


@contextmanager
def _parts_replaced(modeling: Any, parts: dict[str, Any]) -> Iterator[None]:
    """Our `parts` in the place of those of `modeling`, the one module whose names a constructor looks up.

    `apply_patches` would ask every module of transformers for its names, a third of a second each time.
    """
    theirs = {name: getattr(modeling, name) for name in parts}
    # By from_pretrained, from_config, or the causal LM around this backbone, they are there already.
    if any(theirs[name] is part for name, part in parts.items()):
        yield
        return
    vars(modeling).update(parts)
    try:
        yield
    finally:
        vars(modeling).update(theirs)
