"""The mutants, by what they break."""

from ..mutant import Mutant
from . import distributed, files, fused, generic, indexer, kernels, losses, model, plug_in, selection

MUTANTS: tuple[Mutant, ...] = (
    *indexer.MUTANTS,
    *selection.MUTANTS,
    *kernels.MUTANTS,
    *fused.MUTANTS,
    *losses.MUTANTS,
    *model.MUTANTS,
    *files.MUTANTS,
    *plug_in.MUTANTS,
    *distributed.MUTANTS,
    *generic.MUTANTS,
)

__all__ = ["MUTANTS"]
