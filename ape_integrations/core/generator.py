"""APEGenerator: looks states up, encodes what is missing, combines, generates."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ape_integrations.core.adaptation import adapted
from ape_integrations.core.batching import Request, SharedBatches, arrive
from ape_integrations.core.break_even import BreakEven, Plan
from ape_integrations.core.cache import APECache, ContextLayout
from ape_integrations.core.chat import template_special_tokens, turn_markers
from ape_integrations.core.config import APEConfig
from ape_integrations.core.context_sets import ContextSet, ContextSetPool, Layers
from ape_integrations.core.decoding import ContextDrafts, decode
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.fingerprint import ModelFingerprint
from ape_integrations.core.generation import (
    GenerationResult,
    GenerationStream,
    Row,
    RowSamplers,
    TextAssembler,
    TokenSink,
)
from ape_integrations.core.loading import clear_loading_errors, loading_lock, place_of
from ape_integrations.core.model import (
    attach,
    check_supported,
    embeddings,
    is_training,
    keep_attached,
    unchanged_on_failure,
    unwrapped,
)
from ape_integrations.core.modes import computing, uncompiled
from ape_integrations.core.prepared import PreparedPrompt, PromptPreparer
from ape_integrations.core.products import fast_products, prepare_linears
from ape_integrations.core.prompt import PromptParts, PromptSplitter
from ape_integrations.core.recompute import SequenceArranger
from ape_integrations.core.registry import ContextRegistry
from ape_integrations.core.selection import attention_mass, best
from ape_integrations.core.self_check import self_check, sequence_check
from ape_integrations.core.settings import GenerationSettings
from ape_integrations.core.state_source import KEPT_PREFIXES, Figures, StateSource
from ape_integrations.core.tails import TailMemory
from ape_integrations.core.threads import PassingExecutor
from ape_integrations.core.tokens import Tokens
from ape_integrations.errors import ConfigError, ContextWindowError, UnsupportedModelError
from ape_integrations.store import KVStore, open_store
from ape_integrations.store.sizes import parse_size


class APEGenerator:
    """Generates behind contexts whose KV states come from a store (arXiv 2502.05431).

    Safe for use from many threads at once.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model with a language modelling head; one whose ``compile()`` was called
        runs compiled.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    store : KVStore, str, Path or None
        Where states are kept. A path is the directory of an on-disk store; None is the default
        directory in the user's cache.
    config : APEConfig, optional
        T, S and the limits of encoding.
    context_set_bytes : int or str
        Memory for assembled context sets that no generation is using at the moment: bytes, or a
        size such as ``"500MB"``; 0 keeps none.
    tail_bytes : int or str
        Memory for the states of questions and answers behind a context set, which a chat's next
        turn starts from.
    batch_bytes : int or str
        Memory for the states behind the contexts where questions over one context set, asked at
        the same time, are answered together.

    Raises
    ------
    UnsupportedModelError
        APE cannot serve the model; raised before any work.
    ConfigError
        A size is none.
    StoreError
        The store cannot be opened.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: KVStore | str | Path | None = None,
        config: APEConfig | None = None,
        *,
        context_set_bytes: int | str = "2GB",
        tail_bytes: int | str = "500MB",
        batch_bytes: int | str = "1GB",
    ) -> None:
        context_set_bytes = parse_size(context_set_bytes, "context_set_bytes", least=0)
        tail_bytes = parse_size(tail_bytes, "tail_bytes", least=0)
        batch_bytes = parse_size(batch_bytes, "batch_bytes", least=0)
        model = unwrapped(model)
        check_supported(model)
        self.config = config or APEConfig()
        self._dtype = embeddings(model).dtype
        _check_dtype(model, self._dtype)
        # What a model wants to see and which logits it gives shows in code that is not compiled.
        with loading_lock, computing(), uncompiled(), unchanged_on_failure(model):
            self.model = model.eval()
            self.info = attach(model)
            self._encoder = ContextEncoder(model, self.info, self.config.max_batch_tokens)
            if self.config.self_check:
                self_check(model, self.info, self._encoder)
            self._arranger = self._make_arranger() if self.config.sequential else None
        prepare_linears(model)
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer)
        self.store = open_store(store)
        self.registry = ContextRegistry()
        self._splitter = PromptSplitter(
            self.registry,
            reorder=self.config.reorder,
            special_tokens=template_special_tokens(tokenizer),
            turn_markers=turn_markers(tokenizer),
        )
        self._preparer = PromptPreparer(self.tokens, self.config, self.info.max_positions)
        self._source = StateSource(self.store, self._encoder, self.info, ModelFingerprint(model))
        self._sets = ContextSetPool(self.info, context_set_bytes)
        self._tails = TailMemory(tail_bytes)
        self._batches = SharedBatches(self._run, self.info, batch_bytes)
        self._break_even = BreakEven()
        self._recent_prefixes: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._lock = threading.Lock()
        self._background = PassingExecutor(1, "ape-prefetch")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        store: KVStore | str | Path | None = None,
        config: APEConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        context_set_bytes: int | str = "2GB",
        tail_bytes: int | str = "500MB",
        batch_bytes: int | str = "1GB",
        **model_kwargs: Any,
    ) -> APEGenerator:
        """Load model and tokenizer with transformers.

        Parameters
        ----------
        name_or_path : str or Path
            Hub name or directory.
        store, config, context_set_bytes, tail_bytes, batch_bytes
            As for the class.
        tokenizer : PreTrainedTokenizerBase, optional
            A tokenizer to use instead of the one of that name.
        tokenizer_kwargs, **model_kwargs
            For ``AutoTokenizer.from_pretrained`` and ``AutoModelForCausalLM.from_pretrained``
            (``dtype``, ``device_map``, ``revision``, ...). Where files come from (``revision``,
            ``token``, ``trust_remote_code``, ``gguf_file``, ...) holds for both.

        Raises
        ------
        ConfigError
            There is no such model.
        UnsupportedModelError
            The model is no causal language model, or APE cannot serve it.
        """
        name = str(name_or_path)
        with loading_lock, clear_loading_errors(name):
            model = _load_model(name, model_kwargs)
            if tokenizer is None:
                kwargs = {**place_of(model_kwargs), **(tokenizer_kwargs or {})}
                tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        return cls(
            model,
            tokenizer,
            store=store,
            config=config,
            context_set_bytes=context_set_bytes,
            tail_bytes=tail_bytes,
            batch_bytes=batch_bytes,
        )

    def _make_arranger(self) -> SequenceArranger:
        arranger = SequenceArranger(
            self.model, self.info, self._encoder, self.config.max_batch_tokens
        )
        if self.config.self_check:
            sequence_check(self.model, self.info, self._encoder, arranger)
        return arranger

    # Prompts ------------------------------------------------------------------------------------

    def split(self, prompt: str) -> PromptParts:
        """Split a rendered prompt into prefix, registered contexts and query.

        A prompt that ends with a context has no query that could read it, and stays whole.
        """
        parts = self._splitter.split(prompt)
        return parts if parts.query or not parts.contexts else PromptParts("", (), prompt)

    def prepare(self, prefix: str, contexts: Sequence[str], query: str) -> PreparedPrompt:
        """Tokenise each part of a prompt alone, arguments as for :meth:`generate`.

        Raises
        ------
        ConfigError
            A context is empty, or the query, or without contexts the whole prompt.
        """
        return self._prepare(prefix, contexts, [query])[0]

    def _prepare(
        self, prefix: str, contexts: Sequence[str], queries: Sequence[str]
    ) -> list[PreparedPrompt]:
        """Tokenise prompts over the same contexts; leave out those with low retrieval scores."""
        kept, limit = contexts, self.config.max_contexts
        if limit is not None and not isinstance(contexts, str) and len(contexts) > limit:
            scores = self.registry.scores(contexts, "\n".join(queries))
            if scores is not None:
                kept = [contexts[index] for index in best(scores, limit)]
        dropped = len(contexts) - len(kept)
        prompts = (self._preparer.prepare(prefix, kept, query) for query in queries)
        return [replace(prompt, dropped=dropped) for prompt in prompts]

    # States -------------------------------------------------------------------------------------

    @contextmanager
    def assemble(
        self,
        prompt: PreparedPrompt,
        figures: Figures | None = None,
        padding: Sequence[int] = (),
    ) -> Iterator[APECache]:
        """Yield a cache that holds prefix and contexts, for ``model.generate()`` or ``forward()``.

        No gradients are recorded until the exit.

        Parameters
        ----------
        prompt : PreparedPrompt
            From :meth:`prepare`, with at least one context.
        figures : Figures, optional
            Where hits, misses, bytes and seconds are added.
        padding : sequence of int
            For a batch of queries of unequal length: padding tokens to the left of each.

        Yields
        ------
        APECache
            Its memory is lent until the exit; do not keep it longer.

        Raises
        ------
        ConfigError
            The model computes in another dtype than when the generator was made.
        """
        self._check_model()
        figures = figures or Figures()
        self._note_prefix(prompt.prefix)
        with computing():
            prefix = self._source.prefix(prompt.prefix, figures)
        keys, contexts = self._ordered(prompt)
        lengths = tuple(map(len, contexts))
        layout = prompt.layout
        if not prompt.sequential and len(contexts) > 1:
            layout = ContextLayout(len(prompt.prefix), lengths)  # in the buffer's order
        temperature, scale = adapted(self.config, lengths)
        name = (self._kind_of_set(prompt), *keys)

        def fill(target: ContextSet) -> None:
            self._source.fill(prompt.prefix, contexts, keys, target, figures)

        def arrange(layers: Layers) -> None:
            began = time.perf_counter()
            assert self._arranger is not None
            self._arranger.arrange(prefix, contexts, layers, self.config.recompute_ratio)
            figures.recompute += time.perf_counter() - began

        finish = arrange if prompt.sequential else None
        borrowed = self._sets.borrow(name, sum(lengths), fill, finish)
        with computing(), borrowed as (context_set, ready):
            if ready:
                figures.hits += len(contexts)
            layers = context_set.layers
            if layout.total < sum(lengths):
                layers = [(k[:, : layout.total], v[:, : layout.total]) for k, v in layers]
            yield APECache(
                layout,
                prefix,
                layers,
                temperature,
                scale,
                padding=padding,
                # What was read behind the contexts depends on T and S.
                name=(*name, repr((temperature, scale))),
                arrivals=context_set.arrivals,
            )

    def _check_model(self) -> None:
        """Refuse a model that computes other states now than it would as it was attached.

        Raises
        ------
        ConfigError
            It was cast, an autocast block is open, or it is in training mode.
        """
        _check_dtype(self.model, self._dtype)
        if is_training(self.model):
            raise ConfigError(
                "The model is in training mode, and its dropout would be stored with the states. "
                "Call model.eval() first."
            )
        keep_attached(self.model)

    def _ordered(self, prompt: PreparedPrompt) -> tuple[list[str], list[list[int]]]:
        """Return store keys and token ids of a prompt's contexts, in the order of their buffer."""
        keys = self._source.keys(prompt.prefix, prompt.contexts)
        if prompt.sequential:
            return keys, prompt.contexts
        # Attention does not see the order of contexts, so equal sets are one set.
        keyed = dict(zip(keys, prompt.contexts, strict=True))
        keys = sorted(keyed)
        return keys, [keyed[key] for key in keys]

    def _kind_of_set(self, prompt: PreparedPrompt) -> str:
        """Return what, besides its entries, makes an assembled set what it is."""
        return f"recomputed {self.config.recompute_ratio}" if prompt.sequential else "shared"

    def _selected(
        self,
        prompt: PreparedPrompt,
        queries: Sequence[Sequence[int]],
        new_tokens: int,
        figures: Figures,
    ) -> PreparedPrompt:
        """Keep the contexts that queries pay the most attention to, where there are too many."""
        limit = self.config.max_contexts
        if limit is None or len(prompt.contexts) <= limit or self.config.prefill == "plain":
            return prompt
        began = time.perf_counter()
        shared = replace(prompt, sequential=False)
        with self.assemble(shared, figures) as cache:
            mass = attention_mass(self.model, self.info, cache, queries)
        figures.select = time.perf_counter() - began
        by_ids = dict(zip(map(tuple, self._ordered(shared)[1]), mass, strict=True))
        scores = [by_ids[tuple(ids)] for ids in prompt.contexts]
        kept = [prompt.contexts[index] for index in best(scores, limit)]
        dropped = prompt.dropped + len(prompt.contexts) - limit
        return self._preparer.fit(replace(prompt, contexts=kept, dropped=dropped), new_tokens)

    def _note_prefix(self, ids: list[int]) -> None:
        """Remember the prefix, so that texts can be prefetched behind it."""
        with self._lock:
            self._recent_prefixes[tuple(ids)] = None
            self._recent_prefixes.move_to_end(tuple(ids))
            while len(self._recent_prefixes) > KEPT_PREFIXES:
                self._recent_prefixes.popitem(last=False)

    @computing()
    def warm(
        self, prefix: str, contexts: Sequence[str], show_progress: bool = True
    ) -> dict[str, int]:
        """Encode and store contexts ahead of time.

        Parameters
        ----------
        prefix : str
            The prefix that prompts will have, up to their first context.
        contexts : sequence of str
            Texts as prompts will contain them.
        show_progress : bool
            Show a progress bar.

        Returns
        -------
        dict
            ``contexts``, ``hits`` (stored already) and ``misses`` (encoded now). Texts that exceed
            the model's positions are left out with a warning: a prompt would cut them elsewhere.
        """
        self._check_model()
        figures = Figures()
        prefix_ids = self._preparer.prefix_ids(prefix)
        ids = self._preparer.within_window(prefix_ids, self._preparer.context_ids(contexts))
        self._source.ensure(prefix_ids, ids, figures, show_progress)
        self.store.flush()
        return {"contexts": len(ids), "hits": figures.hits, "misses": figures.misses}

    def prefetch(
        self, texts: Iterable[str], prefix: str | None = None, *, encode: bool = True
    ) -> None:
        """Load or encode texts in the background.

        Returns at once. A failure shows in the request that needs the states, not here; after
        :meth:`close` nothing is fetched.

        Parameters
        ----------
        texts : iterable of str
            Texts as the prompt will contain them.
        prefix : str, optional
            The prefix that the prompt will have; None is the one used last.
        encode : bool
            Whether to encode what the store lacks. Without, nothing is wasted on a wrong prefix.
        """
        contexts = [text for text in texts if text.strip()]
        with self._lock:
            prefixes = list(reversed(self._recent_prefixes))
        if contexts and (prefixes or prefix is not None):
            ids = list(prefixes[0]) if prefix is None else self._preparer.prefix_ids(prefix)
            with suppress(RuntimeError):
                self._background.submit(self._prefetch, ids, contexts, encode)

    def _prefetch(self, prefix_ids: Sequence[int], contexts: Sequence[str], encode: bool) -> None:
        ids = self._preparer.context_ids(contexts)
        self._source.promote(prefix_ids, ids)
        if encode and not is_training(self.model):
            ids = self._preparer.within_window(prefix_ids, ids, warn=False)
            self._source.ensure(prefix_ids, ids, Figures(), show_progress=False)

    # Generation ---------------------------------------------------------------------------------

    def generate(
        self, prefix: str, contexts: Sequence[str], query: str, **generation_kwargs: Any
    ) -> GenerationResult:
        """Generate behind a prefix, contexts in any order, and a query.

        Parameters
        ----------
        prefix : str
            Shared prefix; an empty one becomes the config's default prefix.
        contexts : sequence of str
            Retrieved texts. Without any this is an ordinary generation.
        query : str
            Everything behind the contexts.
        **generation_kwargs
            As for ``model.generate()``, and ``stop`` (strings to stop before) and ``seed``
            (sampling with a random generator of its own).

        Raises
        ------
        ConfigError
            Empty query or context, or an argument that cannot be combined with APE.
        ContextWindowError
            The prompt does not fit the model.
        """
        return self.generate_ids(self.prepare(prefix, contexts, query), **generation_kwargs)

    def stream(
        self, prefix: str, contexts: Sequence[str], query: str, **generation_kwargs: Any
    ) -> GenerationStream:
        """Generate piece by piece; arguments as for :meth:`generate`.

        Returns
        -------
        GenerationStream
            Iterator over pieces of text; its ``result`` is known after the last one. Closing it
            stops the generation.
        """
        return self._stream(self.prepare(prefix, contexts, query), generation_kwargs)

    def generate_prompt(self, prompt: str, **generation_kwargs: Any) -> GenerationResult:
        """Split a rendered prompt at its contexts; generate as for :meth:`generate`."""
        parts = self.split(prompt)
        return self.generate(parts.prefix, parts.contexts, parts.query, **generation_kwargs)

    def stream_prompt(self, prompt: str, **generation_kwargs: Any) -> GenerationStream:
        """Split a rendered prompt at its registered contexts; stream as for :meth:`stream`."""
        parts = self.split(prompt)
        return self.stream(parts.prefix, parts.contexts, parts.query, **generation_kwargs)

    def generate_ids(self, prompt: PreparedPrompt, **generation_kwargs: Any) -> GenerationResult:
        """Generate behind token ids; otherwise like :meth:`generate`."""
        settings = self._settings(generation_kwargs)
        fitted = self._preparer.fit(prompt, settings.max_new_tokens)
        return self._batches.answer(Request(fitted, settings), self._batch_key(fitted, settings))

    def generate_batch(
        self,
        prefix: str,
        contexts: Sequence[str],
        queries: Sequence[str],
        **generation_kwargs: Any,
    ) -> list[GenerationResult]:
        """Answer several queries over one set of contexts together.

        Weights and contexts are read once for all of them at every step.

        Parameters
        ----------
        prefix, contexts, **generation_kwargs
            As for :meth:`generate`.
        queries : sequence of str
            What stands behind the contexts, one prompt each.

        Returns
        -------
        list of GenerationResult
            One per query, in order. The first one carries the batch's misses and bytes; for the
            others every context is a hit.

        Raises
        ------
        ConfigError
            No query, no context, or an argument that a batch cannot have.
        """
        if isinstance(queries, str) or not queries:
            raise ConfigError("queries must be a sequence of at least one string.")
        if not contexts:
            raise ConfigError("A batch shares its contexts, so there must be at least one.")
        prompts = self._prepare(prefix, contexts, queries)
        return self.generate_batch_ids(prompts, **generation_kwargs)

    def generate_batch_ids(
        self, prompts: Sequence[PreparedPrompt], **generation_kwargs: Any
    ) -> list[GenerationResult]:
        """Answer prompts that differ in their queries alone; see :meth:`generate_batch`."""
        if not prompts:
            raise ConfigError("A batch needs at least one prompt.")
        requests = [Request(prompt, self._settings(generation_kwargs)) for prompt in prompts]
        if not all(request.settings.single for request in requests):
            raise ConfigError("Beam search cannot be combined with a batch of queries.")
        shared = {(tuple(p.prefix), tuple(map(tuple, p.contexts))) for p in prompts}
        if len(shared) != 1:
            raise ConfigError("The prompts of a batch must share prefix and contexts.")
        return self._run(requests)

    def _batch_key(self, prompt: PreparedPrompt, settings: GenerationSettings) -> Hashable | None:
        """Return what prompts have in common that one batch can answer; None: it runs alone."""
        config = self.config
        # Where contexts have an order, or the query chooses them, sets are not alike.
        if not prompt.contexts or config.sequential or config.max_contexts is not None:
            return None
        if config.prefill == "plain":
            return None
        shared = settings.shared
        if shared is None:
            return None
        return tuple(prompt.prefix), tuple(sorted(map(tuple, prompt.contexts))), shared

    def _settings(self, kwargs: dict[str, Any]) -> GenerationSettings:
        defaults: Any = self.model.generation_config
        return GenerationSettings(kwargs, defaults, self.config.max_new_tokens)

    def _stream(self, prompt: PreparedPrompt, kwargs: dict[str, Any]) -> GenerationStream:
        request = Request(prompt, self._settings(kwargs))
        if not request.settings.single:
            raise ConfigError("Beam search cannot be streamed: use generate(), or num_beams=1.")
        arrive()  # a stream is no part of a batch

        def run(
            on_text: Callable[[str], None], on_sink: Callable[[TokenSink], None]
        ) -> GenerationResult:
            return self._run([request], on_text, on_sink)[0]

        return GenerationStream(run)

    @computing()
    @fast_products()
    def _run(
        self,
        requests: Sequence[Request],
        on_text: Callable[[str], None] | None = None,
        on_sink: Callable[[TokenSink], None] | None = None,
    ) -> list[GenerationResult]:
        """Generate for requests that differ in queries, stop strings and seeds alone."""
        settings, figures = requests[0].settings, requests[0].figures
        plain = self.config.prefill == "plain" or not requests[0].prompt.contexts
        if len(requests) > 1 and (plain or settings.alone):
            return [self._run([request])[0] for request in requests]
        queries = [request.prompt.query for request in requests]
        longest = max((request.prompt for request in requests), key=lambda p: len(p.query))
        fitted = self._preparer.fit(longest, settings.max_new_tokens)
        chosen = self._selected(fitted, queries, settings.max_new_tokens, figures)
        plan = self._plan(chosen, len(requests), settings.max_new_tokens)
        read = chosen
        if plan == "plain":
            read = chosen.flat()
            queries = [read.query]
        elif chosen is not fitted:
            # What was looked up to choose is looked up once more, and counted then.
            figures.hits -= len(chosen.contexts)
        input_ids, mask = self._padded(read, queries)
        sink, kwargs = self._sink(requests, input_ids.shape[1], on_text)
        if on_sink is not None:
            on_sink(sink)

        def generate(**cache: Any) -> Tensor:
            figures.ready = time.perf_counter()
            sequences: Any = self.model.generate(
                input_ids,
                attention_mask=mask,
                # Some models would go by what an earlier prompt with pictures has left in them.
                position_ids=(mask.cumsum(dim=-1) - 1).clamp_min(0),
                **kwargs,
                **cache,
            )
            return cast(Tensor, sequences)

        if read.contexts:
            sequences = self._behind_contexts(requests, read, queries, generate)
        else:
            sequences = generate()
        sink.finish(sequences)
        assert sink.first_token_time is not None
        if len(requests) == 1:
            self._observe(read, figures, sink.first_token_time - figures.ready)
        for request in requests:
            if request.figures is not figures:
                request.figures.share(figures, len(chosen.contexts))
            request.figures.first_token = sink.first_token_time - request.figures.start
        return [
            _result(
                row,
                replace(chosen, query=request.prompt.query),
                request.figures,
                len(requests),
                plan,
            )
            for row, request in zip(sink.rows, requests, strict=True)
        ]

    def _behind_contexts(
        self,
        requests: Sequence[Request],
        prompt: PreparedPrompt,
        queries: Sequence[Sequence[int]],
        generate: Callable[..., Tensor],
    ) -> Tensor:
        """Generate over assembled contexts, starting from and keeping the states behind them."""
        settings, figures = requests[0].settings, requests[0].figures
        longest = max(map(len, queries))
        padding = [longest - len(query) for query in queries]
        with self.assemble(prompt, figures, padding) as cache:
            drafts = self._drafts(settings, prompt, len(queries))
            if not settings.single:
                return generate(past_key_values=cache, **drafts)
            restored = self._tails.restore(cache.name, queries, cache)
            for request, before in zip(requests, padding, strict=True):
                request.figures.reused = max(0, restored - before)
            sequences = generate(past_key_values=cache, **drafts)
            start = len(prompt.logical_ids()) - longest
            rows = [
                ids[start + before :]
                for ids, before in zip(sequences.tolist(), padding, strict=True)
            ]
            self._tails.keep(cache.name, rows, cache)
            return sequences

    def _sink(
        self,
        requests: Sequence[Request],
        prompt_length: int,
        on_text: Callable[[str], None] | None,
    ) -> tuple[TokenSink, dict[str, Any]]:
        """Return what takes the new tokens, and the arguments of ``model.generate()``."""
        settings = requests[0].settings
        kwargs = dict(settings.kwargs)
        criteria = kwargs.pop("stopping_criteria", None) or []
        if samplers := [own for request in requests if (own := request.settings.sampler)]:
            given = kwargs.get("logits_processor") or []
            kwargs["logits_processor"] = LogitsProcessorList([*given, RowSamplers(samplers)])
        strings = [*settings.stop_strings, *([] if settings.single else settings.stop)]
        if strings:
            tokenizer = kwargs.pop("tokenizer", None) or self.tokenizer
            criteria = [*criteria, StopStringCriteria(tokenizer, strings)]
        rows = [
            Row(TextAssembler(self.tokens, own.stop), cancellations=own.cancellations)
            for own in (request.settings for request in requests)
        ]
        sink = TokenSink(
            rows, prompt_length, settings.end_tokens, criteria, on_text, settings.single
        )
        return sink, {**kwargs, "stopping_criteria": StoppingCriteriaList([sink])}

    def _plan(self, prompt: PreparedPrompt, questions: int, new_tokens: int) -> Plan:
        """Say whether a prompt's contexts come from the store or are prefilled with the rest."""
        if not prompt.contexts:
            return "plain"
        limit, needed = self.info.max_positions, prompt.num_tokens + new_tokens
        fits = limit is None or needed <= limit
        if self.config.prefill == "plain":
            if not fits:
                raise ContextWindowError(
                    f"Prompt and new tokens are {needed} tokens, and the model has {limit} "
                    'positions. Retrieve less, or use prefill="cached": contexts that come from '
                    "the store share their positions."
                )
            return "plain"
        if self.config.prefill == "cached" or not fits or questions > 1:
            return "cached"

        def assembled() -> bool:
            return self._sets.holds((self._kind_of_set(prompt), *self._ordered(prompt)[0]))

        nbytes = self.info.spec(sum(map(len, prompt.contexts))).nbytes
        return self._break_even.plan(nbytes, len(prompt.contexts), prompt.num_tokens, assembled)

    def _observe(self, read: PreparedPrompt, figures: Figures, seconds: float) -> None:
        """Learn from one generation what loading and prefilling cost.

        Parameters
        ----------
        seconds : float
            From where prefix and contexts stood ready to the first token.
        """
        lengths = [len(ids) for ids in read.contexts]
        self._break_even.observe_prefill(
            len(read.query) - figures.reused, sum(lengths) + len(read.query), seconds
        )
        if not lengths or not figures.load:
            return
        if figures.hits == len(lengths):
            nbytes = self.info.spec(sum(lengths)).nbytes
            self._break_even.observe_load(nbytes, len(lengths), figures.load)
        elif figures.misses == len(lengths):
            self._break_even.observe_prefill(figures.encoded, max(lengths), figures.encode)

    def _drafts(
        self, settings: GenerationSettings, prompt: PreparedPrompt, batch: int
    ) -> dict[str, Any]:
        """Return the arguments that let ``model.generate()`` copy drafts from the contexts."""
        if not self.config.draft_tokens or batch > 1 or not settings.draftable:
            return {}
        drafts = ContextDrafts([*prompt.contexts, prompt.query], self.config.draft_tokens)
        return {"custom_generate": decode, "drafts": drafts}

    def _padded(
        self, prompt: PreparedPrompt, queries: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask of the logical prompts, padded left of the queries."""
        device = self.info.input_device
        head = prompt.logical_ids()[: -len(prompt.query)]
        length = len(prompt.query)
        # Padding repeats a token of the prompt, or a repetition penalty would see a new one.
        ids = [[*head, *head[-1:] * (length - len(query)), *query] for query in queries]
        mask = torch.ones(len(queries), len(head) + length, dtype=torch.long, device=device)
        for row, query in enumerate(queries):
            mask[row, len(head) : len(head) + length - len(query)] = 0
        return torch.tensor(ids, device=device), mask

    @computing()
    @fast_products()
    def query_logits(
        self,
        prefix_ids: Sequence[int],
        context_ids: Sequence[Sequence[int]],
        query_ids: Sequence[int],
    ) -> Tensor:
        """Return the logits at every query token.

        Parameters
        ----------
        prefix_ids, query_ids : sequence of int
            Token ids; the prefix may be empty, the query not.
        context_ids : sequence of sequences of int
            Token ids of each context.

        Returns
        -------
        Tensor
            ``(len(query_ids), vocab_size)``.
        """
        if not query_ids or any(not ids for ids in context_ids):
            raise ConfigError("The query and every context need at least one token.")
        prompt = PreparedPrompt(list(prefix_ids), [list(c) for c in context_ids], list(query_ids))
        prompt = self._preparer.fit(prompt, 0)
        prompt = self._selected(prompt, [prompt.query], 0, Figures())
        device = self.info.input_device
        if not prompt.contexts:
            ids = torch.tensor([prompt.prefix + prompt.query], device=device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits[0, len(prompt.prefix) :]
        with self.assemble(prompt) as cache:
            ids = torch.tensor([prompt.query], device=device)
            start = prompt.layout.query_position
            positions = torch.arange(start, start + len(prompt.query), device=device)
            logits = self.model(
                input_ids=ids,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            ).logits
        return logits[0]

    @property
    def context_room(self) -> int | None:
        """Context tokens that one prompt may well hold, whatever the model's positions.

        None where contexts do not share positions, or are prefilled with the rest of the prompt.
        Otherwise those of the largest set that stays assembled (``context_set_bytes``); more is no
        error, but takes more memory.
        """
        if self.config.sequential or self.config.prefill == "plain":
            return None
        return self._sets.max_idle_tokens

    def clear_assembled(self, *, keep_memory: bool = False) -> None:
        """Forget assembled context sets that no generation is using, and what followed them.

        Parameters
        ----------
        keep_memory : bool
            Keep their buffers for the next sets instead of giving the memory back.
        """
        self._sets.clear(keep_memory=keep_memory)
        self._tails.clear()

    def close(self) -> None:
        """Finish background work, write what is pending, and give memory back."""
        self._background.shutdown(wait=True)
        self._sets.clear()
        self._tails.clear()
        self.store.flush()


def _result(
    row: Row, prompt: PreparedPrompt, figures: Figures, batch: int, plan: Plan
) -> GenerationResult:
    return GenerationResult(
        text=row.assembler.text,
        token_ids=row.token_ids,
        finish_reason="stop" if row.stopped else "length",
        usage={
            "prompt_tokens": prompt.num_tokens,
            "completion_tokens": len(row.token_ids),
            "total_tokens": prompt.num_tokens + len(row.token_ids),
            "cached_tokens": 0 if plan == "plain" else _cached_tokens(prompt, figures),
        },
        cache={
            "contexts": len(prompt.contexts),
            "dropped": prompt.dropped,
            "hits": figures.hits,
            "misses": figures.misses,
            "bytes_loaded": figures.bytes_loaded,
            "tokens_reused": figures.reused,
            "batch": batch,
            "plan": plan,
        },
        timings={
            "load": figures.load,
            "encode": figures.encode,
            "select": figures.select,
            "recompute": figures.recompute,
            "first_token": figures.first_token,
            "total": time.perf_counter() - figures.start,
        },
    )


def _cached_tokens(prompt: PreparedPrompt, figures: Figures) -> int:
    return max(0, prompt.layout.total - figures.encoded) + figures.reused


def _check_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse a model that computes states of another dtype than the one it was attached with."""
    weight = embeddings(model)
    if weight.dtype != dtype:
        raise ConfigError(
            f"The model is in {weight.dtype} now, and was in {dtype} when its generator was made. "
            "Make a new generator after a change of dtype."
        )
    kind = weight.device.type
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) != dtype
    ):
        raise ConfigError(
            f"torch.autocast would mix {torch.get_autocast_dtype(kind)} into states of {dtype}. "
            "Leave the autocast block, and load the model in the dtype that it should compute in."
        )


def _load_model(name: str, kwargs: dict[str, Any]) -> Any:
    """Load a causal language model, or a vision-language model for its language model."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return kind.from_pretrained(name, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    raise UnsupportedModelError(
        f"{name} is no causal language model (an encoder-decoder or encoder-only model?). "
        "Use a decoder-only model such as Llama, Qwen or Mistral."
    )
