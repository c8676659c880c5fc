"""Every entry of the catalogue of public bugs (spec 5.2): its mutants, or why there is none.

A bug is here when the code that it lives in is here; where an engine has another path (a paged cache) it cannot exist.
"""

from .catalogue import MUTANTS

ENTRIES = (
    *(f"A{i:02}" for i in (*range(1, 10), *range(11, 16), *range(17, 25))),
    *(f"B{i:02}" for i in (1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 16, 18, 19, 20)),
    *(f"C{i:02}" for i in (1, 3, 5, 6, 8, 9, 10, 11, 12)),
    *(f"D{i:02}" for i in (1, 2, *range(4, 12), 14, 15, 16, 17)),
    *(f"E{i:02}" for i in (1, 3, 4, 5, 8, 9, 10, 13)),
)

OTHERWISE: dict[str, str] = {
    "A04": "the fault of A01 in another engine: its mutants stand there",
    "A05": "the fault of A01 in another engine: its mutants stand there",
    "A20": "cannot exist: the cache holds keys before they are quantised, and so no scales",
    "A21": "cannot exist: the cache has no pages, and RoPE is never in place",
    "C06": "no case of a check has 2^31 elements: suites/kernels runs each kernel beyond them, and sees 32 bits planted",
    "C10": "cannot exist: indices enter an autograd Function that answers None for them, or a comparison",
    "D08": "cannot exist: a coefficient of 0 switches the KL off by contract, and FSDP2, which runs the ranks, reduces what gradients there are",
    "D09": "a fault of tests: `choices.keys` names a run whose rows see no more than index_topk keys",
    "D17": "not numerical: a matter of the benchmark's FLOP count",
}


def coverage() -> dict[str, tuple[list[str], str]]:
    """For each entry the names of its mutants, and a sentence where there are none.

    Raises:
        ValueError: an entry that has neither.
    """
    found: dict[str, tuple[list[str], str]] = {}
    for entry in ENTRIES:
        names = [mutant.name for mutant in MUTANTS if mutant.entry == entry]
        if not names and entry not in OTHERWISE:
            raise ValueError(f"Entry {entry} of the catalogue has neither a mutant nor a reason.")
        found[entry] = names, OTHERWISE.get(entry, "")
    return found
