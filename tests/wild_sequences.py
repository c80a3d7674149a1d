"""Models of sound, text and other sequences: convolutions over time, recurrent layers and their cells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from wild_case import Models

SEQUENCES = Models()
WORDS = 20


def sound(channels: int = 1, length: int = 32) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(3, channels, length),)


def text(length: int = 6, n: int = 4) -> torch.Tensor:
    return torch.randint(WORDS, (n, length))


@SEQUENCES.add(sound(length=48), narrow=True)
def M5() -> nn.Module:
    """Raw audio to classes."""
    first = [nn.Conv1d(1, 4, 9, stride=2), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)]
    second = [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(6, 5))


@SEQUENCES.add(sound())
class WaveNet(nn.Module):
    """Gated convolutions that see the past alone, with residual and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 1)
        self.dilations = (1, 2, 4)
        self.gates = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=d) for d in self.dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in self.dilations[1:])
        self.skips = nn.ModuleList(nn.Conv1d(4, 6, 1) for _ in self.dilations)
        self.head = nn.Conv1d(6, 10, 1)

    def forward(self, x):
        x, total = self.stem(x), 0
        for i, d in enumerate(self.dilations):
            value, gate = self.gates[i](F.pad(x, (d, 0))).chunk(2, 1)
            y = value.tanh() * gate.sigmoid()
            total = total + self.skips[i](y)
            if i < len(self.residuals):
                x = x + self.residuals[i](y)
        return self.head(F.relu(total))


class TemporalBlock(nn.Module):
    def __init__(self, c: int, out: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv = parametrizations.weight_norm(nn.Conv1d(c, out, 3, dilation=dilation))
        self.down = nn.Conv1d(c, out, 1)

    def forward(self, x):
        return F.relu(F.relu(self.conv(F.pad(x, (self.past, 0)))) + self.down(x))


@SEQUENCES.add(sound(2))
def TCN() -> nn.Module:
    return nn.Sequential(TemporalBlock(2, 4, 1), TemporalBlock(4, 6, 2), nn.Conv1d(6, 1, 1))


@SEQUENCES.add(lambda: (torch.randn(3, 4, 8),), narrow=True)
class HiFiGAN(nn.Module):
    """A vocoder: from a spectrogram up to samples, all weights normed."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.pre = norm(nn.Conv1d(4, 8, 7, padding=3))
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(8 >> i, 4 >> i, 4, 2, 1)) for i in range(2))
        self.blocks = nn.ModuleList(norm(nn.Conv1d(4 >> i, 4 >> i, 3, dilation=3, padding=3)) for i in range(2))
        self.post = norm(nn.Conv1d(2, 1, 7, padding=3))

    def forward(self, x):
        x = self.pre(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = x + block(F.leaky_relu(x, 0.1))
        return torch.tanh(self.post(F.leaky_relu(x)))


@SEQUENCES.add(lambda: (text(), torch.tensor([6, 2, 5, 1])), narrow=True)
class LSTMClassifier(nn.Module):
    """Sentences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(WORDS, 8), nn.LSTM(8, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.head(h[-1])


@SEQUENCES.add(lambda: (text(),))
class BiGRUTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8, padding_idx=0)
        self.gru = nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0])


@SEQUENCES.add(lambda: (torch.randn(7, 3, 5),), rules=[(nn.LSTM, {"hidden": {}, "cell": {}})], narrow=True)
class ProjectedLSTM(nn.Module):
    """Stacked, with a projection of the hidden state, as in speech recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, proj_size=4)
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.head(y), h, c


@SEQUENCES.add(lambda: (text(8),))
class CharRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.rnn = nn.RNN(6, 8, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


@SEQUENCES.add(lambda: (torch.randn(4, 6),), rules=[("cell", {"hidden": {}})])
class GRUCellDecoder(nn.Module):
    """Each output is the next step's input."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.head = nn.Linear(6, 8), nn.GRUCell(3, 8), nn.Linear(8, 3)

    def forward(self, context):
        h, y, found = self.start(context).tanh(), context.new_zeros(len(context), 3), []
        for _ in range(4):
            h = self.cell(y, h)
            y = self.head(h)
            found.append(y)
        return torch.stack(found, 1)


@SEQUENCES.add(lambda: (text(), text(5)))
class AttentionSeq2Seq(nn.Module):
    """An LSTM reads the source; an LSTMCell writes the target and looks at all states of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 6), nn.Embedding(WORDS, 6)
        self.encoder, self.decoder = nn.LSTM(6, 8, batch_first=True), nn.LSTMCell(14, 8)
        self.query, self.head = nn.Linear(8, 8, bias=False), nn.Linear(16, WORDS)

    def forward(self, source, target):
        memory, (h, c) = self.encoder(self.source(source))
        h, c, found = h[0], c[0], []
        context = torch.zeros_like(h)
        for word in self.target(target).unbind(1):
            h, c = self.decoder(torch.cat([word, context], 1), (h, c))
            scores = (memory @ self.query(h)[:, :, None]).softmax(1)
            context = (scores * memory).sum(1)
            found.append(self.head(torch.cat([h, context], 1)))
        return torch.stack(found, 1)


@SEQUENCES.add(lambda: (torch.randn(3, 1, 8, 16),))
class CRNN(nn.Module):
    """Reads text in images: columns of features are the steps of a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.lstm, self.head = nn.LSTM(16, 6, bidirectional=True), nn.Linear(12, 7)

    def forward(self, x):
        columns = self.conv(x).flatten(1, 2).permute(2, 0, 1)
        return self.head(self.lstm(columns)[0]).log_softmax(-1)


@SEQUENCES.add(lambda: (torch.randn(2, 3, 12), torch.tensor([12, 7])))
class DeepSpeech(nn.Module):
    """Convolutions over time, then a packed GRU whose output is padded again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.gru, self.head = nn.GRU(6, 8, bidirectional=True), nn.Linear(8, 5)

    def forward(self, x, lengths):
        x = F.hardtanh(self.norm(self.conv(x)), 0, 20).permute(2, 0, 1)
        y, _ = pad_packed_sequence(self.gru(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
        return self.head(y.unflatten(2, (2, 8)).sum(2))
