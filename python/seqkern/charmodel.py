"""A character language model in plain torch: the text, the model, its training. What `seqkern demo` accelerates.

This file imports torch and the standard library only: it knows nothing of the rest of the package.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def read_text(path: Path | None = None) -> str:
    """The text of a file, or the language reference that comes with every Python (about 460 KB of English).

    Raises ValueError where it is missing or too short to learn from.
    """
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as e:
            raise ValueError(f"cannot read the text {path}: {e.strerror}") from e
    else:
        try:
            text = "\n".join(import_module("pydoc_data.topics").topics.values())
        except ModuleNotFoundError as e:
            raise ValueError("this Python comes without pydoc_data.topics; give a text file instead") from e
    if len(text) < 10_000:
        raise ValueError(f"the text has {len(text)} characters, expected at least 10000")
    return text


class Corpus:
    """A text as numbers, its last tenth held out."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        number = {c: i for i, c in enumerate(self.characters)}
        numbers = torch.tensor([number[c] for c in text])
        self.train, self.held_out = numbers.split([len(text) - len(text) // 10, len(text) // 10])

    def batches(self, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random excerpts and the characters that follow, both [length, batch], without end."""
        generator = torch.Generator().manual_seed(seed)
        steps = torch.arange(length)[:, None]
        while True:
            at = steps + torch.randint(len(self.train) - length, (batch,), generator=generator)
            yield self.train[at], self.train[at + 1]


class CharModel(nn.Module):
    """Embedding, recurrent layers, and the scores of the next character."""

    def __init__(self, cell: str, characters: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.recurrent = CELLS[cell](64, hidden, layers)
        self.scores = nn.Linear(hidden, characters)

    def forward(self, numbers: Tensor, state=None):
        """Numbers [T, B] and a state or None -> scores [T, B, characters] and the state after."""
        output, state = self.recurrent(self.embedding(numbers), state)
        return self.scores(output), state


@dataclass
class Training:
    """One model being trained; remembers the loss of each step and the seconds spent up to it."""

    model: CharModel
    batches: Iterator[tuple[Tensor, Tensor]]
    rate: float = 3e-3
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.rate)

    def run(self, steps: int) -> None:
        """Trains for some steps more."""
        for _ in range(steps):
            numbers, following = next(self.batches)
            start = time.perf_counter()
            scores, _ = self.model(numbers)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses.append(loss.item())
            self.seconds.append(time.perf_counter() - start + (self.seconds[-1] if self.seconds else 0.0))


@torch.no_grad()
def held_out_loss(model: CharModel, corpus: Corpus, length: int = 200) -> float:
    """Mean loss in nats per character on the text that was not trained on."""
    count = min((len(corpus.held_out) - 1) // length, 64)
    numbers = corpus.held_out[: count * length].view(count, length).t()
    following = corpus.held_out[1 : count * length + 1].view(count, length).t()
    scores, _ = model(numbers)
    return nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten()).item()


@torch.no_grad()
def generate(model: CharModel, corpus: Corpus, start: str, count: int, seed: int) -> str:
    """The start and ``count`` characters that the model draws after it, at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    known = [corpus.characters.index(c) for c in start if c in corpus.characters] or [0]
    numbers, state, found = torch.tensor(known)[:, None], None, list(known)
    for _ in range(count):
        scores, state = model(numbers, state)
        numbers = torch.multinomial((scores[-1] / 0.7).softmax(-1), 1, generator=generator)
        found.append(int(numbers))
    return "".join(corpus.characters[i] for i in found)
