"""`hardkv calibrate`: temperature priors of a model, from a text that is like what it will generate."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hardkv_sglang.config import HardKVConfig
    from hardkv_sglang.selection.policies.base import Policy
    from hardkv_sglang.selection.priors import Priors

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

IMPLEMENTATION = "hardkv_calibrate"


class CalibrationError(Exception):
    """Nothing can be calibrated; the message says why."""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "find temperature priors of a model from a text, for the first select event of every request"
    parser = subparsers.add_parser("calibrate", help=text, description=text)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON file to write, and a PNG beside it"
    )
    parser.add_argument("--metric", default="snapkv", choices=("snapkv", "rkv"), help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="tokens of text used (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=int, default=512, metavar="N", help="first tokens, always kept (default: %(default)s)"
    )
    parser.add_argument("--events", type=int, default=8, metavar="N", help="select events (default: %(default)s)")
    parser.add_argument(
        "--config", metavar="JSON", help="options as for --kv-compression-config; its metric is not read"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the priors are written, 2 when the input is refused."""
    from hardkv_sglang.config import HardKVConfig

    try:
        options = HardKVConfig.parse(args.config).with_options(policy="hardkv", budget="per_head", metric=args.metric)
        tokens = read_tokens(args.model, args.text, args.tokens)
        events = place_events(len(tokens), args.prompt, args.events, options)
        recorder = EventRecorder(options, args.prompt, events)
        forward(args.model, tokens, recorder)
    except (CalibrationError, OSError, ValueError) as error:
        print(f"hardkv calibrate: {error}", file=sys.stderr)
        return 2
    priors = recorder.priors(args.model)
    priors.save(args.out)
    print(f"{args.out}: {recorder.summary()}")
    draw(args.out.with_suffix(".png"), recorder, priors)
    return 0


def read_tokens(model: Path, text: Path, num_tokens: int) -> torch.Tensor:
    """First tokens of the text, [N]."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(errors="replace"), add_special_tokens=False).input_ids
    return torch.tensor(ids[:num_tokens])


def place_events(num_tokens: int, prompt_len: int, num_events: int, options: HardKVConfig) -> list[int]:
    """Sequence lengths of the events, evenly spread over the text after the prompt. Raises `CalibrationError`."""
    first = prompt_len + options.recent_tokens + options.select_interval
    if num_events < 1 or prompt_len < 1:
        raise CalibrationError("--events and --prompt must be at least 1")
    if num_tokens < first:
        raise CalibrationError(f"the text has {num_tokens} tokens, at least {first} are needed")
    step = (num_tokens - first) / max(1, num_events - 1)
    return sorted({round(num_tokens - i * step) for i in range(num_events)})


def forward(model: Path, tokens: torch.Tensor, recorder: EventRecorder) -> None:
    """One dense forward pass that shows queries and keys to the recorder."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(IMPLEMENTATION, attend)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    with torch.inference_mode():
        network.model(input_ids=tokens[None], use_cache=False, recorder=recorder)
    if not recorder.temperature:
        raise CalibrationError(f"{model}: this architecture does not use the attention interface of transformers")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    recorder: EventRecorder,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; the layer's events are recorded on the way."""
    from torch.nn import functional

    recorder.record(query[0], key[0], scaling)
    o = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return o.transpose(1, 2).contiguous(), None


@dataclass
class EventRecorder:
    """Runs the select events of every layer as it passes; results grow by one [E, H] per layer."""

    options: HardKVConfig
    prompt_len: int
    events: list[int]  # sequence lengths
    temperature: list[torch.Tensor] = field(default_factory=list)
    infeasible: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)  # fraction of the candidates

    def record(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """query: [HQ, N, D], key: [H, N, D] of the next layer, after RoPE."""
        import torch

        from hardkv_sglang.selection.policies import make_policy

        policy = make_policy(self.options, page_size=1)
        selections = [self._select(policy, query, key, scale, seq_len) for seq_len in self.events]
        self.temperature.append(torch.stack([selection.temperature for selection in selections]))
        self.infeasible.append(torch.stack([selection.infeasible for selection in selections]))
        self.kept.append(torch.stack([selection.keep.float().mean(-1) for selection in selections]))

    def _select(self, policy: Policy, query: torch.Tensor, key: torch.Tensor, scale: float, seq_len: int) -> Any:
        import torch

        from hardkv_sglang.selection.top_p import Candidates

        window, end = self.options.query_window, seq_len - self.options.recent_tokens
        H, _, D = key.shape
        queries = query[:, seq_len - window : seq_len].view(H, -1, window, D)
        logits2 = queries @ key[:, None, :seq_len].transpose(2, 3) * (scale * math.log2(math.e))
        position = torch.arange(seq_len)
        future = position[None, :] > position[-window:, None]
        lse2 = torch.logsumexp(logits2.masked_fill(future, -math.inf) * math.log(2), -1) / math.log(2)
        exists = torch.ones((H, end - self.prompt_len), dtype=torch.bool)
        candidates = Candidates(
            logits2=logits2[..., self.prompt_len : end].contiguous(),
            lse2=lse2,
            attended=exists,
            valid=exists,
            query_valid=torch.ones(window, dtype=torch.bool),
            keys=key[:, self.prompt_len : end],
        )
        return policy.select(candidates)

    def priors(self, model: Path) -> Priors:
        """What goes into the file."""
        import torch

        from hardkv_sglang.selection.calibration import prior_temperature
        from hardkv_sglang.selection.priors import SCORE_OPTIONS, Priors, model_base_name

        given = self.options.to_dict()
        found = prior_temperature(
            torch.stack(self.temperature, 1).flatten(1), torch.stack(self.infeasible, 1).flatten(1)
        )
        table = found.view(len(self.temperature), -1)
        return Priors(
            model_name=model_base_name(str(model.resolve())),
            num_layers=table.shape[0],
            num_kv_heads=table.shape[1],
            metric=self.options.metric,
            options={name: given[name] for name in SCORE_OPTIONS},
            temperature=[[round(value, 6) for value in row] for row in table.tolist()],
            num_events=len(self.events),
        )

    def summary(self) -> str:
        """One line for the terminal."""
        import torch

        solved = ~torch.stack(self.infeasible) & (torch.stack(self.temperature) > 0)
        return (
            f"{solved.any(1).sum()} of {solved.any(1).numel()} heads calibrated over {len(self.events)} events, "
            f"{100 * float(torch.stack(self.kept).mean()):.1f} % of the candidates kept"
        )


def draw(path: Path, recorder: EventRecorder, priors: Priors) -> None:
    """Temperatures and budgets over layers and heads, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    import torch

    temperature = torch.tensor(priors.temperature)
    log2_temperature = torch.where(temperature > 0, temperature, torch.nan).log2()
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = ((log2_temperature, "log2 T (white: none)"), (torch.stack(recorder.kept).mean(1), "kept fraction"))
    for axes, (table, title) in zip(figure.subplots(2, 1), panels, strict=True):
        image = axes.imshow(table.T, aspect="auto", cmap="viridis")
        axes.set(xlabel="layer", ylabel="KV head", title=f"{priors.model_name}, {priors.metric}: {title}")
        figure.colorbar(image)
    figure.savefig(path, dpi=130)
    print(f"{path}: temperatures and budgets over layers and heads")
