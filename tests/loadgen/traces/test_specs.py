"""Specs say what they mean, scale as a whole, and name what is wrong with them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.traces.specs import KEYS, OPTIONAL, is_spec, parse_spec
from superserve.errors import TraceError

EXAMPLES = (
    "constant:rate=100",
    "poisson:rate=100",
    "gamma:rate=100,cv2=2",
    "bursty:base=1500,variant=5550,cv2=8",
    "accel:from=2500,to=4800,tau=250,cv2=8",
    "spikes:size=200,every=0.2,width=0.01,base=100",
    "onoff:high=9000,low=500,on=0.2,off=0.3,cv2=4",
    "ramp-crash:from=500,to=9000,ramp=0.4,rest=0.1,cv2=4",
    "pareto:rate=6400,alpha=1.3,most=400",
    "maf-like:rate=6400",
)


def test_there_is_an_example_of_every_process() -> None:
    """No process goes untested."""
    assert [text.partition(":")[0] for text in EXAMPLES] == list(KEYS)


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_spec_prints_as_it_was_written(text: str) -> None:
    """Parsing and printing are inverse."""
    assert str(parse_spec(text, rate_qps=None)) == text


@pytest.mark.parametrize("name", OPTIONAL)
def test_keys_that_are_left_out_are_their_defaults(name: str) -> None:
    """A spec without its optional keys is the same as one that gives their defaults, and prints as short."""
    [example] = [text for text in EXAMPLES if text.startswith(f"{name}:")]
    pairs = example.partition(":")[2].split(",")
    short = f"{name}:" + ",".join(pair for pair in pairs if pair.partition("=")[0] in KEYS[name])
    whole = short + "".join(f",{key}={value:g}" for key, value in OPTIONAL[name].items())

    assert parse_spec(short, rate_qps=None) == parse_spec(whole, rate_qps=None)
    assert str(parse_spec(whole, rate_qps=None)) == short


def test_keys_come_in_any_order_and_spaces_do_not_matter() -> None:
    """The printed spec has the canonical order."""
    spec = parse_spec("bursty: cv2=8, variant=5e3 ,base=1500", rate_qps=None)

    assert str(spec) == "bursty:base=1500,variant=5000,cv2=8"


@pytest.mark.parametrize("text", EXAMPLES)
@settings(deadline=None)
@given(rate_qps=st.floats(0.1, 1e5), duration_s=st.floats(0.5, 100))
def test_scaling_gives_the_mean_and_keeps_the_proportions(
    text: str, rate_qps: float, duration_s: float
) -> None:
    """All rates share one factor; the CV² and the length of a ramp stay."""
    spec = parse_spec(text, rate_qps=None)
    scaled = spec.at_mean(rate_qps, duration_s)

    assert scaled.mean_qps(duration_s) == pytest.approx(rate_qps)
    assert scaled.implied_s() == pytest.approx(spec.implied_s())
    for key in ("cv2", "every", "width", "on", "off", "ramp", "rest", "alpha", "most"):
        assert scaled.values.get(key) == spec.values.get(key)


def test_only_acceleration_implies_a_duration() -> None:
    """It is the ramp's; a ramp to the same rate takes no time and implies none."""
    assert parse_spec("accel:from=2500,to=4800,tau=250,cv2=8", rate_qps=None).implied_s() == 9.2
    assert parse_spec("accel:from=5,to=5,tau=250,cv2=8", rate_qps=None).implied_s() is None
    assert parse_spec("poisson:rate=5", rate_qps=None).implied_s() is None


