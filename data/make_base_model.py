"""The whole recipe of data/base_model: corpus, tokenizer, training that unlearns loops, evaluation.

    pip install --no-deps --target build/corpus -r data/corpus_requirements.txt
    python data/make_base_model.py --minutes 100

Reads documented functions from the standard library and from every permissively licensed package
it finds, keeps the ``train`` files, trains a small Llama from scratch and writes it as bf16
safetensors. Killed at any moment and started again it continues from its last checkpoint.
"""

import argparse
import ast
import copy
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections import Counter
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medusa_nb.base_model import has_native_bf16  # noqa: E402
from medusa_nb.distillation import generate_batch, is_loop, loop_period  # noqa: E402
from medusa_nb.errors import InputError  # noqa: E402
from medusa_nb.source_code import Function, read_functions, split_of  # noqa: E402

SEED = 0
SHORT = 250  # characters of a prompt whose answer fits into the card
PICKED = ROOT / "data" / "plausible_answers.txt"
PERMISSIVE = ("MIT", "BSD", "APACHE", "PSF", "PYTHON SOFTWARE", "ISC", "HPND", "UNLICENSE", "0BSD", "ZLIB", "CC0")
RESTRICTED = ("GPL", "MPL", "MOZILLA", "PROPRIETARY", "EPL", "CDDL")
SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Runs of letters with one leading mark, up to three digits, punctuation, line ends, indentation.
PRE_TOKENIZER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONFIG = dict(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=9,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
TOKEN_IDS = dict(pad_token_id=0, bos_token_id=None, eos_token_id=4)
TOKENS_PER_STEP = 10240  # padded
LOOP_CHECKS = (
    0.4,
    0.55,
    0.7,
    0.76,
    0.82,
    0.88,
    0.94,
)  # shares of the training at which greedy answers are looked at for loops
LOOP_PROMPTS = 1000  # answered at each check
LOOPS_PER_STEP = 8  # looping answers in every later step
LOOP_WEIGHT = 2.0  # of their loss, next to the cross entropy of real functions


# --- corpus ---------------------------------------------------------------------------------------


def licence_of(distribution: Distribution) -> str:
    """The licence a distribution states in its metadata, empty if it states none."""
    meta = distribution.metadata
    stated = [meta.get("License-Expression") or ""]
    stated += [c.split("::")[-1].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    if not any(stated):
        stated = [(meta.get("License") or "").split("\n")[0][:60]]
    return " / ".join(s for s in stated if s)


def is_permissive(licence: str) -> bool:
    """True if the stated licence names a permissive family and no restricted one."""
    upper = licence.upper().replace("ZPL", "")
    return any(p in upper for p in PERMISSIVE) and not any(r in upper for r in RESTRICTED)


def permitted_packages(folder: Path) -> tuple[dict[str, str], set[str]]:
    """``({distribution: licence}, {top-level folder names})`` of the permissive packages in a folder."""
    licences, tops = {}, set()
    for distribution in distributions(path=[str(folder)]):
        licence = licence_of(distribution)
        if is_permissive(licence):
            licences[distribution.metadata["Name"]] = licence
            tops |= {f.parts[0] for f in distribution.files or [] if f.suffix == ".py" and len(f.parts) > 1}
    return licences, {top for top in tops if not top.startswith("..")}


def read_corpus() -> tuple[list[Function], dict[str, str]]:
    """All documented functions of all sources, unique by body, and the licences of their packages.

    A body that also stands in a ``calibration`` or ``test`` file is kept there and dropped from
    ``train``: what is measured was never seen.
    """
    functions = list(read_functions(sysconfig.get_paths()["stdlib"], "stdlib"))
    licences = {"Python standard library": "PSF-2.0"}
    for folder in (Path(sysconfig.get_paths()["purelib"]), ROOT / "build" / "corpus"):
        found, tops = permitted_packages(folder)
        licences |= found
        for top in tqdm(sorted(tops), desc=f"reading {folder.name}", unit="package"):
            for function in read_functions(folder / top, top):
                path = f"{top}/{function.path}"
                functions.append(Function(function.id, path, function.prompt, function.body))
    order = {"test": 0, "calibration": 1, "train": 2}
    functions.sort(key=lambda f: order[split_of(f.path)])
    unique: dict[str, Function] = {}
    for function in functions:
        key = hashlib.sha256("".join(function.body.split()).encode()).hexdigest()
        unique.setdefault(key, function)
    return list(unique.values()), licences


# --- tokenizer and tokens -------------------------------------------------------------------------


def train_tokenizer(functions: list[Function], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the ``train`` functions and save it with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (f.prompt + "\n" + f.body for f in functions)
    tokenizer.train_from_iterator(texts, trainer, length=len(functions))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def tokenize(functions: list[Function], tokenizer) -> list[tuple[np.ndarray, int]]:
    """One ``(token ids, number of prompt tokens)`` per conversation, in the chat template's layout."""
    user, assistant, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>", "<|end|>"))
    backend, rows = tokenizer.backend_tokenizer, []
    for start in tqdm(range(0, len(functions), 1000), desc="tokenizing", unit="k"):
        chunk = functions[start : start + 1000]
        prompts = backend.encode_batch([f.prompt for f in chunk], add_special_tokens=False)
        bodies = backend.encode_batch([f.body for f in chunk], add_special_tokens=False)
        for prompt, body in zip(prompts, bodies, strict=True):
            head = [user, *prompt.ids, end, assistant]
            rows.append((np.array(head + body.ids + [end], dtype=np.uint16), len(head)))
    return rows


def batches(rows: list[tuple[np.ndarray, int]], epoch: int) -> list[list[int]]:
    """Row numbers of each batch of an epoch: about TOKENS_PER_STEP padded tokens, similar lengths."""
    rng = np.random.default_rng(SEED + epoch)
    order, found = rng.permutation(len(rows)), []
    for start in range(0, len(order), 8192):
        block = sorted(order[start : start + 8192].tolist(), key=lambda i: len(rows[i][0]))
        batch: list[int] = []
        for i in block:
            if batch and (len(batch) + 1) * len(rows[i][0]) > TOKENS_PER_STEP:
                found.append(batch)
                batch = []
            batch.append(i)
        found.append(batch)
    return [found[i] for i in rng.permutation(len(found))]


def pad(rows: list[tuple[np.ndarray, int]], batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[B, T]``, right-padded, and labels: the assistant's tokens, -100 elsewhere."""
    width = -(-max(len(rows[i][0]) for i in batch) // 16) * 16
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for line, i in enumerate(batch):
        tokens, prompt = torch.from_numpy(rows[i][0].astype(np.int64)), rows[i][1]
        ids[line, : len(tokens)] = tokens
        labels[line, prompt : len(tokens)] = tokens[prompt:]
    return ids, labels


# --- training -------------------------------------------------------------------------------------


def learning_rate(progress: float) -> float:
    """Share of the peak learning rate: 2 % warm-up, then linear to zero."""
    return min(progress / 0.02, (1 - progress) / 0.98)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, lm_head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [
            dict(params=[model.model.embed_tokens.weight], lr=8e-3),
            dict(params=[model.lm_head.weight], lr=4e-3),
            dict(params=norms, lr=4e-3),
        ],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.01,
        fused=True,
    )
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [adamw, muon]


def is_run(folder: Path | None) -> bool:
    """Whether this is the folder of a training run, not of a model or nothing."""
    return folder is not None and (folder / "checkpoint.pt").exists()


def starting_model(earlier: Path | None) -> LlamaForCausalLM:
    """A new model of ``CONFIG``, or a finished one, grown to as many layers.

    New layers are copies that stand behind the layer they copy and, for now, add nothing: what they write into
    the residual stream is zero. The grown model says exactly what the finished one says, and learns on from there.
    """
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **TOKEN_IDS))
    if earlier is None or is_run(earlier):
        return model
    finished = LlamaForCausalLM.from_pretrained(earlier, dtype=torch.float32)
    parts, layers, count = finished.state_dict(), finished.config.num_hidden_layers, CONFIG["num_hidden_layers"]
    grown = {name: value for name, value in parts.items() if ".layers." not in name}
    copied_from = [number * layers // count for number in range(count)]
    for number, source in enumerate(copied_from):
        new = number > 0 and copied_from[number - 1] == source
        for name in (name for name in parts if f".layers.{source}." in name):
            silent = new and name.endswith(("o_proj.weight", "down_proj.weight"))
            value = torch.zeros_like(parts[name]) if silent else parts[name]
            grown[name.replace(f".layers.{source}.", f".layers.{number}.")] = value
    model.load_state_dict(grown)
    return model


def train(
    rows, likely: list[int], folder: Path, minutes: float, save_every: float, earlier: Path | None = None, peak=1.0
) -> tuple[LlamaForCausalLM, dict]:
    """Train for ``minutes`` of training time, counted over restarts; returns model and totals.

    Only the assistant's tokens are supervised, and only their rows go through lm_head. From the first of
    ``LOOP_CHECKS`` on, every step also lowers the probability of going on with a repetition (see
    :func:`unlikelihood`), while the learning rate falls to zero: likelihood and loops settle together.

    Args:
        likely: numbers of the rows like those that are asked for later; half of a check's prompts.
        earlier: where to go on from: the folder of a finished run, with its weights, optimizers and place in the
            data; or of a finished model, which may have fewer layers (see :func:`starting_model`). ``peak`` then
            scales the learning rates.
    """
    torch.manual_seed(SEED)
    model = starting_model(earlier)
    model.set_attn_implementation("eager")  # compiled, plain products train faster on a CPU than its flash kernel
    optimizers = make_optimizers(model)
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16, enabled=has_native_bf16())  # weights stay in fp32
    state = dict(seconds=0.0, step=0, tokens=0, supervised=0, epoch=0, batch=0, loop_shares=[])
    loops: list = []
    checkpoint = folder / "checkpoint.pt"
    source = checkpoint if checkpoint.exists() or not is_run(earlier) else earlier / "checkpoint.pt"
    if source.exists():
        saved = torch.load(source, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        place = saved["state"]
        state |= place if source == checkpoint else {name: place[name] for name in ("epoch", "batch")}
        loops = saved.get("loops", []) if source == checkpoint else []

    @partial(torch.compile, dynamic=True)
    def hidden_states(ids):
        return model.model(ids).last_hidden_state

    @partial(torch.compile, dynamic=True)
    def cross_entropy(hidden, labels):
        return F.cross_entropy(model.lm_head(hidden), labels)

    def save():
        temporary = checkpoint.with_suffix(".tmp")
        optimized = [o.state_dict() for o in optimizers]
        torch.save(dict(model=model.state_dict(), optimizers=optimized, state=state, loops=loops), temporary)
        temporary.replace(checkpoint)

    order = batches(rows, state["epoch"])
    bar = tqdm(total=round(minutes * 60), initial=round(state["seconds"]), unit="s", desc="training")
    log, last_save, smoothed, warm, usual = (folder / "log.jsonl").open("a"), time.time(), None, 0, math.inf
    while (progress := state["seconds"] / (minutes * 60)) < 1:
        checks = len(state["loop_shares"])
        if checks < len(LOOP_CHECKS) and progress >= LOOP_CHECKS[checks]:
            found = find_loops(model, rows, likely, seed=checks)
            loops += found
            state["loop_shares"].append(len(found) / LOOP_PROMPTS)
            print(f"\n{len(found) / LOOP_PROMPTS:.1%} of {LOOP_PROMPTS} greedy answers loop", flush=True)
            save()
        started = time.time()
        if state["batch"] == len(order):
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            order = batches(rows, state["epoch"])
        ids, labels = pad(rows, order[state["batch"]])
        supervised = labels[:, 1:] != -100
        with bf16():
            loss = cross_entropy(hidden_states(ids[:, :-1])[supervised], labels[:, 1:][supervised])
        loss.backward()
        if loops:
            some = random.Random(state["step"]).sample(loops, min(LOOPS_PER_STEP, len(loops)))
            answers, repeats = pad_answers(some)
            with bf16():
                logits = model.lm_head(hidden_states(answers[:, :-1])[repeats[:, 1:]])
            (LOOP_WEIGHT * unlikelihood(logits, answers[:, 1:][repeats[:, 1:]])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * peak * learning_rate(max(progress, 1e-4))
            optimizer.step()
            optimizer.zero_grad()
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        elapsed = time.time() - started
        warm += 1
        if warm > 3:  # the first steps compile
            usual = min(usual, elapsed)
            state["seconds"] += min(elapsed, 4 * usual)  # a machine that was asleep trained nothing
        state["step"] += 1
        state["tokens"] += int((ids != 0).sum())
        state["supervised"] += int(supervised.sum())
        state["batch"] += 1
        bar.update(round(state["seconds"]) - bar.n)
        bar.set_postfix(step=state["step"], loss=f"{smoothed:.3f}", tokens_per_s=round(ids.numel() / elapsed))
        if state["step"] % 10 == 0:
            log.write(json.dumps({**state, "loss": smoothed}) + "\n")
            log.flush()
        if time.time() - last_save > save_every * 60:
            save()
            last_save = time.time()
    save()
    return model, state


# --- loops ------------------------------------------------------------------------------------------


def find_loops(model, rows, likely: list[int], seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of ``train`` functions whose greedy answers run into a loop, with these answers."""
    source = random.Random(SEED + seed)
    numbers = source.sample(likely, min(LOOP_PROMPTS // 2, len(likely)))
    numbers += source.sample(range(len(rows)), LOOP_PROMPTS - len(numbers))
    prompts = [rows[i][0][: rows[i][1]].tolist() for i in numbers]
    dtype = torch.bfloat16 if has_native_bf16() else torch.float32
    answers = generate_batch(copy.deepcopy(model).to(dtype).eval(), prompts, 256, [4])
    return [(prompt, tokens) for prompt, (tokens, _) in zip(prompts, answers, strict=True) if is_loop(tokens)]


def onset(tokens: list[int]) -> list[bool]:
    """Where an answer enters its loop: the tokens of the block's third time, at which it could still leave."""
    period = loop_period(tokens)
    mask, run = [False] * len(tokens), 0
    for i in range(period or len(tokens), len(tokens)):
        run = run + 1 if tokens[i] == tokens[i - period] else 0
        mask[i] = period < run <= 2 * period  # twice may be meant
    return mask


def unlikelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of -log(1 - p(token)): ``[P, V]``, ``[P]`` -> scalar (Welleck et al., arXiv 1908.04319)."""
    log_p = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0]
    return -torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)).mean()


def pad_answers(answers: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers up to the loop ``[B, T]``, right-padded, and which tokens enter it ``[B, T]``."""
    masks = [onset(tokens) for _, tokens in answers]
    ends = [max(i for i, enters in enumerate(mask) if enters) + 1 for mask in masks]
    lengths = [len(prompt) + end for (prompt, _), end in zip(answers, ends, strict=True)]
    width = -(-max(lengths) // 16) * 16
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    enters = torch.zeros(len(answers), width, dtype=torch.bool)
    for line, ((prompt, tokens), mask, end) in enumerate(zip(answers, masks, ends, strict=True)):
        ids[line, : len(prompt) + end] = torch.tensor(prompt + tokens[:end])
        enters[line, len(prompt) : len(prompt) + end] = torch.tensor(mask[:end])
    return ids, enters


def between(one: dict, other: dict, share: float) -> dict:
    """Weights on the line from one model to another that was trained on from it.

    Training against loops costs likelihood; on the line most of it comes back before the loops do
    (Wortsman et al., arXiv 2109.01903).
    """
    return {name: (1 - share) * one[name] + share * other[name] for name in one}


# --- evaluation and the way out -------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model, rows, functions: list[Function]) -> float:
    """Mean negative log2-likelihood of the assistant turns (end of turn included) per UTF-8 byte."""
    bits = nbytes = 0.0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in tqdm(range(0, len(order), 32), desc="bits per byte"):
        batch = order[start : start + 32]
        ids, labels = pad(rows, batch)
        nbytes += sum(len(functions[i].body.encode()) for i in batch)
        logits = model(ids).logits[:, :-1].float()
        bits += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item() / math.log(2)
    return bits / nbytes


def judge_answers(model, tokenizer, functions: list[Function], max_new_tokens: int = 256) -> dict:
    """What greedy answers are like: the share that runs into a repetition loop (``medusa_nb.distillation.is_loop``),
    the share that is valid Python below its prompt, and the first dozen that answer short prompts."""
    answers = greedy_answers(model, tokenizer, functions, max_new_tokens)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    valid = [is_python(f"{function.prompt}\n{text}") for function, text in zip(functions, texts, strict=True)]
    samples = [shown(f, text) for f, text in zip(functions, texts, strict=True) if len(f.prompt) <= SHORT]
    return dict(
        loops_test_stdlib=sum(map(is_loop, answers)) / len(answers),
        valid_test_stdlib=sum(valid) / len(answers),
        samples=samples[:12],
    )


def picked_answers(model, tokenizer, functions: list[Function], file: Path, max_new_tokens: int = 256) -> dict:
    """The greedy answers to the functions that somebody listed in ``file``, and how many answers were read for that.

    A line of the file is an id; one that starts with # is a comment, and ``# answers read: N`` must be among them.
    """
    lines = file.read_text().splitlines()
    read = [line.removeprefix("# answers read:") for line in lines if line.startswith("# answers read:")]
    if not read:
        raise InputError(f"'{file}' does not say how many answers were read; add a line '# answers read: N'")
    known = {function.id: function for function in functions}
    ids = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if unknown := [name for name in ids if name not in known]:
        raise InputError(f"'{file}' names '{unknown[0]}', which is none of the held-out functions; take it out")
    chosen = [known[name] for name in ids]
    answers = greedy_answers(model, tokenizer, chosen, max_new_tokens)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    return dict(picked=[shown(f, text) for f, text in zip(chosen, texts, strict=True)], answers_read=int(read[0]))


def greedy_answers(model, tokenizer, functions: list[Function], max_new_tokens: int) -> list[list[int]]:
    """The tokens of a greedy answer to each function's prompt."""
    prompts = [row[:start].tolist() for row, start in tokenize(functions, tokenizer)]
    return [tokens for tokens, _ in generate_batch(model, prompts, max_new_tokens, [4])]


def shown(function: Function, text: str) -> dict:
    """An answer for the card, without the docstring, which is others' text."""
    return dict(id=function.id, signature=function.prompt.partition('"""')[0].rstrip(), answer=text)


def is_python(text: str) -> bool:
    """Whether this parses as Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bf16 safetensors and a generation config with greedy decoding as default."""
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = 4
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=90, help="training time, counted over restarts")
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "base_model", help="corpus and checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "base_model", help="the finished model")
    parser.add_argument("--go-on-from", type=Path, help="--work of a finished run, or a finished model")
    parser.add_argument(
        "--mix", type=float, default=1.0, help="when going on: 0 keeps the start's weights, 1 the end's"
    )
    parser.add_argument("--peak", type=float, default=1.0, help="scale of the learning rates, e.g. 0.5 when going on")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    random.seed(SEED)

    corpus_file = arguments.work / "corpus.json"
    if not corpus_file.exists():
        functions, licences = read_corpus()
        corpus_file.write_text(json.dumps(dict(functions=[vars(f) for f in functions], licences=licences)))
    corpus = json.loads(corpus_file.read_text())
    splits: dict[str, list[Function]] = {"train": [], "calibration": [], "test": []}
    for row in corpus["functions"]:
        splits[split_of(row["path"])].append(Function(**row))
    if not (arguments.out / "tokenizer.json").exists():
        train_tokenizer(splits["train"], arguments.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out)

    rows = tokenize(splits["train"], tokenizer)
    print(f"{len(rows):,} functions, {sum(len(r[0]) for r in rows):,} tokens", flush=True)
    likely = [i for i, function in enumerate(splits["train"]) if function.id.startswith("stdlib:")]
    earlier = arguments.go_on_from
    model, state = train(rows, likely, arguments.work, arguments.minutes, arguments.save_every, earlier, arguments.peak)
    if earlier:
        saved = torch.load(earlier / "checkpoint.pt", weights_only=True)["model"] if is_run(earlier) else None
        start = saved or starting_model(earlier).state_dict()
        model.load_state_dict(between(start, model.state_dict(), arguments.mix))
    export(model, arguments.out)
    model = model.float().eval()
    before = earlier / "report.json" if earlier else None
    report = dict(
        runs=[*(json.loads(before.read_text())["runs"] if before and before.exists() else []), state],
        mix=arguments.mix if earlier else 1.0,
        parameters=sum(p.numel() for p in model.parameters()),
        functions=Counter(),
    )
    for name in splits:
        report["functions"][name] = len(splits[name])
    standard = [f for f in splits["test"] if f.id.startswith("stdlib:")]
    sample = random.Random(SEED).sample(splits["test"], 2000)
    report["bits_per_byte_test_stdlib"] = bits_per_byte(model, tokenize(standard, tokenizer), standard)
    report["bits_per_byte_test_all_sources"] = bits_per_byte(model, tokenize(sample, tokenizer), sample)
    report |= judge_answers(model, tokenizer, random.Random(SEED).sample(standard, min(200, len(standard))))
    report |= picked_answers(model, tokenizer, standard, PICKED)
    (arguments.work / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
