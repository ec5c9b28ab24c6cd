"""A conversion from folder to folder: read, merge, measure, heal, measure again, write."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anabranch.common.checkpoint import copy_companions, write_json
from anabranch.common.interrupt import interruptible
from anabranch.convert.evaluate import Agreement, compare
from anabranch.convert.heal import Healing
from anabranch.convert.model import convert_model, measure, merged_config
from anabranch.convert.settings import ConvertSettings, command_line
from anabranch.data.stream import Batches, held_out_windows
from anabranch.data.text_files import find_files, read_distinct, split_texts
from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Transformer
from anabranch.models.weights import load_model, save_model

REPORT, PICTURE = "conversion.json", "healing.png"
PROBE_WINDOWS = 32
DEFAULT_CONTEXT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a conversion went.

    key_heads        before and after
    cache_bytes      of one token in all layers, in the weights' dtype, before and after
    errors           per layer the share of the keys' weighted energy that merging lost
    merged, healed   against the original; None without text, and without healing
    steps, seconds   of healing
    interrupted      healing was stopped: only its checkpoint is written
    """

    key_heads: tuple[int, int]
    cache_bytes: tuple[int, int]
    errors: tuple[float, ...]
    merged: Agreement | None = None
    healed: Agreement | None = None
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What the settings name, as tokens; None for what they do not ask for.

    measured, probe   windows to compare models on, and some of them to look at while healing
    calibration       windows to measure queries and keys on
    batches           to train on
    sha256            of the files, those for calibration last
    """

    measured: tuple[Tensor, Tensor] | None = None
    probe: tuple[Tensor, Tensor] | None = None
    calibration: tuple[Tensor, Tensor] | None = None
    batches: Batches | None = None
    sha256: tuple[str, ...] = ()


def convert(settings: ConvertSettings) -> Outcome:
    """Write `settings.out`, a model folder of family sigma, and conversion.json in it.

    config.json is written after all else that a model needs, so a folder that has one is complete. ValueError for a
    model that cannot be merged, a count that does not divide its K heads, texts that are missing, too short or held out
    and calibrated on at once, a folder that already holds a model, and a checkpoint of another run.
    """
    if settings.plot:
        from anabranch.common import plot  # noqa: F401  (fails now rather than after hours, when matplotlib is missing)
    merged_config(ModelConfig.load(settings.model), settings.key_heads)
    if (settings.out / "config.json").exists() and not settings.resume:
        raise ValueError(f"{settings.out} already holds a model; choose another folder")
    original = load_model(settings.model, device=settings.device)
    texts = read_texts(settings, original.config)
    statistics = None if texts.calibration is None else measure(original, *texts.calibration)
    converted = convert_model(original, settings.key_heads, method=settings.method, statistics=statistics)
    result = converted.model
    size = original.embed.element_size()
    outcome = Outcome(
        key_heads=(original.config.k_heads, settings.key_heads),
        cache_bytes=(
            original.config.cache_bytes_per_token(size, size),
            result.config.cache_bytes_per_token(size, size),
        ),
        errors=converted.errors,
    )
    if texts.measured is not None:
        outcome = replace(outcome, merged=compare(original, result, *texts.measured))
    if texts.batches is not None and settings.key_heads != original.config.k_heads:
        assert texts.measured is not None
        assert texts.probe is not None
        sha256 = " ".join(texts.sha256)
        healing = Healing(settings, original, result, batches=texts.batches, probe=texts.probe, texts=sha256)
        with interruptible() as interrupted:
            done = healing.loop(interrupted)
        outcome = replace(outcome, steps=healing.progress.step, seconds=round(healing.progress.seconds, 1))
        if not done:
            return replace(outcome, interrupted=True)
        result = healing.result()
        outcome = replace(outcome, healed=compare(original, result, *texts.measured))
        if settings.plot:
            healing.draw(settings.out / PICTURE)
    _write(settings, result, outcome, texts)
    return outcome


def read_texts(settings: ConvertSettings, config: ModelConfig) -> Texts:
    """Tokenize what the settings name. Each file begins with what the tokenizer puts before a text.

    Nothing that is measured on is trained or calibrated on: ValueError if the calibration text contains it.
    """
    if not settings.text and not settings.calibrate:
        return Texts()
    context = min(DEFAULT_CONTEXT, config.max_position) if settings.context is None else settings.context
    if context > config.max_position:
        raise ValueError(f"context must be at most the model's {config.max_position} positions, got {context}")
    tokenizer = load_tokenizer(settings.model)
    if tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer to read text with")

    def stream(contents: list[bytes]) -> Tensor:
        # A file that was cut to hold its end out may have been cut within a character.
        texts = [content.decode("utf-8", errors="ignore") for content in contents]
        return torch.tensor([token for text in texts for token in tokenizer.encode(text, verbose=False)])

    texts = Texts()
    held: list[bytes] = []
    if settings.text:
        held, sha256 = read_distinct(find_files(settings.text))
        if settings.heal:
            train, held = split_texts(held, settings.held_out)
            batches = Batches(stream=stream(train), context=context, batch=settings.batch, seed=settings.seed)
            texts = replace(texts, batches=batches)
        kept = stream(held)
        measured, probe = held_out_windows(kept, context), held_out_windows(kept, context, PROBE_WINDOWS)
        texts = replace(texts, measured=measured, probe=probe, sha256=(sha256,))
    if settings.calibrate:
        contents, sha256 = read_distinct(find_files(settings.calibrate))
        if any(text in content for text in held for content in contents):
            raise ValueError("the calibration text contains text that the result is measured on; choose other files")
        calibration = held_out_windows(stream(contents), context)
        texts = replace(texts, calibration=calibration, sha256=(*texts.sha256, sha256))
    return texts


def _write(settings: ConvertSettings, model: Transformer, outcome: Outcome, texts: Texts) -> None:
    """The folder: what the original's holds beside its weights, the weights, config.json, and the report last."""
    copy_companions(settings.model, settings.out)
    save_model(model, settings.out)
    write_json(settings.out / REPORT, describe(settings, outcome, texts))


def describe(settings: ConvertSettings, outcome: Outcome, texts: Texts) -> dict[str, Any]:
    """The contents of conversion.json."""
    return {
        "command": command_line(settings),
        "recipe": settings.recipe(),
        "text_sha256": texts.sha256,
        "calibration_tokens": 0 if texts.calibration is None else int((texts.calibration[1] != -100).sum()),
        "training_tokens": 0 if texts.batches is None else texts.batches.stream.numel(),
        **asdict(outcome),
        "torch": torch.__version__,
    }
