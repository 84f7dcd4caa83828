"""Bucket bounds of the histograms. They are vLLM's, so that its dashboards' quantiles mean the same here."""

REQUEST_LATENCY_S: tuple[float, ...] = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FIRST_TOKEN_S: tuple[float, ...] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_S: tuple[float, ...] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
ITERATION_TOKENS: tuple[float, ...] = tuple(
    map(float, (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))
)
REQUEST_N: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
NIXL_READ_S: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
NIXL_POST_S: tuple[float, ...] = (0.001, *NIXL_READ_S)
NIXL_BYTES: tuple[float, ...] = tuple(float(2**exponent) for exponent in range(11, 35, 2))
NIXL_DESCRIPTORS: tuple[float, ...] = tuple(
    map(float, (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000))
)
HOST_COPY_BYTES: tuple[float, ...] = (1e6, 5e6, 1e7, 2e7, 4e7, 6e7, 8e7, 1e8, 1.5e8, 2e8)


def request_tokens(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to and with `max_model_len`.

    Raises:
        ValueError: it is below 1.
    """
    if max_model_len < 1:
        raise ValueError(f"max_model_len must be at least 1, got {max_model_len}")
    decades = range(len(str(max_model_len)))
    bounds = (mantissa * 10**decade for decade in decades for mantissa in (1, 2, 5))
    return tuple(float(bound) for bound in bounds if bound <= max_model_len)
