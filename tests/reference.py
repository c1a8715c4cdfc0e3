"""Model and optimizer once more, in naive float64 PyTorch: the oracle that the tests hold train_gpt.py against.

Written for reading, not for speed: whole (T, T) attention masks, loops over layers and heads, the formulas one
after the other. It shares no code with train_gpt.py. make_golden.py makes the golden numbers of it. Sources: Muon
(Jordan et al. 2024), Polar Express arXiv:2505.16932, NorMuon arXiv:2510.05491, cautious decay arXiv:2510.12402, value
residual arXiv:2410.17897, YaRN arXiv:2309.00071, ReLU² arXiv:2109.08668.

Shapes: T tokens of one packed row, d model width, H heads, D head width (d = H*D), V padded vocabulary, L layers,
A attention layers, E layers with a value embedding, S skips, g gate width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT64_EPS = torch.finfo(torch.float64).eps

# ======================================================================================================================
# Model
# ======================================================================================================================


@dataclass(frozen=True)
class Layout:
    """Which layer has what. Layers count from 0."""

    num_layers: int
    num_heads: int
    head_dim: int
    no_attention: tuple[int, ...]  # layers with an MLP only
    paired: tuple[int, ...]  # layers whose heads h and h + H/2 share one sequence
    long: tuple[int, ...]  # layers with the long window and the partial key offset
    value_embed: dict[int, int]  # layer -> index of its value-embedding table
    skips: tuple[tuple[int, int], ...]  # (from layer's output, to layer's input), in the order of skip_gate's rows
    backout_layer: int | None  # its output is subtracted at the end; None: no backout
    gate_width: int  # g: the gates read the first g dims
    second_embed: tuple[int, ...] = ()  # n: the second input embedding is that of the last n tokens, summed over these


SMALL = Layout(
    num_layers=11,
    num_heads=6,
    head_dim=128,
    no_attention=(6,),
    paired=(0, 2, 5, 9),
    long=(3, 10),
    value_embed={0: 1, 1: 2, 8: 0, 9: 1, 10: 2},
    skips=((3, 6),),
    backout_layer=7,
    gate_width=12,
)


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


def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) index of the document each token lies in. Entries of cu_seqlens equal to T are padding."""
    ids = torch.zeros(num_tokens, dtype=torch.long)
    for start in cu_seqlens.tolist():
        ids[start:] += 1
    return ids


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


def row_of_ngram(tokens: list[int], position: int, n: int, documents: list[int], rows: int) -> int:
    """Row of the second input embedding for the n tokens that end at a position; before the document are none."""
    key = tokens[position]
    for back in range(1, n):
        inside = position >= back and documents[position - back] == documents[position]
        key = (48271 * key + (tokens[position - back] + 1 if inside else 0)) % (2**31 - 1)
    return key % rows


