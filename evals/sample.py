"""Continues a text with a trained model.

python evals/sample.py mine --prompt "def forward(self, x):"       # of ./run.sh nano --export mine
python evals/sample.py checkpoints/20261121-120000-small-ab12cd --top-k 50 --tokens 500
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from shared import Text, at_least, load_model, parser_of, runtime_of
from train_gpt import GPT, ModelConfig, Settings, main, make_row, softcapped, wide


class Decoder:
    """Goes on with one document: takes its next tokens in, and gives the logits of what follows each.

    The model's own layers run over the new tokens, and once more over the few before them that these read otherwise
    than by attention. Attention and its composition alone are others, which have the keys and values of earlier calls:
    no more than the windows, so that a token costs the same however long the text has become. Of the layout this knows
    only `look_back`.
    """

    def __init__(self, model: GPT, settings: Settings):
        self.settings, self.length = settings, 0  # tokens so far
        self.look_back, self.recent = look_back(model.config), []  # the last tokens, as many as are read again
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, by the number of the call in a pass
        self._model = copy.copy(model)  # with the same weights
        self._model.attention, self._model.composed_attention = self._attention, self._composed_attention

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> Tensor:
        """Logits (T, vocabulary) after each of the next T tokens, after the soft-cap, at least float32."""
        model, again, both = self._model, len(self.recent), self.recent + tokens
        row = make_row(np.array([*both, 0]), np.array([0]), len(both), model.config).to(model.runtime)
        self._again, self._length, self._attentions = again, len(both), 0
        x = model.stream(row, self.settings, begin=self.length - again)
        self.length += len(tokens)
        self.recent = both[max(len(both) - self.look_back, 0) :]
        return softcapped(x[again:] @ model.head)[:, : model.config.vocab_size]

    def _attention(self, q, k, v, cu_seqlens, max_seqlen: int, scale: float, window: int) -> Tensor:
        """As `attention` of train_gpt.py, of the row's queries to the kept keys and those of new tokens."""
        q, k, v, mask = self._seen(q, k, v, window)
        y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)
        return y[0].transpose(0, 1)

    def _composed_attention(self, q, k, v, mix, cu_seqlens, scale: float, window: int, fused: bool) -> Tensor:
        """As `composed_attention` of train_gpt.py, likewise."""
        q, k, v, mask = self._seen(q, k, v, window)
        scores = (q @ k.mT * scale).to(wide(q.dtype)).masked_fill(~mask, -math.inf)
        composed = (scores.softmax(-1) * mix.T[..., None]).sum(0).to(v.dtype)
        return (composed @ v).transpose(0, 1)

    def _seen(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, and the keys and values of earlier calls and of new tokens, heads first; which of them each sees.

        The keys that tokens had before stay: they were made with all that these tokens read.
        """
        positions = len(q) // self._length  # of a token: 2 where heads are paired
        k, v = (x[positions * self._again :] for x in (k, v))
        if self._attentions in self.kept:
            k, v = (torch.cat(pair) for pair in zip(self.kept[self._attentions], (k, v), strict=True))
        most = window + positions * self.look_back  # what the first query of the next row sees
        self.kept[self._attentions] = tuple(x[max(len(x) - most, 0) :] for x in (k, v))
        self._attentions += 1
        back = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
        return *(x.transpose(0, 1) for x in (q, k, v)), (back >= 0) & (back <= window)


def look_back(config: ModelConfig) -> int:
    """How many tokens before it a token reads otherwise than by attention.

    The embedding reads some (smear, n-grams); half a key comes from the token before, with what that one reads.
    """
    return max(int(config.smear), *(n - 1 for n in config.ngrams), 0) + int(config.key_offset)


def generate(
    decode: Callable[[list[int]], Tensor],  # a Decoder
    prompt: list[int],
    num_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    piece: int = 256,
) -> Iterator[int]:
    """Yield tokens drawn after a prompt that begins with BOS, until BOS ends the document.

    A long prompt is read in pieces.
    """
    generator, pending = torch.Generator().manual_seed(seed), prompt
    for _ in range(num_tokens):
        for begin in range(0, len(pending), piece):
            logits = decode(pending[begin : begin + piece])
        last = logits[-1].double().cpu()
        if top_k is not None:
            last[last < last.topk(min(top_k, len(last))).values[-1]] = -math.inf
        token = int(last.argmax())
        if temperature > 0:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
        if token == prompt[0]:
            return
        yield token
        pending = [token]


def sample(argv: list[str]) -> None:
    """Print a text as it is drawn, and then its speed. Raises SpeedrunError for a model that cannot be read."""
    parser = parser_of(__doc__)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=at_least(0), default=200, help="at most so many (default: %(default)s)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=at_least(1), help="draw from the so many likeliest tokens only")
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args(argv)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each length of the text
    trained = load_model(options.path, runtime_of(options))
    text, decoder = Text(trained.track.model.vocab_size), Decoder(trained.model, trained.settings)
    prompt = [trained.track.data.bos, *text.encode(options.prompt)]
    began = time.perf_counter()
    print(options.prompt, end="", flush=True)
    drawn = generate(decoder, prompt, options.tokens, options.seed, options.temperature, options.top_k)
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in drawn:
            count += 1
            yield token

    for part in text.stream(counted()):
        print(part, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(sample)
