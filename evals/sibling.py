"""Trains a small sibling of a track: its width and depth multiplied, its recipe kept.

    python evals/sibling.py nano --width 0.5 --seed 1
    torchrun --nproc-per-node 2 evals/sibling.py small --width 1/3 --data-dir data/rehearsal

All other words are those of train_gpt.py; numbers given there override the sibling's. The log names all numbers.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from fractions import Fraction

import shared  # noqa: F401 - puts train_gpt.py on the path
from train_gpt import ModelConfig, SpeedrunError, Track, launcher_ranks, main, run


def factor(word: str) -> Fraction:
    """For argparse: 0.5 or 1/2."""
    try:
        found = Fraction(word).limit_denominator(10**6)
        if not 0 < found <= 100:
            raise ValueError
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"found {word}, expected a number from 0 to 100 such as 0.5 or 1/3") from error
    return found


def own_parser(doc: str) -> argparse.ArgumentParser:
    """Of a command that takes --width and --depth, and leaves all other words but its own to train_gpt.py."""
    kind, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s [TRACK] [options]"
    parser = argparse.ArgumentParser(None, usage, doc, formatter_class=kind, add_help=False, allow_abbrev=False)
    parser.add_argument("--width", type=factor, default=Fraction(1), help="multiplies the width of the model")
    parser.add_argument("--depth", type=factor, default=Fraction(1), help="multiplies the number of its layers")
    return parser


def parse_own(argv: list[str], parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the words that are left for train_gpt.py, whose help comes after the own one."""
    if {"-h", "--help"} & set(argv) and launcher_ranks()[0] == 0:
        parser.print_help()
    return parser.parse_known_args(argv)


def scaled(track: Track, width: Fraction, depth: Fraction) -> Track:
    """The track with the width and depth of its model multiplied, for experiments.

    Width: fewer heads, or narrower ones where that leaves too few to be grouped. Matrices need no other learning
    rate, because NorMuon's update has a spectral norm that does not depend on their size; nor do embeddings, which are
    normed or added entry by entry. The logits are sums over the width of entries that Adam moves by the learning rate:
    that of the head falls as 1/width (its decay stays). The scores of attention are sums over the head's dims of normed
    queries and keys: their scale grows as those shrink. Depth: layers with a role keep their place in proportion.
    Learning rates stay. Raises SpeedrunError where there is no such model.
    """
    m, s, rules = track.model, track.schedule, track.optimizer.rules
    heads, head_dim = heads_of(m, width)
    model = replace(m.stretched(layers_of(m, depth)), num_heads=heads, head_dim=head_dim)
    actual = model.width / m.width
    slower = {
        name: replace(rule, lr_mul=tuple(lr / actual for lr in rule.lr_mul), wd_mul=rule.wd_mul * actual**2)
        for name, rule in (("head", rules.head), ("embed", rules.embed))
    }
    return replace(
        track,
        model=model,
        schedule=replace(s, attn_scale=s.attn_scale * m.head_dim / model.head_dim),
        optimizer=replace(track.optimizer, rules=replace(rules, **slower)),
    )


def heads_of(model: ModelConfig, width: Fraction) -> tuple[int, int]:
    """Heads and dims of each of the model made so much wider. Raises SpeedrunError, with widths that there are."""
    group = math.lcm(model.qk_heads, 2)  # heads share matrices, may be paired, and have gates by halves
    if found := possible_heads(model, width, group):
        return found
    ends = 2 * int(width + 1)
    candidates = {Fraction(heads, model.num_heads) for heads in range(group, model.num_heads * ends + 1, group)}
    candidates |= {Fraction(dims, model.head_dim) for dims in range(4, model.head_dim * ends + 1, 4)}
    possible = {w: found for w in candidates if (found := possible_heads(model, w, group))}
    near = sorted(sorted(possible, key=lambda w: abs(w - width))[:4])
    words = (f"{w} ({possible[w][0]} heads of {possible[w][1]})" for w in near)
    raise SpeedrunError(
        f"--width {float(width):g}: not possible with {model.num_heads} heads (a multiple of {group}) of "
        f"{model.head_dim} dims (a multiple of 4). Possible and near are {', '.join(words)}."
    )


def possible_heads(model: ModelConfig, width: Fraction, group: int) -> tuple[int, int] | None:
    """Fewer or more heads where whole groups are left, else narrower or wider ones; None where neither is."""
    heads, dims = model.num_heads * width, model.head_dim * width
    if heads.denominator == 1 and heads % group == 0:
        found = int(heads), model.head_dim
    elif dims.denominator == 1 and dims % 4 == 0:
        found = model.num_heads, int(dims)
    else:
        return None
    return found if found[0] * found[1] >= model.gate_dim else None  # which the gates read


def layers_of(model: ModelConfig, depth: Fraction) -> int:
    """Layers of the model made so much deeper. Raises SpeedrunError, with depths that there are."""
    L = round(model.num_layers * depth)
    if L < 1:
        words = ", ".join(f"{Fraction(n, model.num_layers)} ({n})" for n in range(1, min(model.num_layers, 4) + 1))
        raise SpeedrunError(
            f"--depth {float(depth):g}: no layer is left of {model.num_layers}. Possible and near are {words}."
        )
    return L


def sibling(argv: list[str]) -> None:
    """Train it. Raises SpeedrunError as a run of train_gpt.py does."""
    options, rest = parse_own(argv, own_parser(__doc__))
    run(rest, change=lambda track: scaled(track, options.width, options.depth))


if __name__ == "__main__":
    main(sibling)
