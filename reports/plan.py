"""The tables of a plan: parameters, layouts with their memory and time, work by part, what it costs.

A run takes part by "plan" in its header: what `harness.plan.command.document` makes, numbers in bytes, FLOP and seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from reports.schema import Run
from reports.text import duration, number, percent
from reports.training import Tables

GIB = 2**30
_WHY = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan as the header holds it; its first layout is the best one."""

    data: Mapping[str, Any]

    def tables(self, most: int) -> Tables:
        """Titles, column names and cells; no more than `most` layouts."""
        found: Tables = [self._parameters()]
        layouts = self.data["layouts"]
        fitting = [one for one in layouts if not one["why"]]
        best = layouts[0]
        if "memory" in best:
            found += [self._memory(best), self._work(best), self._seconds(best)]
        if fitting:
            found.append(self._fitting(fitting[:most]))
        refused = [one for one in layouts if one["why"]]
        if refused:
            rows = [[one["layout"], one["why"]] for one in refused[: min(most, _WHY)]]
            found.append(("layouts that do not fit", ["layout", "why"], rows))
        return found

    def notes(self) -> list[str]:
        """What the numbers are, in sentences."""
        d = self.data
        dense, selected = d["kl"]["dense"], d["kl"]["selected"]
        recomputed = "with" if d["checkpointing"] else "without"
        found = [
            f"Stage {d['stage']}, {_trains(d)}, {d['batch']} x {d['length']} tokens a rank before cp divides them, {d['dtype']} "
            f"weights, gradients and optimizer state, {recomputed} gradient checkpointing; attention by the path {d['path']}.",
            f"{_layouts(d['layouts_tried'])} tried on {d['gpus']} x {d['gpu']['name']}, {d['layouts_that_fit']} fit with "
            f"{percent(d['headroom'])} of a GPU's {d['gpu']['memory'] / GIB:.0f} GiB left free.",
            f"The KL of the indexer, for a rank's sequences before cp divides them, takes {_flop(dense)} over every visible key "
            f"(eq. 3), which grows as the square of the length, and {_flop(selected)} over the selected ones (eq. 4).",
            "Seconds are floors from data sheets: matrix products at the dense bf16 rate, bytes at the bandwidth of memory and "
            "links, communication behind computation, experts evenly loaded. No real run reaches them.",
        ]
        if d["measured"] is not None:
            share = d["measured"]["share"]
            found.append(f"Of the GPU's rate {percent(share)} was measured: {d['measured']['on']}.")
        else:
            why = d["not_measured"]
            found.append(
                f"{why} " * bool(why) + f"No fraction of a {d['gpu']['name']}'s rate was measured, so that only floors are given; "
                "`--measured` takes a record of `v32 bench` on that GPU."
            )  # fmt: skip
        if d["checkpointing"] and d["trains"] == "indexer":
            found.append(
                "Checkpointing keeps more than it saves here: every layer is computed again with all that a backward of the "
                "model would need, which never comes to set it free."
            )
        if d["trains"] != "model" and any(not one["layout"].endswith("tp=1") for one in d["layouts"]):
            found.append(
                "With tp above 1 the indexer's loss is computed by the implementation in plain torch, which reaches no floor."
            )
        if d["lora"]:
            found.append(
                "Activations are those of whole weights; an adapter's own, and merged copies of stacked experts, come on top "
                "and were not modelled."
            )
        if d["cost"] is not None:
            found.append(self._cost())
        return found

    def _parameters(self) -> tuple[str, list[str], list[list[str]]]:
        rows = [[g["group"], f"{g['count']:,}", f"{g['trainable']:,}"] for g in self.data["parameters"]]
        rows.append(["all", *(f"{sum(g[key] for g in self.data['parameters']):,}" for key in ("count", "trainable"))])
        return "parameters", ["group", "parameters", "trainable"], rows

    def _memory(self, best: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
        memory = best["memory"]
        words = {
            "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state",
            "kept": "activations kept by the forward", "workspace": "work beside them at the peak",
            "communication": "communication buffers",
        }  # fmt: skip
        rows = [[text, f"{memory[key] / GIB:.3f}"] for key, text in words.items()]
        rows.append([f"peak, at {memory['moment']}", f"{memory['total'] / GIB:.3f}"])
        return f"memory of a rank, layout {best['layout']}", ["what", "GiB"], rows

    def _work(self, best: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
        total = sum(best["flop"].values())
        rows = [[part, _flop(value), percent(value / total)] for part, value in best["flop"].items()]
        return "work of a rank and step", ["part", "FLOP", "of all"], [*rows, ["all", _flop(total), "100%"]]

    def _seconds(self, best: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
        seconds, share = best["seconds"], self._share()
        rows = [[name, f"{seconds[name]:.4g}", ""] for name in ("computation", "update", "communication")]
        for purpose, size in best["sent"].items():
            rows.append([f"sent: {purpose}", "", f"{size / GIB:.3g} GiB"])
        rows.append(["step, floor", f"{seconds['floor']:.4g}", f"{best['tokens_a_second']:,.0f} tokens/s on all GPUs"])
        if share is not None:
            slow = max(seconds["computation"] / share + seconds["update"], seconds["communication"])
            rows.append(["step, by the measured fraction", f"{slow:.4g}", f"{best['tokens'] / slow:,.0f} tokens/s"])
        return "time of a step", ["what", "seconds", ""], rows

    def _fitting(self, layouts: list[Any]) -> tuple[str, list[str], list[list[str]]]:
        rows = [
            [one["layout"], _gib(one["memory"]["total"]), f"{one['seconds']['floor']:.4g}",
             f"{one['seconds']['communication']:.4g}", f"{one['tokens_a_second']:,.0f}"]
            for one in layouts
        ]  # fmt: skip
        return "layouts that fit", ["layout", "GiB a rank", "s a step, floor", "s communication", "tokens/s"], rows

    def _cost(self) -> str:
        cost = self.data["cost"]
        hours = cost["gpu_hours_at_floor"]
        text = f"{number(cost['tokens'])} tokens take at least {hours:,.1f} GPU hours ({duration(3600 * hours / self.data['gpus'])} on all)"
        if cost["gpu_hours_measured"] is not None:
            text += f", {cost['gpu_hours_measured']:,.1f} by the measured fraction"
        if cost["price"] is not None:
            text += f"; at US$ {cost['price']:g} an hour at least US$ {hours * cost['price']:,.0f}"
        return text + "."

    def _share(self) -> float | None:
        measured = self.data["measured"]
        return None if measured is None else cast(float, measured["share"])


def plan(run: Run) -> Plan | None:
    """The plan of a run, or None when it is another kind of run."""
    found = run.header.get("plan")
    return Plan(found) if isinstance(found, dict) and found.get("layouts") else None


def _flop(value: float) -> str:
    """A number of operations with its prefix."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def _gib(size: float) -> str:
    """One decimal, as memories are compared; more of what would be 0.0."""
    return f"{size / GIB:.1f}" if size >= GIB / 20 else number(size / GIB)


def _layouts(count: int) -> str:
    return "1 layout was" if count == 1 else f"{count} layouts were"


def _trains(data: Mapping[str, Any]) -> str:
    who = {"model": "all but the indexer trains", "indexer": "only the indexer trains", "all": "everything trains"}
    adapters = f", by adapters on {' and '.join(data['lora'])}" if data["lora"] else ""
    return who[data["trains"]] + adapters
