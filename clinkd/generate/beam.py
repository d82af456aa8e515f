"""Batched beam search in which a question's prompt is encoded and stored once."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clinkd.generate.cache import ATTENTION, PrefixCache
from clinkd.generate.hypotheses import EarlyStopping, Hypotheses, Rules
from clinkd.generate.inputs import Inputs, encode_request, reason, stop_tokens
from clinkd.generate.results import Candidate, Result
from clinkd.models.layout import cache_name

# most tokens encoded together, on the CPU (long prompts one at a time: no padding, no mask) and on
# a GPU (to bound memory)
PREFILL_TOKENS = (1024, 16384)


class BeamSearcher:
    """Answers questions about images with the n best of k beams.

    Scores and stopping are those of transformers' `generate(num_beams=k, num_return_sequences=n,
    do_sample=False)`. Finished questions leave the batch and the next ones enter at once.

    Args:
        model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with or without `clinkd.models.apply`.
        processor: its processor; None where requests come tokenised.
        num_beams: 1–16; 1 is greedy.
        num_samples: candidates returned of each question, at most `num_beams`.
        length_penalty: scores are sums of log-probabilities over length to this power.
        early_stopping: as in transformers: False, True or "never".
        min_new_tokens: no stop token before so many tokens.
        stop_ids: tokens that end an answer; default: the model's own.
        stop_texts: more of them by their text, each one token of the processor's tokenizer.
        num_beam_groups: diverse groups; `diversity_penalty` is taken from a token's score for each
            time that an earlier group chose it at this step (Vijayakumar et al. 2016).
        do_sample: `num_samples` independent samples at `temperature` and `top_p` instead of beams.
        batch_size: questions in flight.
        seed: of the samples; each question has its own stream of random numbers.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        num_beams: int = 3,
        num_samples: int = 3,
        max_new_tokens: int = 80,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        *,
        min_new_tokens: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop_texts: Sequence[str] = (),
        num_beam_groups: int = 1,
        diversity_penalty: float = 0.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        for name, value, most in (
            ("num_beams", num_beams, 16),
            ("num_samples", num_samples, 16 if do_sample else num_beams),
            ("max_new_tokens", max_new_tokens, 1 << 20),
            ("batch_size", batch_size, 1 << 20),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")
        if num_beam_groups < 1 or num_beams % num_beam_groups:
            raise ValueError(
                f"num_beam_groups must divide num_beams = {num_beams}, got {num_beam_groups}"
            )
        if early_stopping not in (False, True, "never"):
            raise ValueError(
                f"early_stopping must be False, True or 'never', got {early_stopping!r}"
            )
        if not temperature > 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}"
            )
        # an adapter of PEFT sits inside the layers: the model it wraps answers with it
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.text = model.config.get_text_config()
        self.rules = Rules(
            hypotheses=num_samples if do_sample else num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_ids=stop_tokens(model, processor, stop_ids, stop_texts),
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            groups=num_beam_groups,
            diversity_penalty=diversity_penalty,
        )

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Mapping[str, Any]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """Answer requests, in their order.

        Args:
            requests: `{"id", "image" | "images" | none, "question"}`, images as PIL images, and
                if wanted `history`, questions and answers that came before, in turn, and `system`,
                the message before all; or `{"id", "input_ids", ...}` with what a processor returns.
                A request that cannot be answered gets a result with `error`; the others go on.
            progress: called with the number of requests answered so far.
        """
        found: dict[int, Result] = {}
        waiting: deque[tuple[int, Inputs]] = deque()
        model, processor, most = self.model, self.processor, self.rules.max_new_tokens
        for index, request in enumerate(requests):
            try:
                waiting.append((index, encode_request(request, model, processor, most)))
            except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
                found[index] = Result(str(request.get("id", index)), error=reason(error))
        # similar lengths side by side: less padding in a prefill
        waiting = deque(sorted(waiting, key=lambda item: -item[1]["input_ids"].shape[1]))
        was_training = self.model.training
        self.model.eval()
        try:
            for index, candidates in self._search(waiting):
                missing = "no candidate: the model's scores are not finite"
                name = str(requests[index].get("id", index))
                found[index] = Result(name, candidates, None if candidates else missing)
                if progress is not None:
                    progress(len(found))
        finally:
            self.model.train(was_training)
            self.model.model.rope_deltas = None  # of no use to anybody else's batch
        return [found[index] for index in range(len(requests))]

    def _search(self, waiting: deque[tuple[int, Inputs]]) -> Iterator[tuple[int, list[Candidate]]]:
        """Answer encoded requests; each yields its index and candidates when it is finished."""
        if not waiting:
            return
        device = self.model.device
        slots = min(self.batch_size, len(waiting))
        longest = max(inputs["input_ids"].shape[1] for _, inputs in waiting)
        hypotheses = Hypotheses(slots, self.rules, device)
        cache = PrefixCache(
            slots, self.rules.hypotheses, longest, self.rules.max_new_tokens, device
        )
        owners: list[int] = []  # request of each slot in use
        generators: list[torch.Generator] = []
        start = torch.zeros(slots, dtype=torch.float32, device=device)  # first new position
        free = list(range(slots))
        logits = torch.zeros(0)
        while owners or waiting:
            fresh = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if fresh:
                prompts = {slot: inputs for slot, (_, inputs) in fresh.items()}
                new = torch.cat([self._prefill(p, cache, start) for p in self._parts(prompts)])
                for slot, (index, _) in fresh.items():
                    hypotheses.admit(slot)
                    generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + index)
                    owners[slot : slot + 1] = [index]  # in the place of a finished one, or behind
                    generators[slot : slot + 1] = [generator]
                logits = _put_rows(logits, new, list(fresh))
            log_probs = torch.log_softmax(logits.float(), dim=-1)
            parents, tokens, over = hypotheses.advance(log_probs, generators)
            # the one place where the host waits for the device
            free = over.nonzero().squeeze(1).tolist()
            for slot in free:
                yield owners[slot], self._candidates(hypotheses, slot)
            for slot in reversed(free[len(waiting) :]):  # nobody is left to take these
                last = len(owners) - 1
                cache.move(last, slot)
                hypotheses.move(last, slot)
                for values in (start, parents, tokens):
                    values[slot] = values[last]
                owners[slot], generators[slot] = owners[last], generators[last]
                owners.pop()
                generators.pop()
            free = free[: len(waiting)]
            count = len(owners)
            logits = logits[:count]
            if len(free) < count:
                logits = self._step(cache, parents[:count], tokens[:count], start[:count])

    def _parts(self, prompts: dict[int, Inputs]) -> Iterator[dict[int, Inputs]]:
        """Cut prompts into groups that are encoded together."""
        most = PREFILL_TOKENS[self.model.device.type == "cuda"]
        part: dict[int, Inputs] = {}
        longest = 0
        for slot, inputs in prompts.items():
            longest = max(longest, inputs["input_ids"].shape[1])
            if part and longest * (len(part) + 1) > most:
                yield part
                part, longest = {}, inputs["input_ids"].shape[1]
            part[slot] = inputs
        yield part

    def _prefill(self, prompts: dict[int, Inputs], cache: PrefixCache, start: Tensor) -> Tensor:
        """Encode new prompts into slots; logits of their next token [n, K, V]."""
        core = self.model.model
        slots, inputs = list(prompts), list(prompts.values())
        lengths = [each["input_ids"].shape[1] for each in inputs]
        batch: dict[str, Any] = {
            name: torch.nn.utils.rnn.pad_sequence(
                [each[name][0] for each in inputs], batch_first=True
            )
            for name in ("input_ids", "mm_token_type_ids")
        }
        ends = torch.tensor(lengths, device=self.model.device)
        batch["attention_mask"] = (
            torch.arange(max(lengths), device=self.model.device) < ends[:, None]
        ).long()
        for name in ("pixel_values", "image_grid_thw"):
            parts = [each[name] for each in inputs if name in each]
            if parts:
                batch[name] = torch.cat(parts)
        core.rope_deltas = None  # of an earlier batch
        past = DynamicCache(config=self.text)
        batch[cache_name(core)] = past
        hidden = core(**batch, use_cache=True).last_hidden_state
        deltas = core.rope_deltas
        for row, length in enumerate(lengths):
            cache.admit(
                slots[row],
                [layer.keys[row, :, :length] for layer in past.layers],
                [layer.values[row, :, :length] for layer in past.layers],
            )
            start[slots[row]] = length + (0.0 if deltas is None else float(deltas[row]))
        rows = torch.arange(len(inputs), device=hidden.device)
        logits = self._logits(hidden[rows, ends - 1])  # [n, V]
        return logits[:, None].repeat(1, self.rules.hypotheses, 1)

    def _step(self, cache: PrefixCache, parents: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
        """Feed one token of every hypothesis; logits of the next [S, K, V]."""
        count, hypotheses = parents.shape
        core = self.model.model
        position = start + cache.step[:count]
        cache.begin_step(parents)
        position = position[:, None].expand(-1, hypotheses).reshape(1, -1, 1).expand(3, -1, -1)
        embeds = core.get_input_embeddings()(tokens.reshape(-1, 1))
        before = core.language_model.config._attn_implementation
        core.language_model.config._attn_implementation = ATTENTION
        try:
            hidden = core.language_model(
                inputs_embeds=embeds,
                position_ids=position,
                attention_mask={"full_attention": None, "sliding_attention": None},
                use_cache=True,
                prefix_cache=cache,
                **{cache_name(core.language_model): cache},
            ).last_hidden_state
        finally:
            core.language_model.config._attn_implementation = before
        return self._logits(hidden[:, -1]).reshape(count, hypotheses, -1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        if self.processor is not None:  # rows that pad the head to a round size are no tokens
            logits[..., len(self.processor.tokenizer) :] = -torch.inf
        return logits

    def _candidates(self, hypotheses: Hypotheses, slot: int) -> list[Candidate]:
        out = []
        for tokens, log_probs, score in hypotheses.best(slot, self.num_samples):
            kept = [t for t in tokens if t not in self.rules.stop_ids]
            text = "" if self.processor is None else _decode(self.processor, kept)
            out.append(Candidate(text, tokens, log_probs, score))
        return out


def _decode(processor: Any, tokens: list[int]) -> str:
    """The text of tokens; special ones stay, since boxes are written with them."""
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=False)).strip()


def _put_rows(logits: Tensor, new: Tensor, slots: list[int]) -> Tensor:
    """Logits [S, K, V] with new rows in these slots, those past the end appended."""
    held = sum(slot < len(logits) for slot in slots)
    for row, slot in enumerate(slots[:held]):
        logits[slot] = new[row]
    return torch.cat([logits, new[held:]]) if len(logits) else new
