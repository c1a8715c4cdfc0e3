"""Model, optimizer and schedule once more, in naive float64 PyTorch: the oracle that tests hold train_gpt.py against.

Written for reading, not for speed: whole (T, T) attention masks, loops over layers and heads, the formulas one
after the other. It shares no code with train_gpt.py. make_golden.py makes the golden numbers of it. Sources: Muon
(Jordan et al. 2024), Polar Express arXiv:2505.16932, NorMuon arXiv:2510.05491, cautious decay arXiv:2510.12402, value
residual arXiv:2410.17897, MUDD arXiv:2502.12170, XSA arXiv:2603.09078, YaRN arXiv:2309.00071, ReLU² arXiv:2109.08668.

Shapes: T tokens of one packed row, d model width, H heads, D head width (d = H*D), V padded vocabulary, L layers,
A attention layers, E layers with a value-embedding table.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT64_EPS = torch.finfo(torch.float64).eps

# ======================================================================================================================
# Layouts
# ======================================================================================================================


@dataclass(frozen=True)
class Layout:
    """Which layer has what. Layers count from 0; None: the layout does without."""

    num_layers: int
    num_heads: int
    head_dim: int
    no_attention: tuple[int, ...]  # layers with an MLP only
    paired: tuple[int, ...]  # layers whose heads h and h + H/2 share one sequence
    long: tuple[int, ...]  # layers with the long window and the partial key offset
    value_tables: tuple[int, ...]  # layers with a value-embedding table, each with its own
    gated: tuple[int, ...] = ()  # layers with a gate for each head
    xsa: tuple[int, ...] = ()  # layers in which each head's output loses its part along the token's own value
    dc: tuple[int, ...] = ()  # layers in which all heads attend once more, each with the same mix of all heads' weights
    dc_window: int = 112  # positions of DC's second softmax, the query's own included
    gate_networks: bool = True  # gates and coefficients are computed from the stream; else they are learned numbers
    post_layer: int | None = None  # G_post reads its input, serves it and all after; G_pre, which reads x0, the others
    skips: tuple[tuple[int, int], ...] = ()  # (layer whose output, layer into whose input)
    late_input: int | None = None  # the attention of all layers after this one reads this one's output
    mix_in: tuple[str, ...] = ()  # streams that M_in, where there are any, adds to the last layer's values and input
    mix_out: tuple[str, ...] = ()  # streams that M_out adds to the last layer's output
    smear: bool = True
    key_offset: bool = True
    ngrams: tuple[int, ...] = (2,)  # n: the last n tokens have an embedding; summed over these
    normed_ngrams: bool = False  # RMSNorm of that sum
    qk_heads: int = 2  # adjacent heads in one matrix of Wq or Wk

    @property
    def mixing(self) -> int | None:
        """The layer of M_in."""
        return self.num_layers - 1 if self.mix_in else None


SMALL = Layout(
    num_layers=11,
    num_heads=6,
    head_dim=128,
    no_attention=(6,),
    paired=(0, 2, 5, 9),
    long=(3, 10),
    value_tables=(1, 2, 8, 9, 10),
    gated=(3, 10),
    xsa=(1, 3, 4, 7),
    dc=(10,),
    post_layer=4,
    skips=((3, 6),),
    late_input=7,
    mix_in=("first", "out7", "last"),
    mix_out=("first", "out7", "last", "value1", "out3"),
)
MEDIUM = Layout(
    num_layers=16,
    num_heads=8,
    head_dim=128,
    no_attention=(9,),
    paired=(0, 3, 8, 14),
    long=(4, 10, 15),
    value_tables=(2, 3, 12, 14, 15),
    gated=(4, 10, 15),
    xsa=(2, 4, 6, 10),
    dc=(15,),
    post_layer=6,
    skips=((4, 9),),
    late_input=10,
    mix_in=("first", "out10", "last"),
    mix_out=("first", "out10", "last", "value2", "out4"),
)
XL = Layout(
    num_layers=52,
    num_heads=12,
    head_dim=128,
    no_attention=(31,),
    paired=(0, 10, 26, 46),
    long=(15, 33, 51),
    value_tables=(5, 10, 41, 46, 51),
    gated=(15, 33, 51),
    xsa=(5, 15, 20, 36),
    dc=(51,),
    post_layer=20,
    skips=((15, 31),),
    late_input=36,
    mix_in=("first", "out36", "last"),
    mix_out=("first", "out36", "last", "value5", "out15"),
)
NANO = Layout(
    num_layers=1,
    num_heads=2,
    head_dim=64,
    no_attention=(),
    paired=(),
    long=(0,),
    value_tables=(0,),
    gate_networks=False,
    smear=False,
    ngrams=(1, 2, 3, 4, 5, 6),
    normed_ngrams=True,
)


Outputs = list[tuple[tuple[str, int], int]]
"""What a network computes, in its order: ((role or the stream that is weighed, layer), width)."""


def gate_outputs(layout: Layout, first: int, end: int) -> Outputs:
    """Of the gate network that serves the layers first ... end - 1."""
    layers, heads = range(first, end), layout.num_heads
    outputs: Outputs = [(("xsa", i), heads) for i in layers if i in layout.xsa]
    outputs += [(("attention", i), heads) for i in layers if i in layout.gated]
    for i in layers:
        usual = i not in layout.no_attention and i != layout.mixing
        outputs += [(("x0", i), 1)] if usual else []
        outputs += [(("ngram", i), 1)] if layout.ngrams and (usual or i == 0) else []
    outputs += [((f"out{source}", target), 1) for source, target in layout.skips if target in layers]
    for i in layers:
        outputs += [(("dc1", i), heads), (("dc2", i), heads)] if i in layout.dc else []
    return outputs


def mix_outputs(layout: Layout) -> Outputs:
    """Of M_in: m0, m1, ..."""
    layer = layout.num_layers - 1
    outputs: Outputs = [((f"values from {stream}", layer), 1) for stream in layout.mix_in]
    outputs += [((f"input from {stream}", layer), 1) for stream in layout.mix_in]
    outputs += [(("value_gate", layer), 2)] if layer in layout.value_tables else []
    roles = ("resid_attn", "post_attn", "first", *(("ngram",) if layout.ngrams else ()), "resid_mlp", "post_mlp")
    return outputs + [((role, layer), 1) for role in roles]


# ======================================================================================================================
# Tables over tokens
# ======================================================================================================================


def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) index of the document each token lies in. Entries of cu_seqlens equal to T are padding."""
    ids = torch.zeros(num_tokens, dtype=torch.long)
    for start in cu_seqlens.tolist():
        ids[start:] += 1
    return ids