def masked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, attn_scale: float) -> Tensor:
    """Causal attention of one head inside documents, at most `window` positions back. q, k, v (N, D) -> (N, D)."""
    position = torch.arange(len(q))
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance <= window) & (documents[:, None] == documents[None, :])
    scores = (attn_scale * q @ k.T).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """(T, D), (T, D) -> (2T, D): `first` at the even, `second` at the odd positions."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


def attention(
    h: Tensor,  # (T, d) normed input
    weights: dict[str, Tensor],
    layout: Layout,
    layer: int,
    tokens: Tensor,  # (T,)
    documents: Tensor,  # (T,)
    window: int,
    frequencies: Tensor,  # (D/4,)
    attn_scale: float,
    eps: float,
) -> Tensor:  # (T, d)
    """Attention of one layer, from its normed input to what is added to the residual stream."""
    num_tokens, heads, dim = len(h), layout.num_heads, layout.head_dim
    attention_layers = [i for i in range(layout.num_layers) if i not in layout.no_attention]
    index = attention_layers.index(layer)
    w_q, w_k, w_v, w_o = weights["attn_bank"][4 * index : 4 * index + 4]
    qkv_lambda, out_lambda = weights["sa_lambda"][layer]
    gate_input = h[:, : layout.gate_width]

    q_heads, k_heads, v_heads = [], [], []
    for head in range(heads):
        rows = slice(head * dim, (head + 1) * dim)
        q = norm(h @ (qkv_lambda * w_q[rows]).T, eps)
        k = norm(h @ (qkv_lambda * w_k[rows]).T, eps)
        v = h @ (qkv_lambda * w_v[rows]).T
        if layer in layout.long:
            # Partial key offset. Nothing stands before the row's first token, so it keeps its own. The offset goes by
            # position in the row: a document's first token takes from the last token of the document before.
            shifted = torch.cat([k[:1, dim // 2 :], k[:-1, dim // 2 :]])
            k = torch.cat([k[:, : dim // 2], shifted], dim=1)
        if layer in layout.value_embed:
            table = weights["value_embeds"][layout.value_embed[layer]]
            gate = weights["value_gates"][sorted(layout.value_embed).index(layer), head]
            v = v + 2 * torch.sigmoid(gate_input @ gate)[:, None] * table[tokens][:, rows]
        q_heads.append(q)
        k_heads.append(k)
        v_heads.append(v)

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
        for head in range(heads):
            q = rotate(q_heads[head], frequencies, positions)
            k = rotate(k_heads[head], frequencies, positions)
            outputs[head] = masked_attention(q, k, v_heads[head], documents, window, attn_scale)

    for head in range(heads):
        outputs[head] = torch.sigmoid(gate_input @ weights["attn_gates"][index, head])[:, None] * outputs[head]
    return torch.cat(outputs, dim=1) @ (out_lambda * w_o).T


def mlp(h: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """ReLU² MLP. h (T, d), fc and proj (4d, d) -> (T, d)."""
    return torch.relu(h @ fc.T).square() @ proj


def forward(
    weights: dict[str, Tensor],
    layout: Layout,
    tokens: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (any,) starts of the documents, padded with T
    windows: tuple[int, int],  # (short, long) in tokens
    frequencies: Tensor,  # (D/4,)
    attn_scale: float,
    norm_eps: float = FLOAT64_EPS,
) -> Tensor:  # (T, V)
    """Logits after the soft-cap, float64. Weights of another dtype are widened, so gradients flow to them all the same.

    weights: embed (V, d), head (d, V), attn_bank (>= 4A, d, d) as Wq, Wk, Wv, Wo per attention layer, mlp_bank
    (>= 2L, 4d, d) as fc, proj per layer, value_embeds (tables, V, d), attn_gates (A, H, g), value_gates (E, H, g),
    smear_gate (g,), skip_gate (S, g) or (g,), resid_lambda (L,), sa_lambda (L, 2), x0_lambda (L,), smear_lambda (),
    skip_lambda (S,) or (), backout_lambda (); and, for a second input embedding, embed2 (rows, d), x02_lambda (L,).
    norm_eps: pass the epsilon of the implementation under test where its activations are of another dtype.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    tokens = tokens.long()
    frequencies = frequencies.double()
    g = layout.gate_width
    documents = document_ids(cu_seqlens, len(tokens))
    skip_gates = weights["skip_gate"].reshape(-1, g) if layout.skips else None
    skip_lambdas = weights["skip_lambda"].reshape(-1) if layout.skips else None

    embedded = weights["embed"][tokens]
    smear = weights["smear_lambda"] * torch.sigmoid(embedded[1:, :g] @ weights["smear_gate"])
    x0 = norm(torch.cat([embedded[:1], embedded[1:] + smear[:, None] * embedded[:-1]]), norm_eps)
    x02 = None
    if layout.second_embed:
        table, text, ids = weights["embed2"], tokens.tolist(), documents.tolist()
        rows = lambda n: [row_of_ngram(text, t, n, ids, len(table)) for t in range(len(text))]
        x02 = norm(sum(table[rows(n)] for n in layout.second_embed), norm_eps)

    x = x0
    layer_outputs = []
    for layer in range(layout.num_layers):
        for index, (source, target) in enumerate(layout.skips):
            if target == layer:
                gate = 2 * torch.sigmoid(x0[:, :g] @ skip_gates[index])
                x = x + torch.sigmoid(skip_lambdas[index]) * gate[:, None] * layer_outputs[source]
        x = weights["resid_lambda"][layer] * x + weights["x0_lambda"][layer] * x0
        if x02 is not None:
            x = x + weights["x02_lambda"][layer] * x02
        if layer not in layout.no_attention:
            window = windows[1] if layer in layout.long else windows[0]
            x = x + attention(
                norm(x, norm_eps),
                weights,
                layout,
                layer,
                tokens,
                documents,
                window,
                frequencies,
                attn_scale,
                norm_eps,
            )
        fc, proj = weights["mlp_bank"][2 * layer : 2 * layer + 2]
        x = x + mlp(norm(x, norm_eps), fc, proj)
        layer_outputs.append(x)

    if layout.backout_layer is not None:
        x = x - weights["backout_lambda"] * layer_outputs[layout.backout_layer]
    x = norm(x, norm_eps)
    return 23 * torch.sigmoid((x @ weights["head"] + 5) / 7.5)


def train_loss(logits: Tensor, targets: Tensor, prediction_weights: Tensor | list[float]) -> Tensor:
    """Multi-token prediction, summed over the row: sum_t sum_k w_k CE(logits_t, target_{t+k}), none past the end.

    logits (T, V), targets (T,) with targets[t] the token after t, prediction_weights (K,) -> ()
    """
    log_probs = logits.log_softmax(-1)
    loss = logits.new_zeros(())
    for k, weight in enumerate(prediction_weights):
        for t in range(len(targets) - k):
            loss = loss - weight * log_probs[t, targets[t + k]]
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
    beta2: float = 0.95
    decay: float = 1.2


TABLE: dict[str, Adam | NorMuon] = {
    "attn_bank": NorMuon(),
    "mlp_bank": NorMuon(lr_muls=(1.0, 2.0)),
    "scalars": Adam((0.9, 0.99), lr_mul=5),
    "resid_lambda": Adam((0.9, 0.99), lr_mul=5),
    "sa_lambda": Adam((0.9, 0.99), lr_mul=5),
    "smear_lambda": Adam((0.9, 0.99), lr_mul=5),
    "skip_lambda": Adam((0.9, 0.99), lr_mul=5),
    "backout_lambda": Adam((0.9, 0.99), lr_mul=5),
    "x0_lambda": Adam((0.65, 0.95), lr_mul=5),
    "smear_gate": Adam((0.9, 0.99), lr_mul=0.01),
    "skip_gate": Adam((0.9, 0.99), lr_mul=0.05),
    "attn_gates": Adam((0.9, 0.99), lr_mul=1, wd_mul=1),
    "value_gates": Adam((0.9, 0.99), lr_mul=1, wd_mul=1),
    "value_embeds": Adam((0.75, 0.95), lr_mul=75, wd_mul=5),
    "head": Adam((0.5, 0.95), lr_mul=1, wd_mul=150),
    "embed": Adam((0.5, 0.95), lr_mul=1, wd_mul=150),
}
"""The rules of the parameters of `small`; "scalars" stands for all the λ that share its row."""


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
    state: dict[
        str, Tensor
    ],  # {} at first, then `momentum` like bank and `mean_square` (n, rows, 1) or (n, 1, columns)
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
