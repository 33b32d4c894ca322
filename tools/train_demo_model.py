"""Train the bundled demo model, from nothing to the exported Hugging Face folder.

One command runs the whole curriculum::

    python tools/train_demo_model.py --out ape_integrations/models/tiny-reader

It runs on CPU or CUDA, writes a checkpoint every few minutes and goes on from it with
``--resume``. The curriculum exists because binding a value to a name (associative recall) is a
plateau that question answering alone does not get over: it starts from copying, goes on to lists
of "First Last value" records with growing distance between name and value, and only then to
sentences, documents and whole prompts. Each stage ends when held-out answers are right often
enough, and every batch mixes in earlier material so that nothing is unlearned.

Documents are always encoded as one ordinary sequence; nothing here trains for parallel encoding.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_tokenizer import BOS, END, build_tokenizer

from ape_integrations.evaluation import world as w

IGNORE = -100
LONE_WEIGHT = 3.0  # of the loss on an answer that is the only one in its prompt
CONTEXT_WEIGHT = 0.1  # of the loss on tokens that are no answer
CONTEXT_SHARE = 0.15  # of those tokens, drawn at random, that enter the loss at all


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in fp32 on CPU, where the fused kernel is three times slower in bf16.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query, key, value : torch.Tensor
        States of shape (batch, heads, length, head_dim); keys and values have fewer heads.
    attention_mask : None
        Batches are padded on the right, so that the causal rule is all the mask they need.
    """
    dtype = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
    return output.transpose(1, 2).to(dtype), None


AttentionInterface.register("train_causal", causal_attention)
AttentionMaskInterface.register("train_causal", lambda *args, **kwargs: None)