def ngram_key(tokens: list[int], position: int, n: int, documents: list[int]) -> int:
    """Key of the n tokens that end at a position; before the document are none."""
    key = tokens[position]
    for back in range(1, n):
        inside = position >= back and documents[position - back] == documents[position]
        key = (48271 * key + (tokens[position - back] + 1 if inside else 0)) % (2**31 - 1)
    return key


def ngram_rows(tokens: Tensor, documents: Tensor, n: int, rows: int, sign_rows: int) -> tuple[Tensor, Tensor]:
    """(T,), (T,): at each position, the rows of the tables of embeddings and of signs (0: none) that its n-gram has."""
    keys = [ngram_key(tokens.tolist(), t, n, documents.tolist()) for t in range(len(tokens))]
    signs = [key // rows % sign_rows if sign_rows else 0 for key in keys]
    return torch.tensor([key % rows for key in keys]), torch.tensor(signs)


def prefix_table(token_bytes: list[bytes | None]) -> list[int]:
    """Of each token the longest proper prefix that is a token too, or -1. None: no text (BOS, padding), no prefix."""
    token_of = {text: token for token, text in enumerate(token_bytes) if text is not None}
    prefixes = []
    for text in token_bytes:
        found = [token_of[text[:end]] for end in range(1, len(text or b"")) if text[:end] in token_of]
        prefixes.append(found[-1] if found else -1)
    return prefixes


# ======================================================================================================================
# Model
# ======================================================================================================================


def initial_frequencies(head_dim: int) -> Tensor:
    """Rotary frequencies before any YaRN step, (D/4,), in radians per position: (1/1024)^linspace(0, 1)."""
    return (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def yarn(frequencies: Tensor, attn_scale: float, a: int, b: int) -> tuple[Tensor, float]:
    """One YaRN step: the long window grows from a to b tokens. frequencies (D/4,) -> (new ones, new attn_scale)."""
    rotations = a * frequencies / (2 * math.pi)
    s = a / b
    w = ((rotations - 1) / 31).clamp(0, 1)
    return frequencies * (s + w * (1 - s)), attn_scale * (1 + 0.2 * math.log(b / a))


def norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension without a weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, frequencies: Tensor, positions: Tensor) -> Tensor:
    """Half-truncated rotary: pair (2j, 2j+1) of the first D/2 dims turns by -position * frequency j.

    The sign matters: turning the other way gives q·k of another model. x (N, D), positions (N,) -> (N, D)
    """
    result = x.clone()
    for j, frequency in enumerate(frequencies):
        angle = positions * frequency
        even, odd = x[:, 2 * j], x[:, 2 * j + 1]
        result[:, 2 * j] = even * angle.cos() + odd * angle.sin()
        result[:, 2 * j + 1] = odd * angle.cos() - even * angle.sin()
    return result


def attention_weights(q: Tensor, k: Tensor, documents: Tensor, window: int, attn_scale: float) -> Tensor:
    """(N, N) softmax of one head, causal, inside documents, at most `window` positions back. q, k (N, D)."""
    position = torch.arange(len(q))
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance <= window) & (documents[:, None] == documents[None, :])
    return (attn_scale * q @ k.T).masked_fill(~visible, -math.inf).softmax(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, attn_scale: float) -> Tensor:
    """Attention of one head with the weights of `attention_weights`. q, k, v (N, D) -> (N, D)."""
    return attention_weights(q, k, documents, window, attn_scale) @ v


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """(T, D), (T, D) -> (2T, D): `first` at the even, `second` at the odd positions."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


class Row(NamedTuple):
    """What all layers know of the row and the step."""

    documents: Tensor  # (T,)
    windows: tuple[int, int]  # (short, long) in tokens
    frequencies: Tensor  # (D/4,)
    attn_scale: float
    eps: float  # of norm


def attention(
    a: Tensor,  # (T, d) normed input
    added_values: Tensor,  # (T, d)
    gates: dict[tuple[str, int], Tensor],  # outputs of the gate networks so far, each (T, width)
    weights: dict[str, Tensor],
    layout: Layout,
    layer: int,
    row: Row,
) -> Tensor:  # (T, d)
    """Attention of one layer, from its normed input to what goes back to the stream."""
    documents, windows, frequencies, attn_scale, eps = row
    window = windows[1] if layer in layout.long else windows[0]
    num_tokens, heads, dim = len(a), layout.num_heads, layout.head_dim
    attention_layers = [i for i in range(layout.num_layers) if i not in layout.no_attention]
    index = attention_layers.index(layer)
    # Matrices of Wq, each of some adjacent heads, then as many of Wk.
    each = 2 * heads // layout.qk_heads
    w_q, w_k = weights["qk_bank"][each * index : each * (index + 1)].flatten(0, 1).chunk(2)
    w_v, w_o = weights["vo_bank"][2 * index : 2 * index + 2]
    qkv_lambda, out_lambda = weights["sa_lambda"][layer]
    all_values = a @ (qkv_lambda * w_v).T + added_values

    q_heads, k_heads, v_heads = [], [], []
    for head in range(heads):
        rows = slice(head * dim, (head + 1) * dim)
        q = norm(a @ (qkv_lambda * w_q[rows]).T, eps)
        k = norm(a @ (qkv_lambda * w_k[rows]).T, eps)
        if layer in layout.long and layout.key_offset:
            # Partial key offset. Nothing stands before the row's first token, so it keeps its own. The offset goes by
            # position in the row: a document's first token takes from the last token of the document before.
            shifted = torch.cat([k[:1, dim // 2 :], k[:-1, dim // 2 :]])
            k = torch.cat([k[:, : dim // 2], shifted], dim=1)
        q_heads.append(q)
        k_heads.append(k)
        v_heads.append(all_values[:, rows])

    outputs: list[Tensor] = [torch.empty(0)] * heads
    if layer in layout.paired:
        positions = torch.arange(2 * num_tokens)
        doubled = documents.repeat_interleave(2)
        for head in range(heads // 2):
            partner = head + heads // 2
            q = rotate(interleave(q_heads[head], q_heads[partner]), frequencies, positions)
            k = rotate(interleave(k_heads[head], k_heads[partner]), frequencies, positions)
            v = interleave(v_heads[head], v_heads[partner])
            y = masked_attention(q, k, v, doubled, window, attn_scale)
            outputs[head], outputs[partner] = y[0::2], y[1::2]
    else:
        positions = torch.arange(num_tokens)
        q_heads = [rotate(q, frequencies, positions) for q in q_heads]
        k_heads = [rotate(k, frequencies, positions) for k in k_heads]
        for head in range(heads):
            outputs[head] = masked_attention(q_heads[head], k_heads[head], v_heads[head], documents, window, attn_scale)

    if layer in layout.dc:
        w1, w2 = norm(gates["dc1", layer], 1e-6), gates["dc2", layer]
        mix = torch.zeros(num_tokens, num_tokens, dtype=a.dtype)
        for head in range(heads):
            p = attention_weights(q_heads[head], k_heads[head], documents, layout.dc_window - 1, attn_scale)
            mix = mix + w1[:, head, None] * p
        for head in range(heads):
            outputs[head] = outputs[head] + w2[:, head, None] * (mix @ v_heads[head])
    if layer in layout.xsa:
        for head in range(heads):
            y, v, alpha = outputs[head], v_heads[head], gates["xsa", layer][:, head, None]
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-8)
            outputs[head] = y - alpha.tanh() * along * v
    if ("attention", layer) in gates:
        for head in range(heads):
            outputs[head] = gates["attention", layer][:, head, None] * outputs[head]
    return torch.cat(outputs, dim=1) @ (out_lambda * w_o).T


def mlp(h: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """ReLU² MLP. h (T, d), fc and proj (4d, d) -> (T, d)."""
    return torch.relu(h @ fc.T).square() @ proj


def network(weights: dict[str, Tensor], name: str, x: Tensor, factor: Tensor | float) -> Tensor:
    """factor · (W2 gelu(W1 x) + b), gelu exact. x (T, d) -> (T, outputs)"""
    w1, w2, b = (weights[f"{name}_{part}"] for part in ("w1", "w2", "b"))
    z = x @ w1.T
    return factor * ((z * (1 + torch.erf(z / math.sqrt(2))) / 2) @ w2.T + b)


def by_role(values: Tensor, outputs: Outputs) -> dict[tuple[str, int], Tensor]:
    """Values of the outputs (T, sum of their widths), taken apart."""
    parts = values.split([width for _, width in outputs], dim=1)
    return {key: part for (key, _), part in zip(outputs, parts, strict=True)}


def ngram_embedding(
    weights: dict[str, Tensor], layout: Layout, tokens: Tensor, documents: Tensor, eps: float
) -> Tensor:
    """(T, d) sum of the embeddings of the n-grams that end at each position, each with its signs."""
    table, signs = weights["bigram_embed"], weights.get("bigram_sign")
    total = torch.zeros(len(tokens), table.size(1), dtype=table.dtype)
    for n in layout.ngrams:
        rows, sign_rows = ngram_rows(tokens, documents, n, len(table), 0 if signs is None else len(signs))
        total = total + (table[rows] if signs is None else table[rows] * signs[sign_rows])
    return norm(total, eps) if layout.normed_ngrams else total


def forward(
    weights: dict[str, Tensor],
    layout: Layout,
    tokens: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (any,) starts of the documents, padded with T
    windows: tuple[int, int],  # (short, long) in tokens
    frequencies: Tensor,  # (D/4,)
    attn_scale: float,
    norm_eps: float = FLOAT64_EPS,
    bigram_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # (T, V)
    """Logits after the soft-cap, float64. Weights of another dtype are widened, so gradients flow to them all the same.

    weights: embed (V, d), head (d, V), qk_bank (>= 2A*H/h, hD, d) with Wq by h heads, then Wk, per attention layer,
    vo_bank (>= 2A, d, d) with Wv, Wo, mlp_bank (>= 2L, 4d, d) with fc, proj per layer, value_embeds (E, V, d),
    value_gates (tables that M_in does not gate, H, 12), sa_lambda (L, 2), resid_attn, resid_mlp, post_attn, post_mlp
    (L,). Where the layout has them: bigram_embed (rows, d), bigram_sign (sign rows, d), smear_gate (12,), smear_lambda
    (), skip_lambda (), gate_scale () and the four networks pre_, post_, in_ and out_, each w1 (width, d),
    w2 (outputs, width), b (outputs,). Where it has no gate networks, their outputs: gates_b.
    norm_eps: pass the epsilon of the implementation under test where its activations are of another dtype.
    bigram_rows: ((T,), (T,)) rows of the bigrams in the two tables, for those of another hash.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    tokens = tokens.long()
    documents = document_ids(cu_seqlens, len(tokens))
    row = Row(documents, windows, frequencies.double(), attn_scale, norm_eps)
    layers, heads, dim = range(layout.num_layers), layout.num_heads, layout.head_dim

    e = weights["embed"][tokens]
    if layout.smear:
        read = len(weights["smear_gate"])
        smear = weights["smear_lambda"] * torch.sigmoid(e[1:, :read] @ weights["smear_gate"])
        e = torch.cat([e[:1], e[1:] + smear[:, None] * e[:-1]])
    x0 = norm(e, norm_eps)
    streams = {"x0": x0}
    if bigram_rows is not None:
        streams["ngram"] = weights["bigram_embed"][bigram_rows[0]] * weights["bigram_sign"][bigram_rows[1]]
    elif layout.ngrams:
        streams["ngram"] = ngram_embedding(weights, layout, tokens, documents, norm_eps)
    for slot, layer in enumerate(layout.value_tables):
        streams[f"value{layer}"] = weights["value_embeds"][slot][tokens]

    if layout.gate_networks:
        outputs = gate_outputs(layout, 0, layout.num_layers if layout.post_layer is None else layout.post_layer)
        gates = by_role(network(weights, "pre", x0, weights["gate_scale"]), outputs)
    else:
        gates = by_role(weights["gates_b"].expand(len(x0), -1), gate_outputs(layout, 0, layout.num_layers))

    x = x0 + gates["ngram", 0] * streams["ngram"] if layout.ngrams else x0
    streams["first"] = x
    for layer in layers:
        if layer == layout.post_layer:
            outputs = gate_outputs(layout, layer, layout.num_layers)
            gates |= by_role(network(weights, "post", x, weights["gate_scale"]), outputs)
        if layer == layout.num_layers - 1:
            streams["last"] = x
        for source, target in layout.skips:
            if layer == target:
                gate = gates[f"out{source}", layer]
                x = x + torch.sigmoid(weights["skip_lambda"]) * gate * streams[f"out{source}"]
        resid_attn, post_attn, resid_mlp, post_mlp = (
            weights[name][layer] for name in ("resid_attn", "post_attn", "resid_mlp", "post_mlp")
        )

        if layer not in layout.no_attention:
            added_values = torch.zeros_like(x)
            if layer == layout.mixing:
                gates |= by_role(network(weights, "in", streams["last"], 0.1), mix_outputs(layout))
                for stream in layout.mix_in:
                    added_values = added_values + gates[f"values from {stream}", layer] * streams[stream]
                    x = x + gates[f"input from {stream}", layer] * streams[stream]
                resid_attn, post_attn, resid_mlp, post_mlp = (
                    gates[role, layer] for role in ("resid_attn", "post_attn", "resid_mlp", "post_mlp")
                )
            late = layout.late_input is not None and layer > layout.late_input
            a = norm(streams[f"out{layout.late_input}"] if late else x, norm_eps)
            if layer in layout.value_tables:
                ve = streams[f"value{layer}"]
                if layer == layout.mixing:
                    value_gate = gates["value_gate", layer].repeat_interleave(heads // 2, dim=1)
                else:
                    w_ve = weights["value_gates"][[i for i in layout.value_tables if i != layout.mixing].index(layer)]
                    half = w_ve.size(1) // 2
                    value_gate = 2 * torch.sigmoid(torch.cat([a[:, :half], ve[:, :half]], dim=1) @ w_ve.T)
                added_values = added_values + value_gate.repeat_interleave(dim, dim=1) * ve
            y = attention(a, added_values, gates, weights, layout, layer, row)
            x = resid_attn * x + post_attn * y
            x = x + gates["first", layer] * streams["first"] if layer == layout.mixing else x + gates["x0", layer] * x0
            if layout.ngrams and layer > 0:  # that of layer 0 is in `first`
                x = x + gates["ngram", layer] * streams["ngram"]

        fc, proj = weights["mlp_bank"][2 * layer : 2 * layer + 2]
        x = resid_mlp * x + post_mlp * mlp(norm(x, norm_eps), fc, proj)
        streams[f"out{layer}"] = x

    if layout.mix_out:
        n = network(weights, "out", x, 0.1).T[:, :, None]
        for weight, stream in zip(n, layout.mix_out, strict=True):
            x = x + weight * streams[stream]
    x = norm(x, norm_eps)
    return 23 * torch.sigmoid((x @ weights["head"] + 5) / 7.5)


def train_loss(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,) targets[t] is the token after t
    prediction_weights: Tensor | list[float],  # (K,)
    prefix: Tensor | None = None,  # (V,) the prefix token of each token, or -1
    prefix_weight: float = 0.0,
) -> Tensor:  # ()
    """Multi-token prediction and the prefix of the next token, summed over the row:

    sum_t (sum_k w_k CE(logits_t, target_{t+k}), none past the end, + w_p CE(logits_t, prefix(target_t)), where any).
    """
    log_probs = logits.log_softmax(-1)
    loss = logits.new_zeros(())
    for k, weight in enumerate(prediction_weights):
        for t in range(len(targets) - k):
            loss = loss - weight * log_probs[t, targets[t + k]]
    if prefix is not None:
        for t, target in enumerate(targets.tolist()):
            if prefix[target] >= 0:
                loss = loss - prefix_weight * log_probs[t, prefix[target]]
    return loss


