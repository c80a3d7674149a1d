"""Language models of single characters on the Python manual: perplexity, size and speed at 8, 4, 3 and 2 bits.

The text is what `help()` prints about the language; every Python ships it (pydoc_data). A small GPT, whose head is its
embedding, or with --model gru an embedding, a GRU and a head. Weights at 8 to 2 bits; inputs at 8, with a range
for each token; the table and the head at 8. Quantized after training (PTQ) and in training (QAT), then converted to
integers, which generate by what a model keeps of the past: keys and values, or the GRU's state. Takes a minute.
At real size: python examples/character_models.py --width 256 --layers 4 --context 256 --steps 3000
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from shared import at_least, below, bytes_of, microseconds, study
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

BITS = (8, 4, 3, 2)
BATCH = 16
State = list[Tensor]  # what a model keeps of the characters before, for generation


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // 16

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: [N, L, width]; past: keys and values of the characters before, [2, N, heads, P, 16]."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        now = torch.stack((k, v))
        if past is not None:
            now = torch.cat((past, now), -2)
        y = F.scaled_dot_product_attention(q, now[0], now[1], is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), now


class GPT(nn.Module):
    def __init__(self, words: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, tokens: Tensor, past: State | None = None) -> tuple[Tensor, State]:
        """tokens: [N, L]. Returns logits [N, L, words] and the past of the next call."""
        begin = 0 if past is None else past[0].shape[-2]
        x = self.embedding(tokens) + self.position(torch.arange(begin, begin + tokens.shape[1]))
        new = []
        for i, block in enumerate(self.blocks):
            x, now = block(x, None if past is None else past[i])
            new.append(now)
        return self.head(self.norm(x)), new


class GRU(nn.Module):
    def __init__(self, words: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.gru = nn.GRU(width, 2 * width, layers, batch_first=True)
        self.head = nn.Linear(2 * width, words)

    def forward(self, tokens: Tensor, past: State | None = None) -> tuple[Tensor, State]:
        x, state = self.gru(self.embedding(tokens), None if past is None else past[0])
        return self.head(x), [state]


def text() -> tuple[Tensor, Tensor, str]:
    """Codes of characters to train on and to test on, and the characters. Paragraphs that topics share count once."""
    paragraphs = list(dict.fromkeys(part for topic in topics.values() for part in topic.split("\n\n")))
    ascii_only = [part.encode("ascii", "ignore").decode() + "\n\n" for part in paragraphs]
    characters = "".join(sorted(set("".join(ascii_only))))
    code = {character: i for i, character in enumerate(characters)}
    test = "".join(ascii_only[::10])
    train = "".join(part for i, part in enumerate(ascii_only) if i % 10)
    return torch.tensor([code[c] for c in train]), torch.tensor([code[c] for c in test]), characters


def config(bits: int) -> qk.QConfig:
    per_token = qk.QSpec(8, qk.PerToken(), quantizer="dynamic")
    eight = {"weight": {"bits": 8}}
    return qk.QConfig(qk.QSpec(bits), per_token, rules=[(nn.Embedding, eight), ("head", eight)])


def train(model: nn.Module, codes: Tensor, context: int, steps: int, lr: float, seed: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(qk.parameter_groups(model, lr=lr, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(len(codes) - context, (BATCH, 1), generator=draw)
        window = codes[start + torch.arange(context + 1)]
        logits, _ = model(window[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Of all characters but the first in windows [N, context + 1]."""
    model.eval()
    losses = [
        F.cross_entropy(model(part[:, :-1])[0].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for part in windows.split(64)
    ]
    return math.exp(sum(loss.item() for loss in losses) / windows[:, 1:].numel())


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """The likeliest next character, again and again; the model sees each character once."""
    logits, past = model.eval()(prompt)
    made = [logits[:, -1:].argmax(-1)]
    while len(made) < length:
        logits, past = model(made[-1], past)
        made.append(logits[:, -1:].argmax(-1))
    return torch.cat(made, 1)


def main() -> None:
    parser = study(__doc__, 300, "of the float model; all then take a third as many more", least_steps=3)
    parser.add_argument("--model", choices=("gpt", "gru"), default="gpt")
    parser.add_argument("--width", type=at_least(16, multiple_of=16), default=64, help="heads have 16 of it")
    parser.add_argument("--layers", type=at_least(1), help="2 of the GPT, 1 of the GRU")
    parser.add_argument("--context", type=at_least(8), default=64)
    options = parser.parse_args()
    layers = options.layers or {"gpt": 2, "gru": 1}[options.model]
    if options.quick:
        options.width, options.context, options.steps = 32, 32, 6
    small = below(options, width=64, context=64, steps=300)

    torch.manual_seed(options.seed)
    fit, test, characters = text()
    if options.context >= len(test):
        parser.error(f"--context: got {options.context}; accepted: below {len(test)}, the characters to test on")
    windows = test.unfold(0, options.context + 1, options.context)[: 64 if options.quick else None]

    def float_model() -> nn.Module:
        kind = {"gpt": GPT, "gru": GRU}[options.model]
        return kind(len(characters), options.width, layers, options.context)

    def tune(model: nn.Module) -> None:
        train(model, fit, options.context, options.steps // 3, 1e-3, options.seed + 1)

    model = float_model()
    train(model, fit, options.context, options.steps, 4e-3, options.seed)
    score: dict[str, float] = {}
    models: dict[str, nn.Module] = {"float": model}
    for bits in BITS:
        prepared = qk.prepare(model, config(bits))
        qk.calibrate(prepared, [windows[:16, :-1]])
        score[f"PTQ {bits}"] = perplexity(qk.convert(prepared), windows)
        tune(prepared)
        converted = models[str(bits)] = qk.convert(prepared)
        score[str(bits)] = perplexity(converted, windows)
        with torch.no_grad():
            simulated, _ = prepared(windows[:16, :-1])
            real, _ = converted(windows[:16, :-1])
            exact, _ = qk.exact(prepared)(windows[:16, :-1])
        assert torch.equal(real, exact), "other integers"
        torch.testing.assert_close(real, simulated, rtol=0, atol=0.05 * simulated.abs().max().item())
    tune(model)  # as many steps as the quantized models
    score["float"] = perplexity(model, windows)

    prompt = windows[:1, : options.context // 2]
    length = options.context - prompt.shape[1]
    count = windows[:, 1:].numel()
    print(f"{options.model}: perplexity of {count} characters; µs to read {prompt.numel()}, to make one")
    print("bits     PTQ    QAT       kB     read     make")
    for name, of in models.items():
        of.eval()
        read = microseconds(of, prompt)
        _, past = of(prompt)
        make = microseconds(of, prompt[:, :1], past)
        before = f"{score[f'PTQ {name}']:.2f}" if name != "float" else ""
        print(f"{name:<5}{before:>7}{score[name]:7.2f} {bytes_of(of) / 1e3:8.1f} {read:8.0f} {make:8.0f}")

    narrow = models["4"]
    made = generate(narrow, prompt, length)
    asked, answer = ("".join(characters[i] for i in codes[0]) for codes in (prompt, made))
    print(f"4 bits go on: {asked!r} … {answer!r}")
    again = prompt
    for _ in range(length):
        again = torch.cat((again, narrow(again)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(again[:, prompt.shape[1] :], made), "what a model keeps of the past changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        qk.save(narrow, Path(folder) / "model.safetensors")
        loaded = qk.load(Path(folder) / "model.safetensors", float_model())
    with torch.no_grad():
        assert torch.equal(loaded(prompt)[0], narrow(prompt)[0]), "the file lost something"
    if small:
        return
    assert score["8"] < 1.02 * score["float"], "8 bits cost nothing"
    assert score["4"] < 1.05 * score["float"]
    for bits in (3, 2):
        assert score[str(bits)] < score[f"PTQ {bits}"], "narrow weights gain by training"


if __name__ == "__main__":
    main()
