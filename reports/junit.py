"""A run as JUnit XML: a suite a family, a case a verdict."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from xml.etree.ElementTree import Element, SubElement

from reports.records import Run, Status, Verdict, verdict_line, why_not_complete
from reports.text import clean
from reports.view import Labels, failure_details, families, measured, what_ran_where, worst

# XML 1.0 has no place for these; `clean` writes the other characters that it lacks as their escapes.
_NOT_XML = re.compile("[\ufffe\uffff]")


def junit(run: Run) -> str:
    """The report of a run. One that did not end has a case that says so, and is an error."""
    labels = Labels(run)
    root = Element("testsuites", name=_text(verdict_line(run)))
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for family, verdicts in families(run).items():
        suite = SubElement(root, "testsuite", name=_text(family))
        _properties(run, suite)
        for verdict in verdicts:
            _case(verdict, labels, suite)
        _count(suite, totals, sum(verdict.seconds for verdict in verdicts))
    stopped = why_not_complete(run)
    if stopped:
        suite = SubElement(root, "testsuite", name="run")
        _properties(run, suite)
        case = SubElement(suite, "testcase", classname="run", name="the run went to its end", time="0.000")
        SubElement(case, "error", type="incomplete", message=_text(stopped))
        _count(suite, totals, 0.0)
    root.attrib.update({name: str(total) for name, total in totals.items()})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _properties(run: Run, suite: Element) -> None:
    properties = SubElement(suite, "properties")
    for name, value in what_ran_where(run):
        SubElement(properties, "property", name=_text(name), value=_text(value))


def _case(verdict: Verdict, labels: Labels, suite: Element) -> None:
    dtype = labels.dtype(verdict)
    name = f"{verdict.check}[{dtype}]" if dtype else verdict.check
    case = SubElement(
        suite, "testcase",
        classname=_text(f"{verdict.family}.{verdict.subject}"), name=_text(f"{name} {verdict.case}".strip()),
        time=f"{verdict.seconds:.3f}",
    )  # fmt: skip
    details = failure_details(verdict)
    first = details[0] if details else str(verdict.status)
    match verdict.status:
        case Status.FAILED | Status.VACUOUS:
            said = SubElement(case, "failure", type=verdict.status.value, message=_text(first))
        case Status.ERROR:
            said = SubElement(case, "error", type=verdict.status.value, message=_text(first))
        case Status.SKIPPED | Status.NOT_APPLICABLE:
            SubElement(case, "skipped", message=_text(f"{verdict.status}: {verdict.reason}"))
            return
        case Status.VERIFIED:
            SubElement(case, "system-out").text = _text(measured(worst(verdict)))
            return
    said.text = _text("\n".join([*details, *([f"$ {verdict.reproduce}"] if verdict.reproduce else [])]))


def _count(suite: Element, totals: dict[str, int], seconds: float) -> None:
    found = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": len(suite.findall("testcase/skipped")),
    }
    for name, count in found.items():
        suite.set(name, str(count))
        totals[name] += count
    suite.set("time", f"{seconds:.3f}")


def _text(text: str) -> str:
    return _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", clean(text))
