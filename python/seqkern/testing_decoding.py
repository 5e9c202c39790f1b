"""Small stacks, words and prompts for the tests of decoding, and torch's own decoding of them as the oracle."""

import torch
from torch import nn

import seqkern
from seqkern.nn import KVCache

E, H, FF, V, S = 16, 2, 24, 19, 6
PADDING = torch.arange(S) >= torch.tensor([6, 2, 4])[:, None]


class Words(nn.Module):
    """Token and position embeddings and the scores, all from random tables that make answers vary."""

    def __init__(self, dtype):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, E, dtype=dtype), nn.Embedding(64, E, dtype=dtype)
        self.head = nn.Linear(E, V, dtype=dtype)
        self.requires_grad_(False)

    def embed(self, tokens, positions):
        return self.tokens(tokens) + self.places(positions)


def made(kind, dtype=torch.float32, layers=2, norm=True, **options):
    """torch's stack in eval mode, ours with its weights, and the words around them."""
    layer = getattr(nn, f"Transformer{kind}Layer")(E, H, FF, dtype=dtype, **options)
    theirs = getattr(nn, f"Transformer{kind}")(
        layer, layers, nn.LayerNorm(E, dtype=dtype) if norm else None
    ).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = seqkern.accelerate(getattr(nn, f"Transformer{kind}")(layer, layers, theirs.norm)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, Words(dtype)


def arranged(x, stack):
    """[B, n, E] in the layout of the stack."""
    return x if stack.layers[0].self_attn.batch_first else x.transpose(0, 1)


@torch.no_grad()
def uncached(theirs, words, prompt, length, memory, padding, count, eos=()):
    """Greedy tokens of one sequence, each from a whole pass of torch's stack."""
    tokens = prompt[:length].tolist()
    for _ in range(count):
        at = torch.arange(len(tokens))
        x = arranged(words.embed(torch.tensor([tokens]), at[None]), theirs)
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens), dtype=x.dtype)
        if memory is None:
            found = theirs(x, mask)
        else:
            found = theirs(x, arranged(memory[None], theirs), mask, memory_key_padding_mask=padding)
        tokens.append(int(words.head(arranged(found, theirs)[:, -1]).argmax()))
        if tokens[-1] in eos:
            break
    return tokens


def prompts(lengths):
    tokens = torch.randint(V, (len(lengths), max(lengths)))
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], 0)


def small(**options):
    _, ours, _ = made("Encoder", batch_first=True)
    return ours, KVCache(**options)
