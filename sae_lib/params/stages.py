"""The vocabulary: every parameter of every stage with its type, default and meaning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Common(BaseModel):
    """Names that every stage reads."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

    mode: Literal["live", "batch"] = "live"
    """Who reads: a person in JupyterLab, or a batch that leaves pictures and files."""
    run: str = "scratch"
    """Folder under runs/."""
    device: str = "auto"
    """cpu, cuda or auto."""
    seed: int = 42
    """The one seed: weights, order of the data and ingredients each draw from a stream of it."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 takes all. Bit-identity holds for equal threads."""
    overwrite: bool = False
    """Replace a finished run of other parameters."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_switches(cls, value, info):
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("expected a number or a word, got true or false")
        return value


class Extract(Common):
    """01_extract: a model, a layer and text give a store of activations."""

    model: str = "smollm2"
    """Alias (smollm2, tiny), hub id, or folder."""
    layer: int = Field(8, ge=0)
    """Residual stream after this block: blocks.{layer}.hook_resid_post."""
    hook_name: str | None = None
    """Another site, as blocks.{n}.hook_resid_pre; None takes the residual stream after `layer`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the language model and of the store; auto times both."""
    corpus: str | dict[str, float] = "news"
    """One source or weights per source: news, wikipedia, newsgroups_<topic>, a file or folder, or a hub data set."""
    corpus_column: str = "text"
    """Column of a data set, parquet or JSONL that holds the text."""
    corpus_split: str = "train"
    """Split of a hub data set."""
    corpus_seed: int = 0
    """Seed of the draw of documents and prompts; training seeds share one store."""
    tokens: int = Field(400_000, ge=1)
    """Text tokens for training, BOS not counted; the held-out split comes on top (a twentieth of it)."""
    context: int = Field(128, ge=4, le=8192)
    """Tokens of a block, its leading BOS included."""
    spelling_share: float = Field(0.2, ge=0, lt=1)
    """Share of the tokens that are first-letter prompts."""
    max_norm_ratio: float = Field(10.0, gt=1)
    """Tokens whose norm exceeds this many medians are dropped."""
    store: Literal["disk", "stream"] = "disk"
    """disk, or stream through a bounded buffer for what does not fit."""
    store_shard_tokens: int = Field(65_536, ge=256)
    """Tokens of one shard: what an interruption can lose."""
    store_buffer_mb: int = Field(2048, ge=1)
    """Memory for shuffling, in MiB."""

    @property
    def hook(self) -> str:
        """The hook point in TransformerLens' words, e.g. ``blocks.11.hook_resid_post``."""
        return self.hook_name or f"blocks.{self.layer}.hook_resid_post"

    @field_validator("corpus")
    @classmethod
    def _weights_are_positive(cls, value):
        if isinstance(value, dict) and (not value or not all(0 < weight < float("inf") for weight in value.values())):
            raise ValueError("every weight must be above 0 and finite")
        return value


