"""A first look, cell by cell: open it in an editor that knows `# %%`, or run it as a script.

    cluster up
    python examples/notebook.py
    cluster down

It takes the cluster of this machine, or the router at an ENDPOINT such as tcp://10.0.0.1:5555.
"""

# %% Connect. The client has a thread of its own, so cells may take their time.
import sys
from collections import defaultdict

import numpy as np

import superserve
from gpu_worker.models.digits import held_out  # 4,096 images (1, 20, 20) and their labels
from superserve.roles.local import running

# In a notebook sys.argv is the kernel's own: only an endpoint is taken from it.
given = [word for word in sys.argv[1:] if word.startswith(("tcp://", "ipc://"))]
client = superserve.Client(given[0] if given else running().client_endpoint)
client.connect()
images = held_out()

# %% One query: an input, and how long an answer may take.
reply = client.infer(images.pixels[0], slo_ms=5_000)
print(f"This is a {reply.output.argmax()}; it was drawn as a {images.labels[0]}.")
print(f"{reply.subnet} ({reply.accuracy:.1f} % accurate) took {reply.latency_ms:.1f} ms, of which")
print(f"  {reply.timeline.queued_ms:.1f} ms in the queue, {reply.timeline.executing_ms:.1f} ms in the model")

# %% A hundred at once. They share batches; the router picks the subnet for each batch.
N = 100
futures = [client.submit(image, slo_ms=5_000) for image in images.pixels[:N]]
replies = [future.result() for future in futures]
n_right = sum(r.output.argmax() == label for r, label in zip(replies, images.labels[:N], strict=True))
print(f"{n_right} of {N} right")

# %% Shorter deadlines: first the subnets get smaller, then queries are refused, and say why.
print(f"{'slo':>7}{'in time':>9}{'late':>6}{'refused':>9}{'accuracy':>10}  one of the reasons")
for slo_ms in (200, 50, 20, 10, 5, 2, 1):
    answered, reasons = [], []
    for future in [client.submit(image, slo_ms=slo_ms) for image in images.pixels[:N]]:
        try:
            answered.append(future.result())
        except superserve.QueryError as error:
            reasons.append(f"{type(error).__name__}: {error}")
    replies += answered
    n_late = sum(one.is_late for one in answered)
    accuracy = f"{np.mean([one.accuracy for one in answered]):.2f} %" if answered else "-"
    print(f"{slo_ms:>4} ms{len(answered) - n_late:>9}{n_late:>6}{len(reasons):>9}{accuracy:>10}", end="  ")
    print(reasons[0] if reasons else "-")

# %% Who served all these, and how long it took: a row a subnet, a bar as long as its share.
by_subnet = defaultdict(list)
for one in replies:
    by_subnet[one.subnet].append(one.latency_ms)
print(f"{'subnet':<24}{'queries':>8}{'p50 ms':>8}{'max ms':>8}")
for name, latencies in sorted(by_subnet.items()):
    print(f"{name:<24}{len(latencies):>8}{np.median(latencies):>8.1f}{max(latencies):>8.1f}", end="  ")
    print("#" * round(40 * len(latencies) / len(replies)))

# %% Ask for accuracy instead: no subnet below the floor may serve, however short the time.
reply = client.infer(images.pixels[0], slo_ms=5_000, min_accuracy=95)
print(f"{reply.subnet} has {reply.accuracy:.1f} %")

# %% Done.
client.close()