def test_the_rate_option_stands_in_for_a_missing_rate() -> None:
    """`poisson` at a rate of 7 is poisson:rate=7."""
    assert str(parse_spec("poisson", rate_qps=7)) == "poisson:rate=7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("poisson:rate=1", True),
        ("poisson", True),
        ("poison:rate=1", True),
        ("x:y", True),
        ("poison", False),
        ("trace.csv", False),
        ("./poisson:rate=1", False),
        ("a/b:c.csv", False),
        ("", False),
    ],
)
def test_a_spec_is_told_from_a_path(text: str, expected: bool) -> None:
    """A process's name or `word:` begins a spec; all else is a path."""
    assert is_spec(text) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison:rate=5", "no process 'poison'.*did you mean poisson"),
        ("Bursty:base=5", "no process 'Bursty'.*did you mean bursty"),
        ("zzz:rate=5", "no process 'zzz': expected one of constant, .*maf-like$"),
        (
            "bursty:base=1,varaint=2,cv2=1",
            "no key 'varaint': expected base, variant, cv2; did you mean variant",
        ),
        ("poisson:q=1", "no key 'q': expected rate$"),
        ("bursty:base=1,cv2=1", "variant is missing: expected bursty:base=..,variant=..,cv2=.."),
        ("bursty", "base is missing"),
        ("poisson:", "rate is missing"),
        ("poisson:rate=1,rate=1", "rate is given twice"),
        ("poisson:rate", "expected key=value, got 'rate'"),
        ("poisson:rate=1,", "expected key=value, got ''"),
        ("poisson:5", "expected key=value, got '5'"),
        ("poisson:rate=fast", "trace poisson: rate: expected a number, got 'fast'"),
        ("poisson:rate=", "rate: expected a number, got ''"),
        ("poisson:rate=0", "rate: expected a number above 0"),
        ("poisson:rate=-1", "rate: expected a number above 0"),
        ("poisson:rate=nan", "rate: expected a number above 0"),
        ("poisson:rate=inf", "rate: expected a number above 0"),
        ("accel:from=1,to=2,tau=0,cv2=1", "accel: tau: expected a number above 0"),
        ("bursty:base=1,variant=2,cv2=-1", "bursty: cv2: expected a number from 0"),
        ("bursty:base=1,variant=2,cv2=nan", "bursty: cv2: expected a number from 0"),
        ("spikes:size=0,every=1", "spikes: size: expected a number above 0 and at most 1000000"),
        ("spikes:size=2e6,every=1", "spikes: size: expected a number above 0 and at most 1000000"),
        ("spikes:size=5,every=0", "spikes: every: expected a number above 0"),
        ("spikes:size=5,every=1,width=2", "width: expected at most every, 1 s, got 2"),
        ("spikes:size=5,every=1,base=-1", "spikes: base: expected a number above 0"),
        ("spikes:size=5,each=1", "no key 'each': expected size, every, width, base$"),
        ("spikes:size=5", "every is missing: expected spikes:size=..,every=..$"),
        ("onoff:high=0,low=1,on=1,off=1", "onoff: high: expected a number above 0"),
        ("onoff:high=1,low=-1,on=1,off=1", "onoff: low: expected a number above 0"),
        ("onoff:high=1,low=0,on=1,off=0", "onoff: off: expected a number above 0"),
        ("onoff:high=1,low=0,on=1", "off is missing: expected onoff:high=..,low=..,on=..,off=..$"),
        ("ramp-crash:from=0,to=1,ramp=1,rest=0", "ramp-crash: from: expected a number above 0"),
        ("ramp-crash:from=1,to=1,ramp=0,rest=0", "ramp-crash: ramp: expected a number above 0"),
        ("ramp-crash:from=1,to=2,ramp=1,rest=-1", "ramp-crash: rest: expected a number above 0"),
        ("pareto:rate=1,alpha=0", "pareto: alpha: expected a number above 0 and at most 100"),
        ("pareto:rate=1,alpha=1,most=1.5", "pareto: most: expected a whole number, got '1.5'"),
        ("pareto:rate=1,alpha=1,most=1e7", "pareto: most: expected a number above 0 and at most 1000000"),
        ("pareto:rate=1,alpha=1,cv2=2", "no key 'cv2': expected rate, alpha, most"),
    ],
)
def test_a_wrong_spec_names_its_fault(text: str, message: str) -> None:
    """The error says which word is wrong, what was expected, and in one line."""
    with pytest.raises(TraceError, match=message) as caught:
        parse_spec(text, rate_qps=None)

    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("poisngburty:=,.0123456789-ecv2rav "), max_size=40))
def test_any_text_is_a_spec_or_a_trace_error(text: str) -> None:
    """Nothing else is raised, whatever is written."""
    with contextlib.suppress(TraceError):
        spec = parse_spec(text, rate_qps=None)
        assert spec.values.keys() == set(KEYS[spec.process])