def val_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats. logits (T, V), targets (T,) -> ()"""
    log_probs = logits.log_softmax(-1)
    return -log_probs[torch.arange(len(targets)), targets.long()].mean()


# ======================================================================================================================
# Optimizer
# ======================================================================================================================

POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix: five rounds of X <- aX + (bA + cA²)X, A = XXᵀ. (m, n) -> (m, n)."""
    X = G.T if G.size(0) > G.size(1) else G  # XXᵀ on the shorter side
    X = X / (1.02 * X.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X


@dataclass(frozen=True)
class Adam:
    """Adam's numbers for one parameter."""

    betas: tuple[float, float]
    lr_mul: float = 1.0
    wd_mul: float = 0.0
    lr: float = 0.008
    eps: float = 1e-10
    decay: float = 0.005


@dataclass(frozen=True)
class NorMuon:
    """NorMuon's numbers for one bank; lr_muls goes around the matrices, so (1, 2) is fc, proj, fc, proj, ..."""

    lr_muls: tuple[float, ...] = (1.0,)
    wd_mul: float = 1.0
    lr: float = 0.023
    beta2: float = 0.9
    decay: float = 1.2


GATE_NETWORK, MUDD = Adam((0.9, 0.99), lr_mul=0.1, wd_mul=1), Adam((0.9, 0.99), lr_mul=0.25, wd_mul=1)
TABLE: dict[str, Adam | NorMuon] = {
    "qk_bank": NorMuon(),
    "vo_bank": NorMuon(),
    "mlp_bank": NorMuon(lr_muls=(1.0, 2.0)),
    "sa_lambda": Adam((0.9, 0.99), lr_mul=5),
    "smear_lambda": Adam((0.9, 0.99), lr_mul=5),
    "skip_lambda": Adam((0.9, 0.99), lr_mul=5),
    "resid_attn": Adam((0.9, 0.95), lr_mul=5),
    "resid_mlp": Adam((0.9, 0.95), lr_mul=5),
    "post_attn": Adam((0.9, 0.95)),
    "post_mlp": Adam((0.9, 0.95)),
    "smear_gate": Adam((0.9, 0.99), lr_mul=0.01),
    "value_gates": Adam((0.9, 0.99), wd_mul=1),
    "gate_scale": replace(GATE_NETWORK, wd_mul=0),
    "value_embeds": Adam((0.75, 0.95), lr_mul=75, wd_mul=5),
    "bigram_embed": Adam((0.75, 0.95), lr_mul=75, wd_mul=5),
    "head": Adam((0.5, 0.95), wd_mul=150),
    "embed": Adam((0.5, 0.95), wd_mul=150),
    **{f"{name}_{part}": GATE_NETWORK for name in ("pre", "post") for part in ("w1", "w2")},
    **{f"{name}_b": replace(GATE_NETWORK, wd_mul=0) for name in ("pre", "post")},
    **{f"{name}_{part}": MUDD for name in ("in", "out") for part in ("w1", "w2")},
    **{f"{name}_b": replace(MUDD, wd_mul=0) for name in ("in", "out")},
}
"""The rules of the parameters of `small`."""


def adam_step(p: Tensor, g: Tensor, state: dict, rule: Adam, lr_factor: float) -> Tensor:
    """New value of p. state: {} at first, then the `count` of updates so far and the moments `m`, `v` like p."""
    beta1, beta2 = rule.betas
    count = state["count"] = state.get("count", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g.square()
    lr = rule.lr * lr_factor * rule.lr_mul
    # eps is added to the root of v as it stands, before v's bias correction.
    denominator = (v.sqrt() + rule.eps) / (1 - beta2**count) ** 0.5
    u = lr * (m / (1 - beta1**count)) / denominator
    # Strictly >: where the gradient is exactly zero, so is u, and nothing decays.
    return p - u - torch.where(u * p > 0, lr**2 * rule.decay * rule.wd_mul * p, 0)


def normuon_step(
    bank: Tensor,  # (n, rows, columns)
    g: Tensor,  # (n, rows, columns)
    state: dict[str, Tensor],  # {} at first, then `momentum` like bank, `mean_square` (n, rows, 1) or (n, 1, columns)
    rule: NorMuon,
    lr_factor: float,
    momentum: float,
) -> Tensor:  # (n, rows, columns)
    """New value of the bank."""
    count, rows, columns = bank.shape
    averaged = 1 if rows >= columns else 0  # one mean square per row, averaged over its columns; else the other way
    state.setdefault("momentum", torch.zeros_like(bank))
    state.setdefault("mean_square", torch.zeros_like(bank.mean(1 + averaged, keepdim=True)))
    result = torch.zeros_like(bank)
    for i in range(count):
        p = bank[i]
        buffer = momentum * state["momentum"][i] + (1 - momentum) * g[i]
        state["momentum"][i] = buffer
        orthogonal = polar_express((1 - momentum) * g[i] + momentum * buffer)

        # A mean that starts at zero, without bias correction: rescaling to the old norm takes a common factor out.
        mean_square = orthogonal.square().mean(averaged, keepdim=True)
        mean_square = rule.beta2 * state["mean_square"][i] + (1 - rule.beta2) * mean_square
        state["mean_square"][i] = mean_square
        # The floors keep the bank's padding, zero matrices with zero gradients, at zero instead of 0/0.
        update = orthogonal / mean_square.clamp_min(1e-10).sqrt()
        update = update * orthogonal.norm() / update.norm().clamp_min(1e-10)

        lr = rule.lr * lr_factor
        step = lr * rule.lr_muls[i % len(rule.lr_muls)] * max(1, rows / columns) ** 0.5
        # The decay's factor holds lr_mul and the shape's factor once, inside step.
        decay = torch.where(update * p >= 0, step * lr * rule.decay * rule.wd_mul * p, 0)
        result[i] = p - step * update - decay
    return result


class ReferenceOptimizer:
    """The optimizer in one process: `params`, float64, after each step; `table` names the rule of each, as TABLE does.

    Where there is a split_step, params must hold head (d, V) and embed (V, d) with embed = headᵀ at the start.
    """

    def __init__(self, params: dict[str, Tensor], table: dict[str, Adam | NorMuon]) -> None:
        self.params = {name: p.detach().double().clone() for name, p in params.items()}
        self.table = table
        self.state: dict[str, dict] = {name: {} for name in params}
        self.accumulated = {name: torch.zeros_like(p) for name, p in self.params.items()}  # since Adam's last update

    def step(
        self,
        gradients: dict[str, Tensor],
        step: int,
        lr_factor: float,
        momentum: float,
        split_step: int | None,
    ) -> None:
        """One training step, counted from 0, with the gradients that its own backward gave (for every parameter).

        lr_factor: the schedule's multiplier of every lr. split_step (odd): the last step with embed tied to the head;
        None: never tied.
        """
        tied = split_step is not None and step <= split_step
        for name, p in self.params.items():
            rule = self.table[name]
            if isinstance(rule, NorMuon):
                g = gradients[name].double()
                self.params[name] = normuon_step(p, g, self.state[name], rule, lr_factor, momentum)
            else:
                self.accumulated[name] += gradients[name].double()

        if step % 2 == 0:
            return
        if tied:
            self.accumulated["head"] += self.accumulated["embed"].T
        for name, p in self.params.items():
            rule = self.table[name]
            if isinstance(rule, NorMuon) or (tied and name == "embed"):
                continue
            self.params[name] = adam_step(p, self.accumulated[name], self.state[name], rule, lr_factor)
        if tied:
            self.params["embed"] = self.params["head"].T.clone()
        if step == split_step:
            head = self.state["head"]
            self.state["embed"] = {"count": head["count"], "m": head["m"].T.clone(), "v": head["v"].T.clone()}
        for g in self.accumulated.values():
            g.zero_()


# ======================================================================================================================
# Schedule
# ======================================================================================================================


def stage_starts(scheduled: int) -> list[int]:
    """First steps of the three stages and of the extension: rounded thirds."""
    return [round(scheduled * i / 3) for i in range(4)]


def split_step(scheduled: int) -> int:
    """The last step with embed tied to the head: the first of the third stage, made odd as Adam's steps are."""
    return stage_starts(scheduled)[2] | 1


def schedule(step: int, scheduled: int = 1270, extension: int = 15) -> dict[str, object]:
    """That of `small`: stage (0 to 3, the extension), lr, momentum, prediction_weights (K,), prefix_weight of a step.

    lr multiplies every learning rate. Step scheduled + extension is the final validation.
    """
    starts = stage_starts(scheduled)
    stage = max(i for i in range(4) if step >= starts[i])
    left = 1 - (step - starts[stage]) / (starts[stage + 1] - starts[stage]) if stage < 3 else 1.0
    prediction_weights = ([1, 0.5, 0.25 * left], [1, 0.5 * left], [1], [1])[stage]
    prefix_weight = (0.25, 0.25 * left, 0.0, 0.0)[stage]

    cooldown_start = 2 * scheduled // 5
    cooled = max(0.0, (step - cooldown_start) / (scheduled - cooldown_start))
    lr = (1, 1.52, 1.73)[stage] * (1 - cooled) + 0.15 * cooled if stage < 3 else 0.15

    fall_start = scheduled + extension - 50
    momentum = 0.85 + 0.1 * min(1, step / 300) - 0.1 * max(0, step - fall_start) / 50
    weights = {"prediction_weights": prediction_weights, "prefix_weight": prefix_weight}
    return {"stage": stage, "lr": lr, "momentum": momentum} | weights
