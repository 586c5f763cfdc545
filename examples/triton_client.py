"""Query the gateway with Triton's own client: `python triton_client.py HOST:PORT [MODEL]`.

Needs `pip install 'tritonclient[http]' numpy`. The same with `tritonclient.grpc` and the gRPC port.
"""

import sys

import numpy as np
import tritonclient.http as triton


def main(url: str, model: str = "digits") -> None:
    """Send one batch of two inputs, with 500 ms to answer."""
    with triton.InferenceServerClient(url) as client:
        takes = client.get_model_metadata(model)["inputs"][0]
        batch = np.zeros((2, *takes["shape"][1:]), np.float32)
        tensor = triton.InferInput("input", batch.shape, takes["datatype"])
        tensor.set_data_from_numpy(batch)
        result = client.infer(model, [tensor], timeout=500_000, parameters={"min_accuracy": 90})
        served = result.get_response()["parameters"]
        print(f"classes {result.as_numpy('output').argmax(axis=1)}, by {served['subnet']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
