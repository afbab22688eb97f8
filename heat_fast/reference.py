"""Algorithm 1 of the paper, literally: slow, in float64, sharing nothing with the fast path.

This module is the oracle of the tests and the place to read what the numbers mean. It sees the
model only through Hugging Face's own forward pass with `inputs_embeds`: one context, one masked
token and one probe at a time, a full forward for each, plain double backward for every
Hessian-vector product, all N x N attentions of all heads, full log-softmax distributions.

Per target token y after a context of n tokens with input embeddings X [n, d] (what is passed as
`inputs_embeds`; Gemma's embedding scale is inside X, learned positions are not), with
g(X) = log p(y | X) and P the next-token distribution at the last position (paper, Eq. 5 and 22):

    score[i] = gate[i] * (alpha * |grad_i g|_1 + beta * S[i] + gamma * I[i])

Hugging Face casts to float32 inside many blocks whatever the model's dtype: RMS norms, softmax,
GPT-J's and GPT-Neo's attention scores. Run as it is, a "float64" model is right to about 1e-7 only.
Here every such cast keeps float64 (`_KeepFloat64`). Rotary tables are the exception: they are
constants of the model and stay what the model itself computes, float32 values cast to float64.
The user's model is never touched: all work is done on a deep copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from heat_fast.errors import ConfigError, InputError, UnsupportedModelError

__all__ = ["Reference", "ReferenceAttribution", "attribute", "attribute_in_windows"]

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True)
class ReferenceAttribution:
    """Every component of one attribution; float64, on the CPU, T targets by N prompt tokens.

    `scores` [N] is `target_scores` [T, N] aggregated over targets; `information`, `log_prob_drop`
    and `target_log_probs` [T] are in nats.
    """

    gate: Tensor
    curvature: Tensor
    information: Tensor
    log_prob_drop: Tensor
    gradient_norm: Tensor
    envelope: Tensor
    target_scores: Tensor
    scores: Tensor
    target_log_probs: Tensor


class _KeepFloat64(TorchFunctionMode):
    """Turn every request for float32 into one for float64, except while `paused`."""

    paused = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


class Reference:
    """A float64 copy of a Hugging Face causal language model and the quantities of section 1.

    With `layers`, gate, gradient and Hessian are those of the last `layers` blocks: sums and
    products over these alone, derivatives with respect to the residual stream that enters them.

    Shapes below: n context tokens, d embedding width, L layers, H heads, V vocabulary.
    """

    def __init__(self, model: Any, layers: int | None = None) -> None:
        double = copy.deepcopy(model).double().eval().requires_grad_(False)
        # Fused attention has no double backward, and only eager attention returns its weights.
        double.set_attn_implementation("eager")
        if any(parameter.dim() == 3 for parameter in double.parameters()):
            # Experts: their fused products know no float64.
            double.set_experts_implementation("eager")
        self.model = double
        # Of a model that reads images too, the part that is asked here.
        self.text: Any = getattr(getattr(double, "model", None), "language_model", double)
        self.layers = layers
        self._precision = precision = _KeepFloat64()
        for module in double.modules():
            if getattr(module, "reorder_and_upcast_attn", False):
                # GPT-2's other order of the same product insists on float32.
                module.reorder_and_upcast_attn = False
            if "Rotary" in type(module).__name__:
                module.register_forward_pre_hook(lambda *_: setattr(precision, "paused", True))
                module.register_forward_hook(lambda *_: setattr(precision, "paused", False))

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings X [n, d] of `token_ids`, as they would be passed in `inputs_embeds`."""
        ids = torch.as_tensor(list(token_ids), dtype=torch.long, device=self.model.device)
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings.detach()

    def log_distribution(self, embeddings: Tensor) -> Tensor:
        """log P [V] over the token after the context `embeddings` [n, d]; nats."""
        with self._precision:
            output = self.model(inputs_embeds=embeddings.unsqueeze(0), use_cache=False)
            logits: Tensor = output.logits[0, -1]
        return torch.log_softmax(logits, dim=-1)

    def point(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated [n, d], a leaf, and log P [V] as a function of it.

        The embeddings, or with `layers`, unless these are all, the residual stream that enters the
        first of them.
        """
        blocks = self.blocks()
        if self.layers is None or self.layers >= len(blocks):
            leaf = embeddings.detach().clone().requires_grad_(True)
            return leaf, self.log_distribution(leaf)
        found: list[Tensor] = []

        def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            found.append(stream[0].detach().clone().requires_grad_(True))
            entering = found[0].unsqueeze(0)
            if args:
                return (entering, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering}

        block = blocks[-self.layers]
        handle = block.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            log_p = self.log_distribution(embeddings)
        finally:
            handle.remove()
        return found[0], log_p

    def blocks(self) -> Any:
        """The model's list of blocks: the only one of that many."""
        count = self.model.config.get_text_config().num_hidden_layers
        lists = [m for m in self.text.modules() if isinstance(m, torch.nn.ModuleList)]
        return next(entries for entries in lists if len(entries) == count)

    def attentions_and_values(self, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Attention weights A [L, H, n, n] and values, per layer [H, n, head size].

        The values are the ones the model puts in its key-value cache: after the block's input norm
        and with their bias; where it puts latent rows there, what it makes of them. Under
        grouped-query attention each group's values are repeated for each of its query heads.
        """
        from transformers import DynamicCache

        # Without a configuration the cache keeps all positions of windowed layers too.
        cache: Any = DynamicCache()
        expanded: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output: expanded.append(output))
            for name, module in self.text.named_modules()
            if name.endswith("kv_b_proj")
        ]
        try:
            with torch.no_grad(), self._precision:
                output = self.model(
                    inputs_embeds=embeddings.unsqueeze(0),
                    past_key_values=cache,
                    use_cache=True,
                    output_attentions=True,
                )
        finally:
            for handle in handles:
                handle.remove()
        weights = torch.stack([layer[0] for layer in output.attentions])
        heads = weights.shape[1]
        if expanded:  # keys and values of each head, side by side
            width = self.model.config.v_head_dim
            return weights, [
                each.flatten(0, -2).unflatten(-1, (heads, -1))[..., -width:].transpose(0, 1)
                for each in expanded
            ]
        values = []
        for layer in cache.layers:
            groups = layer.values.shape[1]
            values.append(layer.values[0].repeat_interleave(heads // groups, dim=0))
        return weights, values

    def output_projections(self) -> list[Tensor]:
        """W_O of every layer as [heads * head size, d], so that a head's output is V W_O[head]."""
        found: list[Any] = []
        for module in self.text.modules():
            if "Attention" in type(module).__name__:
                children = dict(module.named_children())
                found += [children[name] for name in _OUTPUT_PROJECTIONS if name in children]
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(found) != layers:
            raise UnsupportedModelError(
                f"found {len(found)} attention output projections in {type(self.model).__name__}, "
                f"expected {layers}, one per layer: a child of a module called *Attention* named "
                f"one of {', '.join(_OUTPUT_PROJECTIONS)}; add this model's name for it there"
            )
        # Conv1D keeps [in, out], Linear [out, in].
        return [x.weight if type(x).__name__ == "Conv1D" else x.weight.T for x in found]

    def value_norms(self, embeddings: Tensor) -> Tensor:
        """|V[l,h,i] W_O[l,h]|_1 as [L, H, n]."""
        _, values = self.attentions_and_values(embeddings)
        rows = []
        for value, projection in zip(values, self.output_projections(), strict=True):
            heads, _, head_size = value.shape
            blocks = projection.reshape(heads, head_size, -1)
            rows.append(torch.stack([(value[h] @ blocks[h]).abs().sum(-1) for h in range(heads)]))
        return torch.stack(rows)

    def rollout(self, embeddings: Tensor, kind: str = "value_path") -> Tensor:
        """Flow Phi [L, H, n] that ends at the last position.

        value_path:  Phi[l,h] = e_T' A~_L ... A~_{l+1} A[l,h],   A~ = (I + mean_h A) / 2
        input_path:  Phi[l,h] = e_T' A^[l,h] ... A^[1,h],        A^ = (I + A) / 2

        With `layers`, blocks before the last `layers` have no flow and are in no product.
        """
        weights, _ = self.attentions_and_values(embeddings)
        layers, heads, length, _ = weights.shape
        identity = torch.eye(length, dtype=weights.dtype, device=weights.device)
        flow = torch.zeros(layers, heads, length, dtype=weights.dtype, device=weights.device)
        first = 0 if self.layers is None else max(0, layers - self.layers)
        for layer in range(first, layers):
            for head in range(heads):
                if kind == "value_path":
                    path = weights[layer, head]
                    for above in range(layer + 1, layers):
                        path = (identity + weights[above].mean(0)) / 2 @ path
                elif kind == "input_path":
                    path = identity
                    for below in range(first, layer + 1):
                        path = (identity + weights[below, head]) / 2 @ path
                else:
                    raise ConfigError(
                        f"unknown rollout {kind!r}; expected 'value_path' or 'input_path'"
                    )
                flow[layer, head] = path[-1]
        return flow

    def gate(self, embeddings: Tensor, rollout: str = "value_path") -> Tensor:
        """M_T [n]: sum over layers and heads of Phi[l,h,i] |V[l,h,i] W_O[l,h]|_1, summing to 1."""
        mass = (self.rollout(embeddings, rollout) * self.value_norms(embeddings)).sum((0, 1))
        return mass / mass.sum()

    def gradient(self, embeddings: Tensor, target: int) -> Tensor:
        """grad g [n, d] with g(X) = log p(target | X)."""
        leaf, log_p = self.point(embeddings)
        (gradient,) = torch.autograd.grad(log_p[target], leaf)
        return gradient

    def hessian_operator(self, embeddings: Tensor, target: int) -> Callable[[Tensor], Tensor]:
        """v [n, d] -> H v [n, d], H the Hessian of g, by double backward."""
        leaf, log_p = self.point(embeddings)
        (gradient,) = torch.autograd.grad(log_p[target], leaf, create_graph=True)

        def multiply(vector: Tensor) -> Tensor:
            (product,) = torch.autograd.grad((gradient * vector).sum(), leaf, retain_graph=True)
            return product

        return multiply

    def hessian(self, embeddings: Tensor, target: int) -> Tensor:
        """H [n d, n d], column by column; for tiny contexts only."""
        multiply = self.hessian_operator(embeddings, target)
        basis = torch.eye(embeddings.numel(), dtype=embeddings.dtype, device=embeddings.device)
        return torch.stack([multiply(unit.view_as(embeddings)).flatten() for unit in basis], dim=1)

    def gauss_newton_operator(self, embeddings: Tensor) -> Callable[[Tensor], Tensor]:
        """v [n, d] -> -J'(diag p - p p') J v [n, d], J the Jacobian of log P, one row at a time.

        Log-probabilities differ from logits by a constant per position, which the middle factor
        annihilates, so either gives the same operator.
        """
        leaf, log_p = self.point(embeddings)
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in log_p]
        jacobian = torch.stack(rows)
        p = log_p.detach().exp()
        matrix = -jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        return lambda vector: (matrix @ vector.flatten()).view_as(embeddings)

    def curvature(
        self,
        embeddings: Tensor,
        target: int,
        count: int,
        probes: Tensor | None = None,
        *,
        kind: str = "hessian",
        estimator: str = "block",
    ) -> Tensor:
        """S [count] of the first `count` tokens.

        block (paper, Eq. 3):  S_i = mean_k |Pi_i H (Pi_i r_k)|_1,   row:  mean_k |Pi_i H r_k|_1,
        with the given probes r [m, >= n, d] ([m, >= count, d] will do for block).
        `kind` "grad_squared" gives |grad_i g|_2^2 and "none" zeros; both ignore the probes.
        """
        if kind == "grad_squared":
            return self.gradient(embeddings, target).pow(2).sum(-1)[:count]
        if kind == "none":
            return embeddings.new_zeros(count)
        if kind not in ("hessian", "gauss_newton") or estimator not in ("block", "row"):
            raise ConfigError(
                f"unknown curvature {kind!r} with estimator {estimator!r}; expected 'hessian', "
                "'gauss_newton', 'grad_squared' or 'none', with 'block' or 'row'"
            )
        needed = count if estimator == "block" else embeddings.shape[0]
        if probes is None or probes.ndim != 3 or probes.shape[1] < needed:
            raise InputError(
                f"{kind} curvature needs probes [m, >= {needed}, {embeddings.shape[1]}], "
                f"got {None if probes is None else tuple(probes.shape)}"
            )
        signs = probes.to(embeddings)
        if kind == "hessian":
            multiply = self.hessian_operator(embeddings, target)
        else:
            multiply = self.gauss_newton_operator(embeddings)
        total = embeddings.new_zeros(count)
        for sign in signs:
            if estimator == "row":
                total += multiply(sign[:needed]).abs().sum(-1)[:count]
                continue
            for token in range(count):
                masked = torch.zeros_like(embeddings)
                masked[token] = sign[token]
                total[token] += multiply(masked)[token].abs().sum()
        return total / len(signs)

    def row_mass(self, embeddings: Tensor, target: int) -> Tensor:
        """|Pi_i H|_{1,1} [n]: the sum of |H| over token i's rows (paper, norm bounds)."""
        return self.hessian(embeddings, target).abs().sum(1).view_as(embeddings).sum(1)

    def replacement(self, masking: str, sentinel_token: int | None = None) -> Tensor:
        """The embedding [d] that stands for an absent token: zero, vocabulary mean or sentinel."""
        if masking == "zero":
            return torch.zeros_like(self.embed([0])[0])
        if masking == "mean":
            return self.embed(range(len(self.model.get_input_embeddings().weight))).mean(0)
        if masking == "sentinel" and sentinel_token is not None:
            return self.embed([sentinel_token])[0]
        raise ConfigError(
            f"unknown masking {masking!r} with sentinel_token={sentinel_token}; expected 'zero', "
            "'mean', or 'sentinel' with a sentinel_token"
        )

    def masked_log_distributions(self, embeddings: Tensor, count: int, absent: Tensor) -> Tensor:
        """log P [count, V], row i with token i's embedding replaced: a full forward each."""
        rows = []
        for token in range(count):
            masked = embeddings.clone()
            masked[token] = absent
            with torch.no_grad():
                rows.append(self.log_distribution(masked))
        return torch.stack(rows)


def attribute(
    model: Any,
    prompt_ids: Sequence[int],
    target_ids: Sequence[int],
    probes: Tensor | None = None,
    *,
    rollout: str = "value_path",
    curvature: str = "hessian",
    estimator: str = "block",
    layers: int | None = None,
    masking: str = "zero",
    sentinel_token: int | None = None,
    alpha: float = 0.0,
    beta: float = 0.5,
    gamma: float = 0.5,
    normalize: str | None = None,
    aggregate: str = "mean",
) -> ReferenceAttribution:
    """HEAT scores of every prompt token for every target token, by Algorithm 1.

        score[t,i] = gate[t,i] * (alpha |grad_i g|_1 + beta S[t,i] + gamma I[t,i])
        envelope[t,i] = gate[t,i] * (beta S[t,i] + gamma max(0, g(X) - g(X without i)))

    Row t is an independent run on the context prompt + target_ids[:t], n = N + t tokens long; its
    gate sums to 1 over those n tokens and is then restricted to the N prompt tokens (so it may sum
    to less). `I = KL(P || P without i)`. `probes` [m, >= N, d] (or [m, >= N + T - 1, d] for
    estimator "row") are shared by all rows. With normalize="sum", each term inside the brackets is
    divided by its own sum over the prompt tokens (a term that is zero throughout stays zero).
    `layers`: gate, S and gradient from that many of the last blocks (see `Reference`).
    `aggregate` over targets: "mean", "max" or "sum".

    Raises ConfigError for an unknown option, InputError for an empty prompt or target.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> probes = torch.randint(0, 2, (2, 3, 8)) * 2 - 1
        >>> attribute(GPT2LMHeadModel(config), [5, 1, 3], [7, 2], probes).target_scores.shape
        torch.Size([2, 3])
    """
    if len(prompt_ids) == 0 or len(target_ids) == 0:
        raise InputError(
            f"got {len(prompt_ids)} prompt tokens and {len(target_ids)} target tokens; "
            "expected at least one of each"
        )
    if normalize not in (None, "sum"):
        raise ConfigError(f"unknown normalize {normalize!r}; expected None or 'sum'")
    if aggregate not in ("mean", "max", "sum"):
        raise ConfigError(f"unknown aggregate {aggregate!r}; expected 'mean', 'max' or 'sum'")

    reference = Reference(model, layers)
    count = len(prompt_ids)
    absent = reference.replacement(masking, sentinel_token)
    rows: list[dict[str, Tensor]] = []
    log_probs: list[Tensor] = []
    for index, target in enumerate(target_ids):
        embeddings = reference.embed([*prompt_ids, *target_ids[:index]])
        with torch.no_grad():
            log_p = reference.log_distribution(embeddings)
        masked = reference.masked_log_distributions(embeddings, count, absent)
        row = {
            "gate": reference.gate(embeddings, rollout),
            "curvature": reference.curvature(
                embeddings, target, count, probes, kind=curvature, estimator=estimator
            ),
            "information": (log_p.exp() * (log_p - masked)).sum(-1),
            "log_prob_drop": log_p[target] - masked[:, target],
            "gradient_norm": reference.gradient(embeddings, target).abs().sum(-1),
        }
        rows.append({name: values[:count] for name, values in row.items()})
        log_probs.append(log_p[target])
    parts = {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}

    def scaled(term: Tensor) -> Tensor:
        if normalize is None:
            return term
        total = term.sum(-1, keepdim=True)
        return torch.where(total == 0, term, term / torch.where(total == 0, 1.0, total))

    gate = parts["gate"]
    curved = beta * scaled(parts["curvature"])
    first_order = alpha * scaled(parts["gradient_norm"])
    target_scores = gate * (first_order + curved + gamma * scaled(parts["information"]))
    drop = parts["log_prob_drop"].clamp_min(0)
    return ReferenceAttribution(
        **parts,
        envelope=gate * (curved + gamma * scaled(drop)),
        target_scores=target_scores,
        scores=getattr(target_scores, "amax" if aggregate == "max" else aggregate)(0),
        target_log_probs=torch.stack(log_probs).cpu(),
    )


def attribute_in_windows(
    model: Any,
    prompt_ids: Sequence[int],
    target_ids: Sequence[int],
    probes: Tensor | None = None,
    *,
    window: int,
    overlap: float = 0.5,
    sink: int = 1,
    tail: int = 64,
    window_weights: str = "probability",
    window_tolerance: float = 0.0,
    **settings: Any,
) -> dict[str, Tensor]:
    """Algorithm 1 with windows: `attribute` on each, and the means of its components [T, N].

    A window is the first `sink` tokens, the last `tail` tokens and `window - sink - tail` between
    them, which move on by their share `1 - overlap`, and for the last time to the tail. Sums over
    the windows that hold a token, divided by their number; the gate's are divided by the sum of
    their weights. A window's weight is the target's probability in it relative to its largest in
    any (1 where `window_weights` is "uniform", as in the paper); up to `window_tolerance` it is as
    good as 0, only so large that tokens without another window keep their gate. `settings` and
    `probes` as for `attribute`; a window's first token takes the first probe, whichever token it
    is.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
        >>> prompt, shape = [5, 1, 3, 2, 6, 9], {"window": 4, "sink": 1, "tail": 1}
        >>> model = GPT2LMHeadModel(config)
        >>> parts = attribute_in_windows(model, prompt, [7], curvature="none", **shape)
        >>> parts["gate"].shape
        torch.Size([1, 6])
    """
    count = len(prompt_ids)
    held = []
    if count <= window:
        held.append(list(range(count)))
    else:
        moving = window - sink - tail
        begin = sink
        while begin + moving < count - tail:
            held.append([*range(sink), *range(begin, begin + moving), *range(count - tail, count)])
            begin += max(1, round((1 - overlap) * moving))
        begin = count - tail - moving
        held.append([*range(sink), *range(begin, begin + moving), *range(count - tail, count)])
    names = ("gate", "curvature", "information", "log_prob_drop", "gradient_norm")
    sums = {name: torch.zeros(len(target_ids), count, dtype=torch.float64) for name in names}
    visits = torch.zeros(count, dtype=torch.float64)
    weighed = torch.zeros(len(target_ids), count, dtype=torch.float64)
    windows = [
        attribute(model, [prompt_ids[i] for i in tokens], target_ids, probes, **settings)
        for tokens in held
    ]
    probabilities = torch.stack([found.target_log_probs for found in windows]).exp()
    for tokens, found, probability in zip(held, windows, probabilities, strict=True):
        weight = probability / probabilities.amax(0)
        weight[weight <= window_tolerance] = 1e-12
        if window_weights == "uniform":
            weight = torch.ones_like(weight)
        for place, token in enumerate(tokens):
            for name in names:
                sums[name][:, token] += weight * getattr(found, name)[:, place]
            visits[token] += 1
            weighed[:, token] += weight
    return {name: total / (weighed if name == "gate" else visits) for name, total in sums.items()}
