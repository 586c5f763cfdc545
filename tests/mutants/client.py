"""Mutants of the client's session, its replies and its futures."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CLIENT = "superserve/client"

_BOOKS = ("tests/superserve/client/test_session.py",)
_EDGES = ("tests/superserve/client/test_edges.py",)
_CHECKS = ("tests/superserve/client/test_checks.py",)
_WAITING = ("tests/superserve/client/test_futures.py",)

CLIENT = (
    # --- taking in and sending ---------------------------------------------------------------
    Mutant(
        "the byte bound is refused itself",
        _CLIENT,
        "or self.held_bytes + n_bytes > self.max_bytes\n",
        "or self.held_bytes + n_bytes >= self.max_bytes\n",
        _BOOKS,
    ),
    Mutant(
        "one query more than the bound is taken",
        _CLIENT,
        "or len(pending) >= self.max_outstanding\n",
        "or len(pending) > self.max_outstanding\n",
        _BOOKS,
    ),
    Mutant(
        "in a pause no submit wakes the sender",
        _CLIENT,
        "must_tell = self._is_resting or (self._is_pausing and len(pending) == 1)",
        "must_tell = self._is_resting",
        _BOOKS,
    ),
    Mutant(
        "the sender rests on what has gathered",
        _CLIENT,
        "self._is_resting = not self.has_outbound",
        "self._is_resting = True",
        _BOOKS,
    ),
    Mutant("a cancelled query is sent all the same", _CLIENT, "if self._has_holes:\n", "if False:\n", _EDGES),
    Mutant(
        "a query cancelled before it was sent is cancelled at the router",
        _CLIENT,
        "for query in cancelled if query.query_id <= self._sent_through]",
        "for query in cancelled]",
        _BOOKS,
    ),
    Mutant(
        "a cancelled query's payload is kept",
        _CLIENT,
        '            query.payload = b""  # not in `cancel`: another thread may be sending it\n',
        "            pass\n",
        _BOOKS,
    ),
    Mutant(
        "a cancelled query's bytes stay held",
        _CLIENT,
        ("            self.held_bytes -= query.n_bytes\n            self._cancelled.append(query)"),
        "            self._cancelled.append(query)",
        _BOOKS,
    ),
    Mutant(
        "the slack is the deadline",
        _CLIENT,
        "query.deadline_ns - now_ns for query in batch",
        "query.deadline_ns for query in batch",
        _BOOKS,
    ),
    Mutant(
        "floors are not sent",
        _CLIENT,
        "if query.min_accuracy or query.priority or query.trace:",
        "if query.priority > 255:",
        _EDGES,
    ),
    Mutant(
        "large payloads are packed",
        _CLIENT,
        "if max(sizes) >= FRAMED_BYTES:",
        "if max(sizes) > FRAMED_BYTES:",
        _BOOKS,
    ),
    Mutant("a frame grows without bound", _CLIENT, " and sum(sizes) <= PACKED_BYTES", "", _BOOKS),
    # --- routers that come and go ------------------------------------------------------------
    Mutant(
        "what the old router had is sent unmarked",
        _CLIENT,
        "has_options=True, resubmitted=True)",
        "has_options=True, resubmitted=False)",
        _BOOKS,
    ),
    Mutant(
        "queries without slack are sent again",
        _CLIENT,
        "if query.deadline_ns - now_ns > HOPELESS_NS and query.n_sends",
        "if query.deadline_ns - now_ns > 0 and query.n_sends",
        _BOOKS,
    ),
    Mutant("a query is sent round for ever", _CLIENT, " and query.n_sends < MAX_SENDS - 1\n", "\n", _BOOKS),
    Mutant(
        "a new router wakes no sender",
        _CLIENT,
        "or ((self._is_to_home or self._returned) and self.epoch is not None)",
        "or False",
        _EDGES,
    ),
    Mutant(
        "a new router is given nothing",
        _CLIENT,
        "everything = list(self._pending.values()) if is_to_home else []",
        "everything = []",
        _BOOKS,
    ),
    Mutant(
        "without a router queries wait past their deadline",
        _CLIENT,
        "return deadline_ns if deadline_ns - HOPELESS_NS > now_ns else None",
        "return deadline_ns if deadline_ns > now_ns else None",
        _BOOKS,
    ),
    Mutant(
        "nothing is looked at when a router is lost",
        _CLIENT,
        "            self._time(ids, 0)",
        "            self._time(ids, 1 << 62)",
        _BOOKS,
    ),
    Mutant(
        "the new router is blamed for the old one's silence",
        _CLIENT,
        ("        self._is_to_home = True\n        self._asked_ns = None"),
        "        self._is_to_home = True",
        _EDGES,
    ),
    # --- waiting too long --------------------------------------------------------------------
    Mutant(
        "a LATE answer is not waited for",
        _CLIENT,
        "if now_ns >= deadline_ns + GRACE_NS:\n            return None",
        "if now_ns >= deadline_ns:\n            return None",
        _BOOKS,
    ),
    Mutant(
        "a silent router is not asked", _CLIENT, "self.wants_ping = True", "self.wants_ping = False", _BOOKS
    ),
    Mutant(
        "a router that answers when asked is given up",
        _CLIENT,
        "if self._asked_ns is not None and heard_ns >= self._asked_ns:",
        "if self._asked_ns is not None and heard_ns > self._asked_ns + PROBE_NS:",
        _EDGES,
    ),
    Mutant(
        "a router is asked before it may answer",
        _CLIENT,
        "if now_ns < deadline_ns + QUIET_NS:",
        "if now_ns < deadline_ns:",
        _BOOKS,
    ),
    Mutant(
        "an answered query waits for its deadline",
        _CLIENT,
        "            self._drop_answered()\n",
        "            pass\n",
        _BOOKS,
    ),
    Mutant(
        "what expires keeps its bytes",
        _CLIENT,
        ("return False  # just cancelled: that ended it\n            self.held_bytes -= query.n_bytes"),
        "return False",
        _BOOKS,
    ),
    Mutant("answers keep their bytes", _CLIENT, "self.held_bytes -= freed", "self.held_bytes -= 0", _EDGES),
    Mutant(
        "a closed session takes queries",
        _CLIENT,
        "            self._is_closed = True",
        "            self._is_closed = False",
        _BOOKS,
    ),
    # --- checks ------------------------------------------------------------------------------
    Mutant(
        "an SLO of nothing is taken",
        _CLIENT,
        "number is not None and 0 < number <= MAX_SLACK_NS / _MS:",
        "number is not None and 0 <= number <= MAX_SLACK_NS / _MS:",
        _CHECKS,
    ),
    Mutant("floors stop at 99 %", _CLIENT, "0 <= number <= 100:", "0 <= number < 100:", _CHECKS),
    Mutant(
        "a transposed array is sent as it lies",
        _CLIENT,
        "if dtype.kind in _PLAIN_KINDS and payload.flags.c_contiguous:",
        "if dtype.kind in _PLAIN_KINDS:",
        _CHECKS,
    ),
    Mutant(
        "an array of another dtype is taken",
        _CLIENT,
        "(dtype != expected.dtype or payload.shape != expected.spec.shape)",
        "payload.shape != expected.spec.shape",
        _CHECKS,
    ),
    # --- replies -----------------------------------------------------------------------------
    Mutant("a late reply is not late", _CLIENT, "is_late = group.status == _LATE", "is_late = False", _BOOKS),
    Mutant(
        "every query gets the first one's bytes",
        _CLIENT,
        "view[i * each : (i + 1) * each]",
        "view[:each]",
        _EDGES,
    ),
    Mutant("outputs of varied length are shifted", _CLIENT, "[0, *accumulate(", "[1, *accumulate(", _BOOKS),
    Mutant(
        "waits are a thousand times as long",
        _CLIENT,
        "return self._waits_us[i] / 1000",
        "return self._waits_us[i] / 1",
        _BOOKS,
    ),
    Mutant(
        "those that waited differently share a timeline",
        _CLIENT,
        "if last is None or last.queued_ms != queued_ms:",
        "if last is None:",
        _BOOKS,
    ),
    Mutant(
        "an output of another size is the model's",
        _CLIENT,
        "if spec is None or group.output_bytes != spec.n_bytes:",
        "if spec is None:",
        _EDGES,
    ),
    Mutant(
        "a reply may be written to",
        _CLIENT,
        "rows.flags.writeable = False",
        "rows.flags.writeable = rows.flags.writeable",
        _EDGES,
    ),
    # --- futures -----------------------------------------------------------------------------
    Mutant(
        "a cancelled future is not cancelled",
        _CLIENT,
        "return self._is_cancelled\n",
        "return False\n",
        _WAITING,
    ),
    Mutant(
        "a callback added at the end is lost",
        _CLIENT,
        "        _call(fn, self)\n\n    def __repr__",
        "        return\n\n    def __repr__",
        _WAITING,
    ),
    Mutant(
        "callbacks run twice",
        _CLIENT,
        "callbacks, future._callbacks = future._callbacks, None",
        "callbacks = future._callbacks",
        _EDGES,
    ),
    Mutant("waiting threads are not woken", _CLIENT, "self._condition.notify_all()", "pass", _EDGES),
    Mutant("each future gets the first answer", _CLIENT, "future._index = i", "future._index = 0", _EDGES),
    Mutant(
        "a reply is made again each time it is asked for",
        _CLIENT,
        ("            self._answers = None\n        return self._outcome"),
        "        return answers.outcome(self._index, self.submitted_ns) if answers else self._outcome",
        _WAITING,
    ),
    Mutant(
        "a failing callback harms those behind it",
        _CLIENT,
        "    except Exception:  # the",
        "    except ValueError:  # the",
        _WAITING,
    ),
    Mutant(
        "a wait of no time blocks on a loop",
        _CLIENT,
        "if timeout is None or timeout > 0:",
        "if True:",
        _WAITING,
    ),
)
