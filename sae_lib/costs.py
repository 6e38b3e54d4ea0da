"""What each stage of a study costs: operations counted from the parameters, by what ``speed`` timed on this machine.

Seconds of a ``Job`` are on all cores. What several runs share is paid by the first of them that is still to be done.
Counted as done are the jobs that snakemake, or else the files, say are done.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from sae_lib import params, runs
from sae_lib.speed import Speed, shape_of

# Measured on a quickstart from nothing on two cores (SmolLM2-135M, layer 11, bfloat16): papermill's durations, and
# `seconds` of the reports, against what the counts below and sae_lib.speed give.
NOTEBOOK = 6.0
"""Seconds of one core: papermill and a kernel start, the stage's imports, hashes."""
LOAD = 3.0
"""Seconds of one core: transformers is imported, a model is loaded and turned into SAEBench's form."""
PICTURES = 3.0
"""Seconds of one core: a stage's figures and dashboards."""
FIRST = 33.0
"""Seconds: SmolLM2 and its texts are downloaded and converted, once a machine."""
MODEL = 0.7
"""Share of the product's rate that a language model reaches, attention and norms included."""
LENS = 0.7
"""The same in SAEBench's form of it, in float32."""
STEP = 0.9
"""Share of the timed step's rate that training reaches, with its data, history and checkpoints."""
AFTER_TRAINING = 4e-10
"""Seconds a latent, channel and held-out token: what the SAE does on held-out text, figures' data included."""
SAE = 0.5
"""Share of the product's rate in evaluations of an SAE, whose latents SAEBench reads densely."""
LETTERS, ALL_WORDS, PROMPT = 25, 20_000, 83
"""Letters that have enough words, the words of a vocabulary, and tokens before and with each word."""
WORDS = 4900
"""Words of the durations that follow."""
READ_AGAIN = 1.2
"""Times that 04 reads a word: test words twice."""
PROBES = 20.0
"""Seconds: the letters' probes on the model's own stream, at WORDS words, once for all SAEs."""
SPARSE_PROBES = 30.0
"""Seconds: the sparse probes of one SAE, at WORDS words and LATENTS latents."""
LATENTS = 4096
COMPARE, COMPARE_RUN = 10.0, 3.0
"""Seconds of one core: 05, and 05 for each run."""
UNEMBEDDINGS = 3
"""Times that core asks for the logits of a batch: plain, with the SAE, ablated."""
NOT_COUNTED = ("sparse_probing", "sae_probes", "scr", "tpp", "unlearning", "truth")
"""Evaluations that depend on labelled texts or a planted world: known to be asked for, and not estimated."""
COLUMN_BYTES = 14
"""Bytes of a stored row beside its activations: token, document, block and position."""


class Job(NamedTuple):
    """One notebook of a study."""

    stage: str
    """extract, words, train, eval, letters or compare."""
    name: str
    """The store, the run, or the study."""
    fixed: float
    """Seconds of one core, whatever the machine's other cores do."""
    own: float
    """Seconds on all cores."""
    shared: float
    """Seconds on all cores that other jobs wait for, or find done."""
    nulls: float
    """The same for null baselines, on this job's cores alone while the others wait."""
    amount: int = 0
    """Tokens or samples."""
    gigabytes: float = 0.0
    done: bool = False
    note: str = ""

    @property
    def alone(self) -> float:
        """Seconds, were it the only one."""
        return self.fixed + self.own + self.shared + self.nulls


NOTHING = (0.0, 0.0, 0.0, 0.0)


def jobs_of(study: str, members, speed: Speed, left: set[tuple[str, str]] | None = None) -> list[Job]:
    """Every notebook of a study; those not in ``left`` (stage and name) are done. None asks the files."""
    counting = _Counting(speed, left)
    stores = {}
    for member in members:
        p = params.check("train", member.params, member.origin)
        asked = params.check("extract", member.params, member.origin)
        if p.store == "disk" and p.activations == "auto":
            stores.setdefault(params.activations_name(asked), asked)
    found = [counting.store(name, asked) for name, asked in stores.items()]
    kinds = {"train": counting.train, "eval": counting.evaluate, "letters": counting.letters}
    found += counting.words(study, members)
    found += [kind(member) for stage, kind in kinds.items() for member in members]
    done = counting.done("compare", study, f"runs/{study}/compare/table.csv")
    fixed = NOTEBOOK + COMPARE + COMPARE_RUN * len(members)
    return [*found, Job("compare", study, *NOTHING, done=True) if done else Job("compare", study, fixed, 0.0, 0.0, 0.0)]


