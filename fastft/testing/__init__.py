"""What tests, benchmarks and ``fastft bench`` share: each op's cases (specs), the error budget, the only timer."""

from fastft.testing.spec import OpSpec, Sample, TensorMaker, Timed, all_specs

__all__ = ["OpSpec", "Sample", "TensorMaker", "Timed", "all_specs"]
