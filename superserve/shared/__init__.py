"""Payloads in memory that a client shares with the router and the workers of its host.

    slots      which part of the memory holds which payload; no I/O
    owned      a client's memory: made, written and closed by its connection
    foreign    another process's memory: checked, opened and read by a router or a worker
    offers     the bodies of SHARE, by which a peer learns of a memory and proves that it sees it
    placing    a connection's use of its memory: what goes there, and when a slot is free again

Imports `superserve.wire`, `superserve.fields` and `superserve.errors`. Data: payload -> slot; QUERIES and
DIRECTIVE carry (memory, offset, stamp) in the column SHARED; the worker copies the bytes from the slot.

Why memory, not a connection from each client to each worker
------------------------------------------------------------
Costs of a query with a payload of 150,528 bytes on one host, CPU us of all processes with 200 queries
outstanding (`loadgen.bench.rows.payloads`, on an EPYC with Linux 6.18):

    through the router in messages     two trips over TCP                                        400 measured
    straight to the worker             one trip over TCP, 210 (half the bare echo's 420 to
                                       475), and the header through the router, 90               300 computed
    through memory                     a copy by the client, 10, another by the worker, 30,
                                       and the header through the router, 90                     130 measured

Straight to the worker has other costs too. A worker is known only once the router has decided, just in time,
so the payload starts then: one more trip, 0.3 to 1 ms, for which the GPU waits, or each client sends each
payload early to a worker that may not get the query. N clients and M workers need N x M connections, each
with a key, and a lost worker needs the payload again from the client. It wins where the router's network is
the bottleneck, which a host with 25 Gbit/s reaches at 20,000 images a second.

Safe with a hostile peer
------------------------
The memory is a memfd of the client, without a name: once the client and its readers have closed it, it is
gone, however they ended. Readers open `/proc/PID/fd/FD` of the client, which the kernel allows to processes
of the same user on the same host. They look at its name and kind before they open it, since opening a device
or a file of a file system that hangs is not harmless, and go on only with a memfd of this name, of their own
user, of the stated size, that is sealed against shrinking. They never map it: where a mapping would end the
process by a signal, a read fails.

An offer states the digest of a random nonce in the memory. A reader that finds the same nonce sees the
same memory, so another host, another container, and an offer that guesses numbers are told apart. A peer
without a key cannot offer, since the router reads only messages of peers that it admits. A descriptor
counts only within the memory that its own connection offered.

A slot may be written again once its query has its terminal answer. A worker that lost the race for the query
may read it later. So each slot begins with a stamp, written before anything else of the next payload: a
worker copies the payload and then reads the stamp. If that is not the stamp of the descriptor, the copy may
be torn, and the query is refused: the router has ended it already.

Wherever any of this fails (the option is off, other host, other container, other user, memory full), payloads
travel as frames.
"""
