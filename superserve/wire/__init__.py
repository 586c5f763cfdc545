"""Wire protocol, version 2: the only place where bytes become messages. This page is the specification.

`layout` holds the numbers and fixed parts, `messages` the dataclasses, `encode` and `decode` one function
for each kind, `versions` the agreement on a version, `runs` the messages between load generators,
`traceparent` which trace a query is a part of. Imports `superserve.errors`, `superserve.build` and, for what
is not on the hot path, `superserve.fields`.

Every message is a list of ZeroMQ frames. Frame 0 begins with the prelude

    magic "SS" | version u8 | kind u8 | flags u16 | header_bytes u16       (all integers little-endian)

followed by the kind's header, its rows and its columns. Payloads and outputs follow in their own frames,
so that no process on the way has to copy or parse them. Nothing is pickled. Times are integer
nanoseconds; durations cross hosts, instants do not: if a sender stamps its own clock (`sent_ns`), the
receiver compares such stamps only with others of the same peer.

    kind          no.  sender -> receiver        frame 0 after the prelude          further frames
    HELLO           1  client|worker -> router   -                                  JSON
    WELCOME         2  router -> client|worker   -                                  JSON
    QUERIES         3  client -> router          header, ids, slacks, options       payloads
    RESULTS         4  router -> client          header, groups, ids, lengths       one a group
    CANCEL          5  client -> router          header, ids                        -
    PULL            6  worker -> router          header, rows                       -
    DIRECTIVE       7  router -> worker          header, segments, ids, slacks      payloads
    DONE            8  worker -> router          header, rows, statuses, lengths    one a batch
    PING            9  any -> any                stamp                              -
    PONG           10  any -> any                the PING's stamp, own stamp        -
    DRAIN          11  operator|worker -> router, router -> peers   -               JSON
    BYE            12  any -> any                -                                  JSON
    STATUS         13  any -> router -> back     -                                  JSON (only `wire` asks)
    REFUSED        14  router -> any             -                                  JSON
    RUN_SHARE      15  coordinator -> agent      -                                  JSON, due instants
    RUN_READY      16  sender|agent -> coordinator   -                              JSON
    RUN_START      17  coordinator -> sender|agent   -                              JSON
    RUN_STOP       18  coordinator -> sender|agent   -                              JSON
    RUN_PROGRESS   19  sender|agent -> coordinator   -                              JSON
    RUN_REPORT     20  sender|agent -> coordinator   -                              JSON, a frame a column
    RUN_FAILED     21  agent -> coordinator      -                                  JSON
    SHARE          22  client -> router -> back, router -> worker -> back   -       JSON

A retired kind's number is never reused.

What later releases add
-----------------------
Known fields never move. A release adds without a new version, and a receiver skips what it does not know:

- fields at the end of a header: `header_bytes` says how long it is;
- fields at the end of a row (a group, a segment): the header's `row_bytes` says how long each is;
- columns after the known ones, with flag EXTENDED: `n_bytes` u32 of all of them together, then for each
  tag u16, (2 pad), n_bytes u32, and its bytes; at most MAX_EXTENSIONS. Tag 1 is SHARED, 2 is TRACED, see
  below;
- keys of a JSON object, and columns of a run by name.

A flag adds bytes only where this page defines them; an unknown one is ignored. If a header
or a row is shorter than its known fields, or a length does not add up, the message is malformed.

Versions
--------
HELLO states `wire`, the lowest and the highest version that its sender speaks, and is itself written in the
lowest. WELCOME answers with `wire`, the highest that both speak; WELCOME and everything after it use that
version. A STATUS question, which needs no HELLO, also states the range. HELLO, STATUS, WELCOME and
REFUSED have the same layout in all versions, so that any two releases can find out that they share none. A
release also speaks its predecessor's version (LOWEST, HIGHEST; today both are 2); a peer that speaks only
version 1 is refused.

Without a common version the router answers REFUSED, code "version", in the version that the peer wrote in.
The reason names both sides' versions, `wire` is the router's own range. The router answers any other
message in a version that it does not speak in the same way.

Messages
--------
QUERIES: `epoch` (of the WELCOME it was sent under) u64, `sent_ns` i64, `n` u32,
`payload_bytes` u32 (of each query; VARIED if they differ). Columns, each of n:
`ids` u64, unique within the client's session and the same when a query is sent
again; `slacks` i64 ns, time left at the moment of sending; then, as flags say,
`min_accuracy` f32 percent (MIN_ACCURACY), `priority` u8 (PRIORITY), `lengths` u32
(LENGTHS, exactly when VARIED). Payloads: packed end to end in one frame, or with
the flag FRAMES one frame a query. RESUBMITTED: these ids may be known already. The extension column
TRACED (tag 2) has a row for each query that came with a `traceparent`: index u32 (ascending), flags u8,
(3 pad), trace id of 16 bytes, parent id of 8. A router that does not know it serves the queries all the same.

RESULTS: `epoch` u64, `n` u32, `n_groups` u32, `row_bytes` u16, (2 pad). A group is a
stretch of queries that ended alike: count u32, status u8, (3 pad), subnet u16,
batch_size u16, accuracy f32, queued, to_start, executing, returning i64 ns,
output_bytes u32 (VARIED: the column `lengths`, present with flag LENGTHS for all n).
Then ids u64, one after the other, and with flag QUEUED `queued` u32 us of each query,
which may differ within a batch. A buffer for each group: its outputs end to end; for a status
without output, one UTF-8 reason that the group shares, output_bytes long.

CANCEL: `epoch` u64, `n` u32. Column: ids u64.

PULL: `epoch` u64, `n_rows` u32, `row_bytes` u16, (2 pad). A row: slot u16, credit u16
(batches it can take), held u16, running u16, last_batch u64 (the last directive it had
received: the router deducts what it sent after that), running_batch u64 (0: no batch of
this epoch runs), running_for_ns i64 (how long it has been running; the router computes
when it ends. Below 0 with no batch of this epoch running: one of another router will run so
long), memory_bytes u64, utilisation f32, temperature_c f32 (NaN if unknown).

DIRECTIVE: `epoch` u64, `batch_id` u64 (ascending), slot u16, subnet u16, `n` u32,
`n_segments` u32, `row_bytes` u16, (2 pad). A segment is a stretch of one QUERIES
message: count u32, payload_bytes u32, packed u32 (1: one frame; 0: a frame a query),
(4 pad), elapsed_ns i64. Columns: ids u64; slacks i64 as the client sent them: slack -
elapsed is left; lengths u32 (LENGTHS, where any segment is VARIED).

DONE: `epoch` u64, `n_rows` u32, `row_bytes` u16, (2 pad). A row: batch_id u64, slot u16,
credit u16, held u16, n u32, waited_ns i64 (received to started), executing_ns i64,
last_batch u64, running_batch u64, running_for_ns i64 (as in PULL), output_bytes u32 (VARIED
as above), flags u16 (1: mixed statuses). Columns: for each row with mixed statuses, status
u8 of n; for each VARIED row, lengths u32 of n. A buffer a row: outputs, or UTF-8 reasons, end to end.

SHARE: about payloads in memory that a client shares with processes of its host; what the fields mean and how
a peer checks them is in `superserve.shared`. Only peers that ask for it get one: a router whose WELCOME to
clients has `shared` true takes offers, and a worker whose HELLO has it gets them. An offer has `memory` u64,
`pid`, `fd`, `n_bytes` and `proof`; the client numbers its memories, and the router numbers them again for
workers. The answer has `memory` and `seen`, "" if the peer cannot read it. `gone`, a list of numbers, tells a
worker to close memories. Only once it has seen a memory does a peer get messages that refer to it. These have
no frames for such payloads but the extension column SHARED (tag 1): for each segment of DIRECTIVE with
such payloads, and once in QUERIES, segment u32 (0 in QUERIES), (4 pad), memory u64, and for each of its
queries offset u64 and stamp u64 of its slot. `packed` of such a segment is 0.

PING: `stamp_ns` i64. PONG: `stamp_ns` i64 of the PING, `own_ns` i64; then, from a router with others to its
workers, `price` f64: what GPU time is worth there (`router.core.price`); NaN says that it has none.

The buffers of QUERIES, RESULTS, DIRECTIVE and DONE are separate frames. If together they
are small (GATHER_BYTES), they follow the columns in frame 0 instead, end to end, with
flag GATHERED: ZeroMQ copies small frames anyway, and a frame costs as much as kilobytes.

RUN_*: the fields of the dataclasses in `runs` as JSON, and `columns`, the names of the columns that follow,
a frame each, all of the same length; RUN_COLUMNS has their types. PING and PONG measure round trips.

Flags: MIN_ACCURACY 1, PRIORITY 2, LENGTHS 4, FRAMES 8, RESUBMITTED 16, GATHERED 32, QUEUED 64, EXTENDED 128.
"""