class _Counting:
    """Counts one study; knows what earlier jobs have paid for."""

    def __init__(self, speed: Speed, left: set[tuple[str, str]] | None):
        self.speed, self.left, self.paid = speed, left, set()

    def done(self, stage: str, name: str, file: str) -> bool:
        return (runs.home() / file).exists() if self.left is None else (stage, name) not in self.left

    def once(self, done: bool, key: tuple, seconds: float) -> float:
        """``seconds`` the first time that a job asks for ``key``; a job that is done has paid."""
        if key in self.paid:
            return 0.0
        self.paid.add(key)
        return 0.0 if done else seconds

    def model(self, p: params.Extract, tokens: float) -> float:
        """Seconds of a language model on ``tokens`` tokens, to the hook."""
        shape = shape_of(p.model)
        rate = self.speed.product(shape, p.dtype, _device(p)) * MODEL
        return tokens * shape.operations(p.context, _depth(p)) / rate

    def store(self, name: str, p: params.Extract) -> Job:
        """01: the model on all tokens of a store, and the first download."""
        width, tokens = shape_of(p.model).d_model, p.tokens + max(p.tokens // 20, 2048)
        if self.done("extract", name, f"activations/{name}/manifest.json"):
            return Job("extract", name, *NOTHING, tokens, done=True)
        size = tokens * (width * (4 if p.dtype == "float32" else 2) + COLUMN_BYTES) / 1e9
        first = FIRST * (p.model == "smollm2" and not any((runs.cache() / "models").glob("smollm2-*")))
        return Job("extract", name, NOTEBOOK + LOAD + first, self.model(p, tokens), 0.0, 0.0, tokens, size,
                   note=" (with the download)" if first else "")

    def train(self, member) -> Job:
        """02 of a run: its steps, what it does on held-out text, and the model's passes where activations stream."""
        p = params.check("train", member.params, member.origin)
        streamed = p.store == "stream" and p.activations == "auto"
        width = _width(p)
        size = 4 * p.d_sae * 2 * width / 1e9 * (1 + len({*p.snapshots} - {1.0}))
        if self.done("train", member.name, f"runs/{member.name}/training.json"):
            return Job("train", member.name, *NOTHING, p.samples, size, True)
        own = self.speed.step(p, width) * (p.samples // p.batch_size) / STEP
        own += AFTER_TRAINING * p.d_sae * width * max(p.tokens // 20, 2048)
        own += self.model(p, p.samples) if streamed else 0.0
        return Job("train", member.name, NOTEBOOK + PICTURES + LOAD * streamed, own, 0.0, 0.0,
                   p.samples, size,
                   note=" (the model reads its text on the way)" if streamed else "")

    def evaluate(self, member) -> Job:
        """03 of a run: passes of the model with the SAE, and what the first run of a model measures for all."""
        from sae_lib.evaluation.saebench import PRESETS

        p, asked = (params.check(stage, member.params, member.origin) for stage in ("eval", "train"))
        done = self.done("eval", member.name, f"runs/{member.name}/evals/done.json")
        if "core" not in p.evals and not p.compression_ratios:
            return Job("eval", member.name, *NOTHING, done=True) if done else Job(
                "eval", member.name, NOTEBOOK + PICTURES, 0.0, 0.0, 0.0, note=_others(p))
        shape, batches = shape_of(asked.model), PRESETS.get(p.eval_preset, PRESETS["paper"])
        whole, to_hook = (count * batches.rows * asked.context for count in (batches.reconstruction, batches.sparsity))
        deep, to_site = shape.operations(asked.context), shape.operations(asked.context, _depth(asked))
        rate = self.speed.product(shape, "float32", _device(asked)) * LENS
        shared = (whole * deep + to_hook * to_site) / rate
        one = whole * (deep - to_site + UNEMBEDDINGS * 2 * shape.d_model * shape.vocabulary) / rate
        one += self._sae(asked, whole + to_hook) + self._sae(asked, 2 * asked.d_sae)
        key = (asked.model, asked.hook, asked.context, p.eval_preset, asked.corpus if isinstance(asked.corpus, str)
               else str(asked.corpus))
        shared = self.once(done, ("streams", *key), shared)
        nulls = self.once(done, ("nulls", *key, *_form(asked)), one * len(_to_measure(p.nulls, asked, "core", p)))
        points = len(p.compression_ratios) + len(asked.snapshots) * p.over_training
        if done:
            return Job("eval", member.name, *NOTHING, done=True)
        return Job("eval", member.name, NOTEBOOK + LOAD + PICTURES, one * (1 + points), shared, nulls,
                   note=_others(p))

    def letters(self, member) -> Job:
        """04 of a run: the sparse probes of its SAE for each seed, and of null baselines still to be measured."""
        from sae_lib.evaluation.nulls import NOT_APPLICABLE

        p, asked = (params.check(stage, member.params, member.origin) for stage in ("letters", "train"))
        done = self.done("letters", member.name, f"runs/{member.name}/evals/letters_done.json")
        if asked.model == "planted":
            return Job("letters", member.name, *NOTHING, done=True) if done else Job(
                "letters", member.name, NOTEBOOK, 0.0, 0.0, 0.0)
        words = _words(p, asked)
        pace = self.pace(asked)
        one = SPARSE_PROBES * words / WORDS * asked.d_sae / LATENTS / pace
        nulls = 0.0
        for seed in p.absorption_seeds:
            key = (asked.model, asked.hook, asked.dtype, words, seed)
            named = [name for name in p.nulls if (name, "absorption") not in NOT_APPLICABLE]
            named = _to_measure(named, asked, "absorption", p)
            nulls += self.once(done, ("nulls", *key, *_form(asked)), one * len(named))
        points = len(p.absorption_ratios) + len(asked.snapshots) * p.absorption_over_training
        if done:
            return Job("letters", member.name, *NOTHING, done=True)
        return Job("letters", member.name, NOTEBOOK + LOAD + PICTURES, one * len(p.absorption_seeds) * (1 + points),
                   0.0, nulls)

    def words(self, study: str, members) -> list[Job]:
        """The job of all words; none in a study of planted worlds."""
        asked = [tuple(params.check(stage, member.params, member.origin) for stage in ("letters", "train"))
                 for member in members]
        asked = [(p, training) for p, training in asked if training.model != "planted"]
        if not asked:
            return []
        if self.done("words", study, f"runs/{study}/words.txt"):
            return [Job("words", study, *NOTHING, done=True)]
        own = 0.0
        for p, training in asked:
            words = _words(p, training)
            read = words * READ_AGAIN
            # Ten examples for each word, or for one word of each letter; the word itself.
            examples = read if p.absorption_preset == "paper" else read / LETTERS
            one = self.model(training, examples * (PROMPT - 1) + read) + PROBES * words / WORDS / self.pace(training)
            own += sum(self.once(False, ("words", training.model, training.hook, training.dtype, words, seed), one)
                       for seed in p.absorption_seeds)
        return [Job("words", study, LOAD, own, 0.0, 0.0)]

    def pace(self, p: params.Train) -> float:
        """Of this machine beside the one that the durations here were measured on."""
        return self.speed.product(shape_of(p.model), "float32", _device(p)) / 1e11

    def _sae(self, p: params.Train, rows: float) -> float:
        """Seconds of encoding and decoding ``rows`` rows densely."""
        shape = shape_of(p.model)
        return 4 * rows * p.d_sae * shape.d_model / (self.speed.product(shape, "float32", _device(p)) * SAE)


def _words(p: params.Letters, asked: params.Train) -> float:
    """How many words 04 asks for, about."""
    wanted = ALL_WORDS if p.absorption_preset == "paper" else LETTERS * p.absorption_words_per_letter
    return min(wanted, ALL_WORDS, shape_of(asked.model).vocabulary)


def _to_measure(names: list[str], asked: params.Train, evaluation: str, p) -> list[str]:
    """The nulls whose figures did not come with the workbook."""
    from sae_lib.evaluation import embedded_nulls

    return [name for name in names if not embedded_nulls.covered(asked, name, evaluation, p)]


def _others(p: params.Evaluate) -> str:
    found = [name for name in p.evals if name in NOT_COUNTED]
    return f" (without {', '.join(found)})" if found else ""


def _form(p: params.Train) -> tuple:
    """What makes two SAEs have the same nulls."""
    return p.architecture, p.d_sae, p.k, p.target_l0


def _depth(p: params.Extract) -> int:
    from sae_lib.data.language_model import parse_hook

    layer, site = parse_hook(p.hook)
    return layer + (site == "hook_resid_post")


def _device(p: params.Extract) -> str:
    from sae_lib.data.language_model import pick_device

    return str(pick_device(p.device))


def _width(p: params.Train) -> int:
    """Width of the activations that a run is trained on; of a store that is not there, the model's."""
    from sae_lib.data import activations, planted

    if p.activations.partition(":")[0] == planted.PLANTED:
        return planted.parse(p.activations).d_in
    if p.activations != "auto":
        with contextlib.suppress(params.ParameterError, runs.RunError):
            return activations.open_named(p.activations).d_in
    return shape_of(p.model).d_model
