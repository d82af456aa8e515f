"""Which tokens to keep: beam search with transformers' scores and stopping rules, and sampling."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EarlyStopping = bool | Literal["never"]
LOW = -1.0e9  # the score of what must not be chosen; finite, as in transformers


@dataclass(frozen=True)
class Rules:
    """Settings of a search.

    Attributes:
        hypotheses: K, beams of a question (or samples, with `do_sample`).
        stop_ids: tokens that end an answer.
        min_new_tokens: no stop token before so many.
    """

    hypotheses: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: EarlyStopping
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    groups: int = 1
    diversity_penalty: float = 0.0


class Hypotheses:
    """Running and finished hypotheses of all questions in flight; slots as in `PrefixCache`.

    Everything lies on the device, and `advance` never waits for it.

    Shapes:
        S slots, K hypotheses, T most tokens.
    """

    def __init__(self, slots: int, rules: Rules, device: torch.device) -> None:
        self.rules = rules
        self.device = device
        self.stops = torch.tensor(rules.stop_ids, dtype=torch.int64, device=device)
        shape = (slots, rules.hypotheses)
        whole, real = torch.int64, torch.float32  # whatever torch's default is set to
        self.length = torch.zeros(slots, dtype=whole, device=device)
        self.tokens = torch.zeros(*shape, rules.max_new_tokens, dtype=whole, device=device)
        self.log_probs = torch.zeros(*shape, rules.max_new_tokens, dtype=real, device=device)
        self.scores = torch.zeros(shape, dtype=real, device=device)
        self.done_tokens = torch.zeros_like(self.tokens)
        self.done_log_probs = torch.zeros_like(self.log_probs)
        self.done_scores = torch.zeros_like(self.scores)
        self.done_length = torch.zeros(shape, dtype=whole, device=device)
        self.finished = torch.zeros(shape, dtype=torch.bool, device=device)

    def _state(self) -> tuple[Tensor, ...]:
        """All that belongs to slots."""
        return (
            self.length,
            self.tokens,
            self.log_probs,
            self.scores,
            self.done_tokens,
            self.done_log_probs,
            self.done_scores,
            self.done_length,
            self.finished,
        )

    def admit(self, slot: int) -> None:
        """Start a question: only the first hypothesis counts, so that all K differ after a step."""
        self.length[slot] = 0
        self.scores[slot] = 0.0 if self.rules.do_sample else LOW
        if not self.rules.do_sample:
            self.scores[slot, :: self.rules.hypotheses // self.rules.groups] = 0.0
        self.done_scores[slot] = LOW
        self.done_length[slot] = 0
        self.finished[slot] = False

    def move(self, source: int, target: int) -> None:
        """Let a slot take another's place."""
        for tensor in self._state():
            tensor[target] = tensor[source]

    def advance(
        self, log_probs: Tensor, generators: list[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one token for every hypothesis.

        Args:
            log_probs: float32 [S, K, V] of the next token; at a question's first step all rows
                are those of its prompt.
            generators: one a slot, for sampling.

        Returns:
            parents int64 [S, K] and tokens int64 [S, K] of the running hypotheses, and which
            questions are over, bool [S].
        """
        slots = log_probs.shape[0]
        if self.rules.min_new_tokens and self.rules.stop_ids:
            early = self.length[:slots] < self.rules.min_new_tokens
            log_probs = log_probs.clone()
            kept = log_probs[..., self.stops]
            log_probs[..., self.stops] = kept.masked_fill(early[:, None, None], float("-inf"))
        if self.rules.do_sample:
            assert generators is not None
            return self._sample(log_probs, generators)
        if self.rules.hypotheses == 1:
            return self._greedy(log_probs)
        return self._beam(log_probs)

    def _hits(self, tokens: Tensor, slots: int) -> Tensor:
        """Which of tokens [S, n] end their hypothesis: a stop token, or no room for more."""
        stop: Tensor = (tokens[..., None] == self.stops).any(dim=-1)
        return stop | (self.length[:slots, None] + 1 >= self.rules.max_new_tokens)

    def _beam(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slots, beams, vocabulary = log_probs.shape
        size = beams // self.rules.groups
        parents, tokens, over = [], [], []
        chosen = log_probs.new_zeros(slots, vocabulary)  # how often earlier groups took each token
        for group in range(self.rules.groups):
            part = slice(group * size, (group + 1) * size)
            found = self._group(log_probs[:, part], part, chosen)
            parents.append(found[0] + part.start)
            tokens.append(found[1])
            over.append(found[2])
            chosen.scatter_add_(1, found[1], torch.ones_like(found[1], dtype=torch.float32))
        order = torch.cat(parents, dim=1)
        self._take(order, torch.cat(tokens, dim=1), log_probs)
        return order, torch.cat(tokens, dim=1), torch.stack(over).all(dim=0)

    def _group(
        self, log_probs: Tensor, part: slice, chosen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a group of beams: transformers' rules, see `GenerationMixin._beam_search`."""
        slots, beams, vocabulary = log_probs.shape
        rules = self.rules
        running = self.scores[:slots, part]
        total = log_probs + running[:, :, None]
        ranked = total
        if rules.diversity_penalty:
            ranked = total - rules.diversity_penalty * chosen[:, None, :]
        keep = min(max(2, 1 + len(rules.stop_ids)) * beams, beams * vocabulary)
        _, index = torch.topk(ranked.flatten(1), keep)  # [S, keep]
        best = total.flatten(1).gather(1, index)
        parents, tokens = index // vocabulary, index % vocabulary
        hits = self._hits(tokens, slots)

        ranks = ranked.flatten(1).gather(1, index) + hits * LOW
        going = torch.topk(ranks, beams).indices  # [S, beams]
        next_scores = (best + hits * LOW).gather(1, going)

        new_length = self.length[:slots] + 1
        ended = hits & (
            torch.arange(keep, device=self.device) < beams
        )  # others are only there to keep beams running
        ended &= self._open(slots, part)[:, None]
        if rules.early_stopping is True:
            ended &= ~self.finished[:slots, part].all(dim=1, keepdim=True)
        scores = best / new_length[:, None].float() ** rules.length_penalty
        self._finish(part, parents, tokens, scores.masked_fill(~ended, LOW), ended, log_probs)

        self.scores[:slots, part] = next_scores
        over = ~self._improvable(slots, part, new_length)
        over |= hits.all(dim=1)
        if rules.early_stopping is True:
            over |= self.finished[:slots, part].all(dim=1)
        return parents.gather(1, going), tokens.gather(1, going), over

    def _open(self, slots: int, part: slice) -> Tensor:
        """Groups that could still improve before this step; a closed one takes nothing more."""
        started: Tensor = self.length[:slots] > 0
        return ~started | self._improvable(slots, part, self.length[:slots])

    def _improvable(self, slots: int, part: slice, length: Tensor) -> Tensor:
        """Could a running beam still beat the worst finished one? transformers' estimate."""
        rules = self.rules
        if rules.early_stopping == "never" and rules.length_penalty > 0:
            length = torch.full_like(length, rules.max_new_tokens)
        best = self.scores[:slots, part.start] / length.clamp(min=1).float() ** rules.length_penalty
        worst = self.done_scores[:slots, part].min(dim=1).values
        finished = self.finished[:slots, part]
        return (best[:, None] > torch.where(finished, worst[:, None], LOW)).any(dim=1)

    def _finish(
        self,
        part: slice,
        parents: Tensor,
        tokens: Tensor,
        scores: Tensor,
        ended: Tensor,
        log_probs: Tensor,
    ) -> None:
        """Merge what ended at this step with what had ended before; the best K of a group stay."""
        slots, beams = scores.shape[0], part.stop - part.start
        if self.device.type == "cpu" and not bool(ended.any()):
            return  # elsewhere to ask would be to wait
        merged = torch.cat([self.done_scores[:slots, part], scores], dim=1)
        best = torch.topk(merged, beams).indices
        rows = torch.arange(slots, device=self.device)[:, None]
        own = parents + part.start
        history = self.tokens[:slots][rows, own]  # [S, keep, T]
        chances = self.log_probs[:slots][rows, own]
        at = self.length[:slots, None, None].expand(-1, tokens.shape[1], 1)
        history = history.scatter(2, at, tokens[:, :, None])
        chances = chances.scatter(2, at, log_probs[rows, parents, tokens][:, :, None])
        lengths = (self.length[:slots, None] + 1).expand_as(tokens)
        for name, new in (
            ("done_tokens", history),
            ("done_log_probs", chances),
            ("done_length", lengths),
            ("finished", ended),
        ):
            old = getattr(self, name)
            everything = torch.cat([old[:slots, part], new], dim=1)
            old[:slots, part] = everything[rows, best]
        self.done_scores[:slots, part] = merged.gather(1, best)

    def _take(self, parents: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Append tokens to the histories of their parents."""
        slots = parents.shape[0]
        rows = torch.arange(slots, device=self.device)[:, None]
        at = self.length[:slots, None, None].expand(-1, parents.shape[1], 1)
        chances = log_probs[rows, parents, tokens]
        for store, new in ((self.tokens, tokens), (self.log_probs, chances)):
            store[:slots] = store[:slots][rows, parents].scatter(2, at, new[:, :, None])
        self.length[:slots] += 1

    def _greedy(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = log_probs.argmax(dim=-1)  # [S, 1]
        return self._independent(log_probs, tokens)

    def _sample(
        self, log_probs: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        chances = torch.softmax(log_probs / self.rules.temperature, dim=-1)
        # a draw from NaN would end the search of all; the score is NaN still, so it is left out
        chances = chances.nan_to_num(nan=1.0)
        if self.rules.top_p < 1:
            ordered, index = chances.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.masked_fill(before >= self.rules.top_p, 0.0)
            chances = torch.zeros_like(chances).scatter(-1, index, ordered)
        drawn = [
            torch.multinomial(row, 1, generator=generator).squeeze(1)
            for row, generator in zip(chances, generators, strict=True)
        ]
        return self._independent(log_probs, torch.stack(drawn))

    def _independent(self, log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every hypothesis goes its own way and stops by itself."""
        slots, hypotheses = tokens.shape
        parents = torch.arange(hypotheses, device=self.device).expand(slots, -1)
        chances = log_probs.gather(2, tokens[:, :, None]).squeeze(2)
        self.scores[:slots] += chances
        hits = self._hits(tokens, slots)
        self._take(parents, tokens, log_probs)
        new = hits & ~self.finished[:slots]
        length = self.length[:slots, None].expand(-1, hypotheses)
        score = self.scores[:slots] / length.float() ** self.rules.length_penalty
        for store, value in (
            (self.done_tokens, self.tokens),
            (self.done_log_probs, self.log_probs),
        ):
            store[:slots] = torch.where(new[:, :, None], value[:slots], store[:slots])
        self.done_scores[:slots] = torch.where(new, score, self.done_scores[:slots])
        self.done_length[:slots] = torch.where(new, length, self.done_length[:slots])
        self.finished[:slots] |= hits
        return parents, tokens, self.finished[:slots].all(dim=1)

    def best(self, slot: int, count: int) -> list[tuple[list[int], list[float], float]]:
        """The best finished hypotheses: tokens, log-probabilities, score; none that is NaN."""
        order = torch.sort(self.done_scores[slot], descending=True, stable=True).indices
        out = []
        for index in order.tolist():
            length = int(self.done_length[slot, index])
            score = float(self.done_scores[slot, index])
            if self.finished[slot, index] and math.isfinite(score):
                tokens = self.done_tokens[slot, index, :length].tolist()
                chances = self.done_log_probs[slot, index, :length].tolist()
                out.append((tokens, chances, score))
        return out[:count]