from superserve.build import build
from superserve.wire.decode import decode, kind_of
from superserve.wire.encode import (
    encode,
    encode_cancel,
    encode_control,
    encode_directive,
    encode_done,
    encode_outputs,
    encode_ping,
    encode_pong,
    encode_pull,
    encode_queries,
    encode_results,
)
from superserve.wire.layout import (
    GATHER_BYTES,
    HAS_OUTPUT,
    HIGHEST,
    LOWEST,
    MAX_FRAMES,
    MAX_JSON_BYTES,
    MAX_QUERIES,
    MAX_SLACK_NS,
    OURS,
    PLACE,
    RUN_KINDS,
    STATUSES,
    TRACED,
    VARIED,
    Buffer,
    Kind,
    Status,
)
from superserve.wire.messages import (
    Cancel,
    Control,
    Directive,
    Done,
    DoneRow,
    Group,
    Message,
    Ping,
    Pong,
    Pull,
    PullRow,
    Queries,
    Results,
    Segment,
    SharedPayloads,
    lengths_of,
    pack_queued_us,
    queued_us_of,
    uint64s,
)
from superserve.wire.runs import (
    RUN_COLUMNS,
    RunFailed,
    RunMessage,
    RunProgress,
    RunReady,
    RunReport,
    RunShare,
    RunStart,
    RunStop,
    decode_run,
    encode_run,
)
from superserve.wire.versions import agreed, refusal, version_refused

build()  # refuses a stale one: every role and every client imports this package