@dataclass
class Sample:
    """Token ids with the flags of those that belong to answers, and the weight of their loss."""

    ids: list[int]
    answer: list[bool]
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Parameters
    ----------
    name : str
        Shown in the log.
    draw : callable
        ``(builder, split) -> Sample``.
    target : float
        Share of held-out answers that must be right, token by token, to go on.
    steps : int
        Go on after that many steps in any case.
    learning_rate : float
        Peak rate of the stage.
    """

    name: str
    draw: Callable[[Builder, str], Sample]
    target: float
    steps: int
    learning_rate: float


class Builder:
    """Turns tasks of the world into samples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.render = w.chat_renderer(tokenizer)
        self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.end = tokenizer.convert_tokens_to_ids(END)
        values = [v for pool in w._PLAIN_VALUES.values() for v in pool if v not in w.NUMBERS]
        self.values = sorted(set(values) | set(w.CITIES))
        self.fillers = sorted(w._words(" ".join((*w.FILLERS, *w.TAILS)).lower()))
        self.words = [*w.FIRST_NAMES, *w.LAST_NAMES, *self.values]

    def encode(self, text: str) -> list[int]:
        """Tokenise without a further ``<|bos|>``."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(self, prompt: str, answer: str) -> Sample:
        """Flag what follows each ``<|assistant|>``, and `answer` itself, as answers."""
        head = self.encode(prompt)
        tail = self.encode(answer + END)
        flags: list[bool] = []
        inside = False
        for position, token in enumerate(head):
            empty = token == self.end and head[position - 1] == self.assistant
            flags.append(inside and not empty)
            if token == self.assistant:
                inside = True
            elif token == self.end:
                inside = False
        return Sample(head + tail, flags + [True] * len(tail))

    def task(self, task: w.Task, style: str) -> Sample:
        """Put a task into a prompt; styles without history take its last turn only."""
        turns = task.turns
        if style in w.SINGLE_STYLES:
            turns = turns[-1:]
        documents = task.documents
        if self.rng.random() < 0.12 and style != "few_shot":
            documents = [w.with_metadata(text, self.rng) for text in documents]
        prompt = w.build_prompt(style, documents, turns, self.render, self.rng)
        sample = self.sample(prompt.text, turns[-1].answer)
        # A lone question must not drown among the many of a chat.
        sample.weight = LONE_WEIGHT if len(turns) == 1 else 1.0
        return sample


def draw_copy(builder: Builder, split: str) -> Sample:
    """Repeat a random sequence of words."""
    words = builder.rng.choices(builder.words, k=builder.rng.randint(8, 24))
    ids = builder.encode(" ".join(words))
    return Sample([*builder.encode(BOS), *ids, *ids], [False] * (len(ids) + 1) + [True] * len(ids))


def records(fillers: int, count: int = 6, questions: int = 6) -> Callable[[Builder, str], Sample]:
    """List "First Last [filler ...] value." records with up to `fillers` filler words."""

    def draw(builder: Builder, split: str) -> Sample:
        rng = builder.rng
        world = w.World(rng.getrandbits(32), split, share=0.95)
        taken: set[str] = set()
        lines = []
        for _ in range(count):
            middle = rng.choices(builder.fillers, k=rng.randint(max(0, fillers - 2), fillers))
            name = world.name(w.PEOPLE, taken)
            lines.append((name, " ".join([name, *middle, rng.choice(builder.values)]) + "."))
        turns = [w.Turn(f"{name}?", line, "single") for name, line in rng.sample(lines, questions)]
        prompt = w.build_prompt(
            "short_system", ["\n".join(line for _, line in lines)], turns, builder.render
        )
        return builder.sample(prompt.text, turns[-1].answer)

    return draw


def sentences(
    count: tuple[int, int], facts: tuple[int, int], questions: int, people_only: bool
) -> Callable[[Builder, str], Sample]:
    """Ask several single-fact questions about plain documents of a few facts each."""

    def draw(builder: Builder, split: str) -> Sample:
        rng = builder.rng
        world = w.World(rng.getrandbits(32), split, plain=True, share=0.8)
        kinds = [w.PEOPLE] if people_only or rng.random() < 0.3 else list(w.RELATIONS_OF)
        relations = None
        if facts[1] == 1 and rng.random() < 0.6:
            kinds = [rng.choice(kinds)]
            relations = [rng.choice(w.RELATIONS_OF[kinds[0]])]
        documents = world.documents(
            rng.randint(*count), facts=facts, kinds=kinds, relations=relations
        )
        turns = [world.single(documents) for _ in range(questions)]
        task = w.Task([document.text for document in documents], turns)
        prompt = w.build_prompt("short_system", task.documents, task.turns, builder.render)
        return builder.sample(prompt.text, turns[-1].answer)

    return draw


def dialogue(
    count: tuple[int, int], questions: tuple[int, int], styles: Sequence[str] = w.CHAT_STYLES
) -> Callable[[Builder, str], Sample]:
    """Ask questions of all kinds, in one chat, about one set of documents."""

    def draw(builder: Builder, split: str) -> Sample:
        rng = builder.rng
        world = w.World(rng.getrandbits(32), split)
        return builder.task(
            _dialogue(world, rng.randint(*count), rng.randint(*questions)), rng.choice(list(styles))
        )

    return draw


def _dialogue(world: w.World, count: int, questions: int) -> w.Task:
    rng = world.rng
    low = rng.choice((1, 2, 2, 3))
    kinds: Sequence[str] = (w.PEOPLE, w.PEOPLE, w.PEOPLE, w.COMPANY, w.PRODUCT, w.EVENT, w.CITY)
    if rng.random() < 0.2:
        kinds = [rng.choice(kinds)]
    documents = world.documents(count, facts=(low, rng.randint(low, 5)), kinds=kinds)
    facts = sum(len(document.facts) for document in documents)
    turns: list[w.Turn] = []
    said: set[str] = set()
    for _ in range(4 * questions):
        turn = _draw_turn(world, documents, turns)
        # An answer that can be copied from an earlier turn teaches nothing about documents.
        if turn is None or turn.answer.split(". ")[-1] in said:
            continue
        said.update(part if part.endswith(".") else part + "." for part in turn.answer.split(". "))
        turns.append(turn)
        if len(turns) == min(questions, facts):
            break
    return w.Task([d.text for d in documents], turns or [world.single(documents)])


def _draw_turn(world: w.World, documents: list[w.Document], turns: list[w.Turn]) -> w.Turn | None:
    chance = world.rng.random()
    if chance < 0.2:
        return world.unanswerable(documents)
    if chance < 0.45:
        return world.two_hop(documents)
    if chance < 0.6 and turns:
        return world.follow_up(documents, turns[-1])
    return world.single(documents)


def single_turn(count: tuple[int, int]) -> Callable[[Builder, str], Sample]:
    """Ask one question in a prompt that has no history.

    Prompts with the question before the documents, and with documents in a tool message, are the
    hardest; they come twice as often.
    """
    styles = (*w.SINGLE_STYLES, "rag", "tool")

    def draw(builder: Builder, split: str) -> Sample:
        rng = builder.rng
        world = w.World(rng.getrandbits(32), split)
        return builder.task(_dialogue(world, rng.randint(*count), 1), rng.choice(styles))

    return draw


def draw_few_shot(builder: Builder, split: str) -> Sample:
    """Show labelled words and one without label."""
    world = w.World(builder.rng.getrandbits(32), split)
    sample = builder.task(world.few_shot(builder.rng.randint(4, 16)), "few_shot")
    if split == "train":  # the examples' own labels, most of which can be inferred, count as well
        label, colon = builder.encode("Label:")
        for position in range(2, len(sample.ids)):
            if sample.ids[position - 2 : position] == [label, colon]:
                sample.answer[position] = sample.ids[position] != builder.end
    return sample


def mixture(
    *parts: tuple[float, Callable[[Builder, str], Sample]],
) -> Callable[[Builder, str], Sample]:
    """Draw from several generators with the given weights."""
    weights = [weight for weight, _ in parts]

    def draw(builder: Builder, split: str) -> Sample:
        return builder.rng.choices(parts, weights)[0][1](builder, split)

    return draw


STAGES: tuple[Stage, ...] = (
    Stage("copy", draw_copy, 0.9, 400, 2e-3),
    Stage("records", records(0), 0.9, 2500, 2e-3),
    Stage("one fact", sentences((3, 6), (1, 1), 4, False), 0.93, 1500, 2e-3),
    Stage("facts", sentences((3, 6), (2, 4), 6, False), 0.93, 2000, 2e-3),
    Stage("dialogue", dialogue((3, 7), (6, 10)), 0.93, 2500, 2e-3),
    Stage(
        "prompts",
        mixture(
            (0.5, dialogue((2, 7), (6, 12))),
            (0.42, single_turn((1, 6))),
            (0.08, draw_few_shot),
        ),
        0.96,
        4000,
        1.2e-3,
    ),
    Stage(
        "long",
        mixture(
            (0.40, dialogue((2, 9), (8, 14))),
            (0.08, dialogue((9, 32), (10, 20))),
            (0.44, single_turn((1, 14))),
            (0.08, draw_few_shot),
        ),
        1.01,
        5600,
        1.2e-3,
    ),
)


def draw_batch(stages: Sequence[Stage], builder: Builder, tokens: int) -> list[Sample]:
    """Draw samples worth `tokens` tokens, six in seven from the last stage."""
    batch: list[Sample] = []
    total = 0
    while total < tokens:
        stage = stages[-1]
        if len(stages) > 1 and builder.rng.random() < 1 / 7:
            stage = builder.rng.choice(stages[:-1][-2:])
        sample = stage.draw(builder, "train")
        batch.append(sample)
        total += len(sample.ids)
    return batch


def chunks(batch: list[Sample], tokens: int) -> list[list[Sample]]:
    """Split into groups of similar length with at most `tokens` padded tokens each."""
    groups: list[list[Sample]] = []
    for sample in sorted(batch, key=lambda s: len(s.ids)):
        if not groups or len(sample.ids) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def forward(
    model: LlamaForCausalLM, group: list[Sample], device: torch.device, context_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, labels and answer flags of the positions that enter the loss.

    The samples are padded on the right; under causal attention no mask is needed then.
    """
    length = max(len(sample.ids) for sample in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    answer = torch.zeros(len(group), length, dtype=torch.bool)
    valid = torch.zeros(len(group), length, dtype=torch.bool)
    for row, sample in enumerate(group):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        answer[row, : len(sample.ids)] = torch.tensor(sample.answer)
        valid[row, : len(sample.ids)] = True
    drawn = valid & (torch.rand(valid.shape) < context_share)
    chosen = (answer | drawn)[:, 1:].to(device)
    ids, answer = ids.to(device), answer.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][chosen])
    return logits.float(), ids[:, 1:][chosen], answer[:, 1:][chosen]