class Train(Extract):
    """02_train_variant: an architecture and its ingredients, trained on a store (or a stream) of activations."""

    role: Literal["normal", "null"] = "normal"
    """normal, or null: a baseline exempt from the validity gate and shown apart."""
    activations: str = "auto"
    """A store's folder; auto finds the one that 01 wrote for the same parameters."""
    architecture: str = "topk"
    """topk, standard, batch_topk, jumprelu, gated or matryoshka_batch_topk."""
    initial_encoder: Literal["tied", "random"] = "tied"
    """The decoder's copy, or independent rows (random; a null baseline where samples is 0)."""
    d_sae: int = Field(4096, ge=1)
    """Latents, F."""
    k: int = Field(32, ge=1)
    """Active latents per token (topk; batch_topk and matryoshka_batch_topk on average)."""
    matryoshka_widths: list[float] = [1 / 32, 3 / 32, 7 / 32, 15 / 32]
    """Where prefixes end that reconstruct alone, as shares of the latents (matryoshka_batch_topk)."""
    l1: float = Field(0.04, ge=0)
    """Weight of the L1 penalty (standard, gated); with target_l0, where the controller starts."""
    l0_weight: float = Field(0.1, ge=0)
    """Weight of the L0 penalty (jumprelu); with target_l0, where the controller starts."""
    l0_penalty: Literal["step", "tanh"] = "tanh"
    """L0 by a straight-through estimator, or a sum of tanh(4 f), which reaches the encoder too (jumprelu)."""
    threshold_start: float = Field(0.1, ge=0)
    """Every threshold at first, where no L0 sets it, for activations of mean square 1 a dimension (jumprelu)."""
    bandwidth: float = Field(0.5, gt=0)
    """Width of the band around a threshold whose entries move it (jumprelu)."""
    l1_warmup: float = Field(0.1, ge=0, le=1)
    """Share of training over which the sparsity penalty rises from 0 (standard, gated, jumprelu)."""
    target_l0: float | None = Field(None, gt=0)
    """L0 to reach by moving the sparsity penalty's weight (standard, gated, jumprelu)."""
    start_l0: float | None = Field(None, gt=0)
    """L0 that training starts with, by biases or thresholds; None takes 4 (jumprelu: 10) times target_l0."""
    ingredients: list[dict[str, Any]] = []
    """What makes a variant: a list of {name: ..., its own keys}."""
    set: str | list[str] = []
    """Changes inside ingredients: name.key, an equals sign, and the value."""
    samples: int = Field(2_000_000, ge=0)
    """Activations to train on, epochs counted again."""
    batch_size: int = Field(2048, ge=1)
    """Activations per step, B."""
    order: Literal["shuffled", "sequence_blocks"] = "shuffled"
    """Rows in random order, or blocks of text in order."""
    lr: float | None = Field(None, gt=0)
    """Learning rate; None takes 3.2e-3 sqrt(576 / D) (docs/learning_rate.md)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder's product; weights and all else are float32. auto takes bfloat16 where the processor has it."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises; None takes 100, or a tenth of the steps where that is fewer."""
    lr_decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    aux_k: int | None = Field(None, ge=0)
    """Dead latents that the auxiliary loss may use; None takes half the model's width, 0 switches it off."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss (Gao et al.: 1/32)."""
    aux_dead_after: int = Field(100_000, ge=1)
    """Samples without firing after which the auxiliary loss revives a latent."""
    dead_after: int = Field(1_000_000, ge=1)
    """Samples without firing after which the validity gate calls a latent dead."""
    coactivation_window: int = Field(16_384, ge=0)
    """Held-out tokens over which pairs of latents are counted at the end of each third of training; 0 counts none."""
    log_points: int = Field(100, ge=2)
    """Rows of the history, evenly spaced."""
    checkpoint_every: int = Field(200, ge=0)
    """Steps between checkpoints, which a run of the same parameters goes on from; 0 writes none."""
    snapshots: list[float] = []
    """Shares of training (0 is before it) after which the SAE is kept whole, for evaluation over training."""
    stop_after_steps: int | None = Field(None, ge=0)
    """Cut the run after so many steps, as an interruption would: the run is then invalid."""

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or what stands for None."""
        tenth = self.samples // self.batch_size // 10
        return min(100, tenth) if self.warmup_steps is None else self.warmup_steps

    @property
    def snapshot_steps(self) -> dict[int, float]:
        """The share of ``snapshots`` by the step after which it is reached; empty where nothing is trained."""
        total = self.samples // self.batch_size
        return {round(share * total): share for share in self.snapshots} if total else {}

    @model_validator(mode="after")
    def _k_fits(self):
        if self.architecture in ("topk", "batch_topk", "matryoshka_batch_topk") and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is larger than d_sae = {self.d_sae}; choose k <= d_sae")
        if self.target_l0 is not None and self.target_l0 >= self.d_sae:
            raise ValueError(f"target_l0 = {self.target_l0} must be below d_sae = {self.d_sae}")
        return self

    @field_validator("snapshots")
    @classmethod
    def _snapshots_are_steps_of_their_own(cls, value, info):
        if not all(0 <= share <= 1 for share in value) or len(set(value)) < len(value):
            raise ValueError("expected shares of training, each from 0 (untrained) to 1, and each once")
        total = info.data.get("samples", 0) // info.data.get("batch_size", 1)
        steps = [round(share * total) for share in sorted(value)]
        inner = [step for share, step in zip(sorted(value), steps) if 0 < share < 1]
        if total and (len(set(steps)) < len(steps) or {0, total} & set(inner)):
            raise ValueError("expected shares that are steps of their own, none but 0 and 1 the first or the last; of "
                             f"{total} steps these are steps {steps}")
        return sorted(value)

    @field_validator("matryoshka_widths")
    @classmethod
    def _widths_are_shares(cls, value):
        if not all(0 < share <= 1 for share in value):
            raise ValueError("expected shares of the latents, each above 0 and at most 1")
        return value

    @field_validator("set")
    @classmethod
    def _set_is_a_list(cls, value):
        return [part.strip() for part in value.split(";") if part.strip()] if isinstance(value, str) else value


def _ratios(value: list[float]) -> list[float]:
    if not all(0 < ratio <= 1 for ratio in value) or len(set(value)) < len(value):
        raise ValueError("expected shares of the latents, each above 0 and at most 1, and each once")
    return sorted(value, reverse=True)


Null = Literal["random", "untrained", "pca", "residual"]


class Evaluate(Common):
    """03_eval: SAEBench and our own measures of one SAE."""

    evals: list[Literal["core", "sparse_probing", "sae_probes", "scr", "tpp", "unlearning", "truth"]] = Field(
        ["core"], min_length=1)
    """SAEBench evaluations: core, sparse_probing, sae_probes, scr, tpp, unlearning; truth is for a planted world."""
    eval_preset: Literal["smoke", "default", "paper", "reported_000", "reported_001"] = "default"
    """How much: smoke, default, paper (SAEBench's own), or what study 1 or 2 reported: reported_000, reported_001."""
    nulls: list[Null] = ["random", "untrained", "pca", "residual"]
    """Null baselines that every evaluation is run on too, once for all SAEs of a shape; empty runs none."""
    compression_ratios: list[float] = []
    """Shares of the latents to keep, the most important ones, each measured in turn; empty measures none."""
    over_training: bool = True
    """Measure the SAEs that `snapshots` kept in training too, where there are any."""
    model: str | None = None
    """The model that evaluates; None takes the one that the SAE was trained on."""
    layer: int | None = Field(None, ge=0)
    """The layer that is evaluated; None takes the one that the SAE was trained on."""
    sae: str | None = None
    """Folder of an SAE made elsewhere (SAELens, dictionary_learning, sparsify); None takes the run's own."""
    activations: str = "auto"
    """With `sae`: the store whose held-out part it is measured on; auto finds the one of the model and layer."""
    unlearning_data: str | None = None
    """Folder with unlearning's bio-forget-corpus.jsonl, which is gated, and what else is not to come from the hub."""

    @field_validator("compression_ratios")
    @classmethod
    def _ratios_are_shares(cls, value):
        return _ratios(value)


class Letters(Common):
    """04_letter_absorption: SAEBench's first-letter absorption of one SAE, per letter and word."""

    absorption_preset: Literal["smoke", "default", "paper"] = "default"
    """default, smoke (a quick look), or paper (every word, and no cap)."""
    absorption_seeds: list[int] = Field([42], min_length=1)
    """Seeds of the evaluation itself: prompts, split of the words, probes."""
    absorption_words_per_letter: int = Field(150, ge=20)
    """Words of a letter at most, training and test."""
    nulls: list[Null] = ["random", "untrained"]
    """Null baselines that absorption is measured of too, once for all SAEs of a shape; empty measures none."""
    absorption_ratios: list[float] = []
    """Shares of the latents to keep, the most important ones, absorption measured for each; empty measures none."""
    absorption_over_training: bool = True
    """Measure absorption of the SAEs that `snapshots` kept in training too, where there are any."""
    model: str | None = None
    """The model that evaluates; None takes the one that the SAE was trained on."""
    layer: int | None = Field(None, ge=0)
    """The layer that is evaluated; None takes the one that the SAE was trained on."""
    sae: str | None = None
    """Folder of an SAE made elsewhere (SAELens, dictionary_learning, sparsify); None takes the run's own."""
    activations: str = "auto"
    """With `sae`: the store whose held-out part it is measured on; auto finds the one of the model and layer."""

    @field_validator("absorption_ratios")
    @classmethod
    def _ratios_are_shares(cls, value):
        return _ratios(value)

    @field_validator("absorption_seeds")
    @classmethod
    def _seeds_differ(cls, value):
        if len(set(value)) < len(value) or min(value) < 0 or max(value) >= 2**32:
            raise ValueError("expected seeds from 0 to 4294967295, each once")
        return value


class Compare(Common):
    """05_compare: runs into one table and its figures."""

    study: str = "quickstart"
    """Study under runs/ whose runs are compared."""
    runs: list[str] = []
    """Runs to compare; empty takes all of the study."""
    baseline: str | None = None
    """The variant that others are compared with."""
    frontier: str = "l0"
    """What the frontier runs along: l0, a parameter (d_sae), or an ingredient's (progressive_orthogonality.weight)."""


STAGES: dict[str, type[Common]] = {"extract": Extract, "train": Train, "eval": Evaluate, "letters": Letters,
                                 "compare": Compare}
VOCABULARY = {name for stage in STAGES.values() for name in stage.model_fields}
