"""JUnit and JSON of stored runs: every verdict in its place, and nothing that a parser would stumble over."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from reports.junit import junit
from reports.records import Measure, Run, Status, verdict_line
from reports.summary import summary
from suites.meta.test_reports import FOOTER, HEADER, HOSTILE, stored_run, verdict

EVERY_CHARACTER = "".join(map(chr, range(0x2030))) + "\ud800\ufffe\uffff\U0001f600]]>&<!--"


def parsed(run):
    return ElementTree.fromstring(junit(run).encode("utf-8"))


def test_every_verdict_is_a_case_of_its_family():
    root = parsed(stored_run())
    assert {suite.get("name"): len(suite.findall("testcase")) for suite in root} == {
        "parity": 3, "selection": 2, "training": 1,
    }  # fmt: skip
    assert [root.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["6", "2", "0", "2"]
    failed = root.find(".//testcase[@name='parity.grads[fp32] text-left-padded']/failure")
    assert failed.get("type") == "failed"
    assert failed.get("message") == "why"
    assert "beyond its budget: worst row 0.02 / 0.01" in failed.text
    assert "$ v32 verify --case 'why'" in failed.text


def test_an_error_is_an_error_and_what_was_not_checked_says_why():
    run = stored_run(
        verdicts=(verdict("a", Status.ERROR, reason="ValueError: x"), verdict("b", Status.SKIPPED, reason="no GPU"))
    )
    root = parsed(run)
    assert root.find(".//error").get("message") == "ValueError: x"
    assert root.find(".//skipped").get("message") == "skipped: no GPU"


def test_where_it_ran_is_in_the_properties():
    properties = {item.get("name"): item.get("value") for item in parsed(stored_run()).iter("property")}
    assert properties["device"] == "cpu"
    assert properties["command"] == "v32 verify"


def test_a_run_that_did_not_end_is_an_error_of_its_own():
    root = parsed(stored_run(footer=None, problem="line 3, which starts at byte 90, is cut at byte 97."))
    assert root.get("errors") == "1"
    assert "cut at byte 97" in root.find("testsuite[@name='run']/testcase/error").get("message")
    assert parsed(Run(header={})).get("errors") == "1"


@pytest.mark.parametrize("text", [HOSTILE, EVERY_CHARACTER])
def test_no_text_breaks_the_file(text):
    run = stored_run(text, header={**HEADER, "subject": text})
    root = parsed(run)
    assert root.findall(".//script") == []
    said = root.find(".//failure").text
    assert "script" in said or "\\x00" in said
    assert "\x1b" not in said
    assert junit(run).count("<testcase") == 6


def test_the_summary_holds_what_the_record_says():
    run = stored_run()
    found = json.loads(summary(run))
    assert found["verdict"] == verdict_line(run)
    assert found["exit_code"] == 1
    assert found["complete"] is True
    assert found["counts"]["verified"] == 2
    assert [item["check"] for item in found["to_look_at"]] == ["parity.grads", "why"]
    assert found["to_look_at"][0]["reproduce"] == "v32 verify --case 'why'"
    assert [item["reason"] for item in found["not_checked"]] == ["no GPU", "fp8 is not declared"]
    worst = next(item for item in found["checks"] if item["check"] == "parity.logits")["worst"]
    assert worst["measure"] == "max"
    assert worst["used"] == pytest.approx(0.41)
    assert found["measurements"][0]["samples"] == [1.0, 3.0, 2.0]
    assert found["kills"] is found["timings"] is found["training"] is None


def test_the_summary_is_strict_json_whatever_the_numbers_and_texts():
    measures = (Measure("a", math.nan, 1.0), Measure("b", math.inf, 0.0))
    run = stored_run(verdicts=(verdict(HOSTILE, Status.FAILED, measures=measures),), footer=FOOTER)
    text = summary(run)
    assert text.isascii()

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    assert found["checks"][0]["worst"]["used"] in ("nan", "inf")