def train_step(
    model: LlamaForCausalLM, batch: list[Sample], device: torch.device, chunk: int
) -> float:
    """Accumulate gradients over a batch and return the mean loss on answer tokens."""
    answers = sum(sum(sample.answer) for sample in batch)
    others = max(1.0, CONTEXT_SHARE * sum(len(s.ids) - sum(s.answer) for s in batch))
    total = 0.0
    for group in chunks(batch, chunk):
        logits, labels, flags = forward(model, group, device, CONTEXT_SHARE)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        weights = torch.tensor(
            [sample.weight for sample in group for _ in range(sum(sample.answer))]
        )
        weighted = (losses[flags] * weights.to(device)).sum() / answers
        loss = weighted + CONTEXT_WEIGHT * losses[~flags].sum() / others
        loss.backward()
        total += losses[flags].sum().item() / answers
    return total


@torch.no_grad()
def answer_accuracy(
    model: LlamaForCausalLM,
    stage: Stage,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    samples: int = 48,
) -> float:
    """Share of held-out answers of which every token is the most likely one."""
    builder = Builder(tokenizer, seed=12345)
    drawn = [stage.draw(builder, "held_out") for _ in range(samples)]
    right = total = 0
    for group in chunks(drawn, 8192):
        logits, labels, flags = forward(model, group, device, 0.0)
        hits = (logits.argmax(-1) == labels)[flags].tolist()
        position = 0
        for sample in group:
            count = 0
            ok = True
            for index in range(1, len(sample.ids)):
                if not sample.answer[index]:
                    continue
                ok &= hits[position]
                position += 1
                count += 1
                closing = sample.ids[index] == builder.end or index == len(sample.ids) - 1
                if closing:
                    right += ok
                    total += 1
                    ok = True
    return right / total


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """Return a freshly initialised model of the given shape."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "train_causal"
    return LlamaForCausalLM(config)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder with fp16 weights; the model card is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    half.load_state_dict(model.state_dict())
    half = half.to(torch.float16)
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    half.save_pretrained(folder)
    # Whoever loads the model computes in fp32, which is four times faster on a CPU.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def build_optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for embeddings and norms.

    Muon learns rare associations in fewer steps than AdamW does, and binding is nothing else. Its
    updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(
            matrices, lr=1e-3, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Trainer:
    """Runs the curriculum, with checkpoints."""

    COUNTERS = ("stage", "step", "step_in_stage", "tokens", "seconds")

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.device = torch.device(args.device)
        self.tokenizer = build_tokenizer(w.vocabulary())
        self.model = build_model(self.tokenizer, args).to(self.device)
        if args.compile:
            self.model.model.compile(dynamic=True)
        self.optimizers = build_optimizers(self.model, args.weight_decay)
        self.stage = 0
        self.step = 0
        self.steps_run = 0  # since the start of this process
        self.step_in_stage = 0
        self.tokens = 0
        self.seconds = 0.0
        self.checkpoint = Path(args.checkpoint)

    def load(self, path: Path, *, weights_only: bool = False) -> None:
        """Go on from a checkpoint, or take its weights only."""
        if path.is_dir():  # an exported model, such as the shipped one
            self.model.load_state_dict(LlamaForCausalLM.from_pretrained(path).state_dict())
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if weights_only:
            return
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in self.COUNTERS:
            setattr(self, name, state[name])

    def save(self) -> None:
        """Write the checkpoint, replacing the one before in one step."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **{name: getattr(self, name) for name in self.COUNTERS},
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def learning_rate(self) -> float:
        """Warm up linearly after each start, decay linearly to zero over the last stage."""
        stage = STAGES[self.stage]
        rate = stage.learning_rate * self.args.lr_scale * min(1.0, (self.steps_run + 1) / 100)
        if self.stage == len(STAGES) - 1:
            rate *= max(0.02, 1.0 - self.step_in_stage / self.steps_of(stage))
        return rate

    def steps_of(self, stage: Stage) -> int:
        """Return after how many steps a stage ends; the last one's can be given."""
        last = stage is STAGES[-1] and self.args.last_steps
        return self.args.last_steps if last else stage.steps

    def run(self) -> None:
        """Train until the last stage is over, the time is up, or the stop stage is reached."""
        builder = Builder(self.tokenizer, seed=self.args.seed * 1_000_003 + self.step)
        started = saved = time.monotonic()
        before = self.seconds
        losses: list[float] = []
        while self.stage < len(STAGES):
            stage = STAGES[self.stage]
            batch = draw_batch(STAGES[: self.stage + 1], builder, self.args.batch_tokens)
            rate = self.learning_rate()
            for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
                group["lr"] = rate
            losses.append(train_step(self.model, batch, self.device, self.args.chunk_tokens))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self.step += 1
            self.steps_run += 1
            self.step_in_stage += 1
            self.tokens += sum(len(sample.ids) for sample in batch)
            now = time.monotonic()
            self.seconds = before + now - started
            if now - saved > self.args.save_every:
                self.save()
                saved = now
            if self.step_in_stage % self.args.eval_every == 0:
                accuracy = answer_accuracy(self.model, stage, self.tokenizer, self.device)
                self.report(stage, losses, accuracy)
                losses = []
                done = accuracy >= stage.target or self.step_in_stage >= self.steps_of(stage)
                if done:
                    self.stage += 1
                    self.step_in_stage = 0
                    self.save()
            if self.seconds - before > 60 * self.args.minutes:
                break
            if self.stage > self.args.stop_stage:
                break
        self.save()

    def report(self, stage: Stage, losses: list[float], accuracy: float) -> None:
        """Print one line of progress."""
        line = {
            "stage": stage.name,
            "step": self.step,
            "in_stage": self.step_in_stage,
            "loss": round(sum(losses) / len(losses), 4),
            "held_out": round(accuracy, 4),
            "Mtok": round(self.tokens / 1e6, 3),
            "minutes": round(self.seconds / 60, 1),
        }
        print(json.dumps(line), flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder to export to")
    parser.add_argument("--export-only", action="store_true", help="train no further")
    parser.add_argument("--checkpoint", default="runs/demo-model/checkpoint.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument(
        "--warm-start", type=Path, help="take the weights of this checkpoint or exported folder"
    )
    parser.add_argument(
        "--average", type=Path, nargs="+", default=[], help="export the mean of these checkpoints"
    )
    parser.add_argument("--stage", type=int, help="begin at this stage")
    parser.add_argument("--stop-stage", type=int, default=len(STAGES), help="end after this stage")
    parser.add_argument("--last-steps", type=int, default=0, help="steps of the last stage")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--init-std", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--lr-scale", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="fuse with torch.compile")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--eval-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then export if asked to."""
    args = parse(argv)
    trainer = Trainer(args)
    if args.resume and trainer.checkpoint.exists():
        trainer.load(trainer.checkpoint)
    elif args.warm_start:
        trainer.load(args.warm_start, weights_only=True)
    if args.stage is not None:
        trainer.stage, trainer.step_in_stage = args.stage, 0
    if not args.export_only:
        trainer.run()
    if args.average:
        states = [torch.load(path, weights_only=True)["model"] for path in args.average]
        trainer.model.load_state_dict(
            {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
        )
    if args.out:
        export(trainer.model, trainer.tokenizer, args.out)


if __name__ == "__main__":
    main()
