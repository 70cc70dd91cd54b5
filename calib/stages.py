"""How long the stages of a job take."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stages:
    """Seconds by stage. Between those of a large model, memory is given back at once: graphs are
    cyclic, and its weights hang on each copy."""

    seconds: dict[str, float] = field(default_factory=dict)
    large: bool = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.large:
            gc.collect()
        self.seconds[name] = time.perf_counter() - start
