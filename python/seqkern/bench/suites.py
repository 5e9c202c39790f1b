"""The suites: their rows, how long each is timed, what their pages are called."""

from dataclasses import dataclass

from seqkern.bench import attention, attention_gpu, recurrent, recurrent_gpu, transformer
from seqkern.bench.rows import OTHER, Row

MORE = (OTHER,)  # groups that only `--rows all` runs


@dataclass(frozen=True)
class Suite:
    rows: tuple[Row, ...]
    sizes: str  #: what the numbers in a row's name are
    rounds: int = 11
    seconds: float = 4.0  #: of timing, for each row and mode
    device: str = "cpu"  #: where it runs unless another is asked for
    again: float = 0.0  #: of timing for what missed its target, once all are through, if above 0

    def wanted(self, everything: bool, only: str) -> list[Row]:
        rows = (row for row in self.rows if everything or row.group not in MORE)
        return [row for row in rows if only.lower() in row.name.lower()]


SUITES: dict[str, Suite] = {
    "rnn": Suite(recurrent.rows(), "B,T,I,H"),
    "attention": Suite(attention.rows(), "B,H,L,D", seconds=3.0),
    "transformer": Suite(transformer.rows(), "B,L"),
    "sdpa-sweep": Suite(attention.sweep(), "B,H,L,S,D", rounds=7, seconds=0.25, again=1.5),
    "rnn-cuda": Suite(recurrent_gpu.rows(), "B,T,I,H", rounds=7, seconds=0.35, device="cuda"),
    "attention-cuda": Suite(attention_gpu.rows(), "B,H,L,D", rounds=7, seconds=0.3, device="cuda"),
}
